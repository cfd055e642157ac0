"""Steps that solvers share: scaling, subspace iteration, the exact low-rank fit, balanced factors."""

from collections.abc import Callable
from typing import Any

import torch

from ..format.decomposition import Decomposition
from ..format.patterns import Pattern
from ..utils.world import ALONE, World
from .gram import ScaledGram, squared_error

# Wt -> (S, mask), called with one weight after another of the same shape; see `pruners.Pruner`.
Repeated = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def subspace_iteration_step(
    error: torch.Tensor, gram: torch.Tensor, basis: torch.Tensor, world: World = ALONE
) -> torch.Tensor:
    """One step of subspace iteration on E G E^T.

    Its leading eigenvectors are the left singular vectors of E G^(1/2), so the exact G-weighted rank-r fit of E
    is P P^T E once the basis P has converged; no step increases the error of that fit.

    Args:
        error: E (out, in).
        gram: G (in, in).
        basis: P (out, r).
        world: the processes, each with some rows of E and P.

    Returns:
        (out, r), orthonormal columns.
    """
    return orthonormal(error @ (gram @ world.sum_(error.T @ basis)), world)


def orthonormal(spans: torch.Tensor, world: World = ALONE) -> torch.Tensor:
    """Orthonormal columns with the span of Y (out, r): `cholesky_qr` in FP64, which takes nearly dependent columns.

    A QR factorisation takes a hundred times as long on a GPU, and does not share its rows among processes.
    """
    return cholesky_qr([spans.double()], world)[0].to(spans.dtype)


def cholesky_qr(spans: list[torch.Tensor], world: World = ALONE) -> list[torch.Tensor]:
    """Orthonormalises the columns of every Y (out_i, r) by one Cholesky factorisation of Y^T Y.

    It takes a few kernels for all matrices together; a QR factorisation takes many kernels for each. The result has the
    span of Y and orthonormal columns as long as the columns are far from dependent, as they are in a warm-started
    iteration. Dependent columns come out shorter than one: never longer, never NaN.

    Args:
        world: the processes, each with some rows of every Y.

    Returns:
        one (out_i, r) per matrix.
    """
    inverses = inverse_factors(world.sum_(torch.stack([Y.T @ Y for Y in spans])))
    return [Y @ inverse.T for Y, inverse in zip(spans, inverses.unbind(), strict=True)]


def cholesky_qr_batch(spans: torch.Tensor) -> torch.Tensor:
    """`cholesky_qr` of matrices of one shape, in this process alone: (batch, out, r)."""
    return spans @ inverse_factors(spans.mT @ spans).mT


def inverse_factors(C: torch.Tensor) -> torch.Tensor:
    """L^-1 D of every C = Y^T Y, (batch, r, r): D C D = L L^T up to a shift by its rounding, 1 on its diagonal."""
    squares = C.diagonal(dim1=1, dim2=2)
    unit = squares.rsqrt().masked_fill(squares < torch.finfo(C.dtype).tiny, 0.0)  # zero columns stay zero
    C = C * unit[:, :, None] * unit[:, None, :]
    rounding = 10 * torch.finfo(C.dtype).eps * C.shape[-1]
    identity = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    factors = torch.linalg.cholesky_ex(torch.add(C, identity, alpha=rounding)).L
    return torch.linalg.solve_triangular(factors, identity, upper=False) * unit[:, None, :]


def randomized_range_finder(
    error: torch.Tensor, gram: torch.Tensor, rank: int, seed: int, steps: int = 5, world: World = ALONE
) -> torch.Tensor:
    """An (out, rank) orthonormal basis near the leading eigenvectors of E G E^T.

    It starts from a random sketch, which is the same for a seed on every device, and takes a few steps of subspace
    iteration.

    Args:
        world: the processes, each with some rows of E and of the basis.
    """
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(error.shape[1], rank, generator=generator).to(error.device)
    basis = orthonormal(error @ (gram @ sketch), world)
    for _ in range(steps):
        basis = subspace_iteration_step(error, gram, basis, world)
    return basis


def exact_basis(error: torch.Tensor, gram: ScaledGram, rank: int) -> torch.Tensor:
    """The basis P of the exact G-weighted low-rank fit of an error: L = P P^T E minimises tr((E - L) G (E - L)^T).

    P spans the leading left singular vectors of E G^(1/2) (Eckart-Young in the norm of G; a projection from the
    left commutes with the weighting). G may be singular.

    Args:
        error: E (out, in).
        gram: G, of the layer's inputs.
        rank: of L, at most min(out, in).

    Returns:
        (out, rank), orthonormal columns.
    """
    if error.shape[0] <= error.shape[1]:
        return _leading_eigenvectors(error @ gram.matrix @ error.T, rank)
    return left_singular_vectors(error @ gram.root, rank)


def left_singular_vectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading left singular vectors (rows, rank) of M, from the eigenvectors of the smaller of M M^T and M^T M."""
    if matrix.shape[0] <= matrix.shape[1]:
        return _leading_eigenvectors(matrix @ matrix.T, rank)
    return torch.linalg.qr(matrix @ _leading_eigenvectors(matrix.T @ matrix, rank)).Q


def _leading_eigenvectors(symmetric: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors[:, len(symmetric) - rank :].flip(1)


def balanced_factors(basis: torch.Tensor, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product basis @ coefficients with singular values split evenly: (A, B).

    Args:
        basis: (out, r), orthonormal columns.
        coefficients: (r, in).
    """
    # The eigenvectors of C C^T are the left singular vectors of C. Their errors affect the balance, not the product.
    C = coefficients.double()
    values, U = torch.linalg.eigh(C @ C.T)  # in ascending order
    least = torch.maximum(values[-1] * 1e-12, values.new_tensor(torch.finfo(torch.float32).tiny))
    root = values.clamp(min=least).pow(0.25).to(coefficients.dtype)
    U = U.to(coefficients.dtype)
    return (U.T @ coefficients) / root[:, None], basis @ (U * root)


def scaled(weight: torch.Tensor, gram: ScaledGram) -> torch.Tensor:
    """W (out, in), any float dtype, in the coordinates of `gram`: FP32, zero at dead inputs, a new tensor."""
    return (weight.float() * gram.scale).masked_fill_(gram.dead, 0.0)


def unscale(
    S: torch.Tensor,
    mask: torch.Tensor,
    basis: torch.Tensor | None,
    error: torch.Tensor,
    gram: ScaledGram,
    world: World = ALONE,
) -> Decomposition:
    """Back to the layer's own coordinates, with the low-rank part basis @ (basis^T error).

    Args:
        world: the processes, each with some rows of S, mask, basis and error. The result has the rows that went in.
    """
    alive = ~gram.dead / gram.scale
    S = S * alive
    if basis is None:
        return Decomposition(S, mask)
    A, B = balanced_factors(basis, world.sum_(basis.T @ error) * alive)
    return Decomposition(S, mask, A, B)


def one_shot(
    S: torch.Tensor, mask: torch.Tensor, Wt: torch.Tensor, gram: ScaledGram, **stats: float
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The result (S, mask, stats) of a pruner without iterations; more entries of its stats by name."""
    objective = squared_error(Wt - S, gram.matrix)
    return S, mask, {"iterations": 1, "converged": True, "objective": objective, **stats}


def solve_by_pruning(name: str, prune: Callable[..., tuple[torch.Tensor, torch.Tensor, dict]]) -> Callable:
    """The `registry.Solve` of a pruner; its ValueError at a rank > 0 names a method with a low-rank part."""

    def solve(
        weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Any, seed: int = 0
    ) -> Decomposition:
        if rank:
            raise ValueError(
                f"rank={rank!r}: method={name!r} has no low-rank part, so rank must be 0; "
                f'method="eora", method_options={{"pruner": "{name}"}} fits one after it'
            )
        Wt = scaled(weight, gram)
        S, mask, stats = prune(Wt, gram, pattern, options)
        result = unscale(S, mask, None, Wt - S, gram)
        result.stats = stats
        return result

    return solve
