"""3BASiL (arXiv 2603.01376): ADMM over S, the low-rank part and a dense copy of S."""

from .hierarchical import solve_hierarchical
from .method import Options, decompose, shares_rows, solve, solve_group

__all__ = ["Options", "decompose", "shares_rows", "solve", "solve_group", "solve_hierarchical"]
