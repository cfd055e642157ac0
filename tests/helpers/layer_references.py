"""Float64 references for layer problems."""

import torch

from hf_sparselr.solvers.gram import ScaledGram, squared_error


def in_scale(tensor: torch.Tensor, gram: ScaledGram) -> torch.Tensor:
    return (tensor.double() * gram.scale.double()).masked_fill(gram.dead, 0)


def objective(weight: torch.Tensor, result, gram: ScaledGram) -> float:
    return squared_error(in_scale(weight.double() - result.dense().double(), gram), gram.matrix.double())


def least_error(E: torch.Tensor, gram: ScaledGram, rank: int) -> float:
    """min over L of that rank of tr((E - L) G (E - L)^T): the tail of the spectrum of E G^(1/2), float64."""
    values, vectors = torch.linalg.eigh(gram.matrix.double())
    return float(torch.linalg.svdvals(E.double() @ (vectors * values.clamp(min=0).sqrt()))[rank:].square().sum())


def fit_error(E: torch.Tensor, gram: ScaledGram, basis: torch.Tensor) -> float:
    return squared_error(E.double() - basis.double() @ (basis.double().T @ E.double()), gram.matrix.double())


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]
