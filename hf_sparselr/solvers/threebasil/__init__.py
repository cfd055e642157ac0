"""3BASiL (arXiv 2603.01376): ADMM over S, the low-rank part and a dense copy of S."""

from .method import Options, decompose, solve, solve_group

__all__ = ["Options", "decompose", "solve", "solve_group"]
