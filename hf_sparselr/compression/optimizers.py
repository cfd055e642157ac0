"""The optimisers of transformer matching and distillation, and their schedule of step sizes."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..config.options import DistillOptions, TMOptions
from ..utils.precision import LARGE

Groups = dict[str, list[nn.Parameter]]

# The least root mean square of a parameter for relative step sizes: biases begin at zero, matrices do not.
LEAST_VECTOR, LEAST_MATRIX = 0.02, 1e-3
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of X, X X^T X and (X X^T)^2 X
MOST_ORTHOGONAL = 2**28  # entries of all S that Muon takes
MOST_STACKED = 2**24  # entries at a time


class Schedule:
    """Adam's step sizes: a cosine from those given to `final` times these over all steps.

    Args:
        optimizer: with step sizes as tensors where a captured step reads them.
        steps: of the whole training.
    """

    def __init__(self, optimizer: "torch.optim.Optimizer | Optimizers", steps: int, final: float) -> None:
        self._groups = [(group, float(group["lr"])) for group in optimizer.param_groups]
        self._steps, self._final, self._done, self._factor = steps, final, 0, 1.0

    def step(self) -> None:
        """Sets the step sizes of the next step."""
        self._done += 1
        self._set()

    def halve(self) -> None:
        """Halves all step sizes from now on."""
        self._factor /= 2
        self._set()

    def _set(self) -> None:
        progress = min(self._done / self._steps, 1.0)
        share = self._final + (1 - self._final) * 0.5 * (1 + math.cos(math.pi * progress))
        for group, first in self._groups:
            rate = first * share * self._factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def is_large(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the work on them is bound by its arithmetic. Otherwise launching it takes longer."""
    return any(parameter.numel() > LARGE for parameter in parameters)


def make_optimizer(
    groups: Groups, options: TMOptions | DistillOptions, betas: tuple[float, float]
) -> "torch.optim.Optimizer | Optimizers":
    """The optimiser that the options name, with the first step sizes."""
    orthogonal = options.optimizer == "muon" and _few(groups.get("S", []))
    rates, rates_of_S = [], []
    for name, parameters in groups.items():
        lr = options.lr * (options.factor_lr if name == "factors" else 1)
        least = LEAST_VECTOR if name == "vectors" else LEAST_MATRIX
        sizes = by_size(parameters, least) if options.relative_lr else {1.0: parameters}
        own = rates_of_S if name == "S" and orthogonal else rates
        own += [{"params": members, "lr": lr * size} for size, members in sizes.items() if members]
    device = (rates + rates_of_S)[0]["params"][0].device
    on_cuda = device.type == "cuda"
    for group in rates + rates_of_S if on_cuda else ():
        group["lr"] = torch.tensor(group["lr"], device=device)  # a captured step reads it
    parts: list[torch.optim.Optimizer] = []
    if rates:
        parts.append(torch.optim.Adam(rates, betas=betas, fused=on_cuda, capturable=on_cuda))
    if rates_of_S:
        parts.append(MaskedMuon(rates_of_S, betas[0]))
    return parts[0] if len(parts) == 1 else Optimizers(parts)


def _few(parameters: list[nn.Parameter]) -> bool:
    """Whether Muon's products cost little beside those of a step: its time grows with the cube of a layer's width."""
    return not is_large(parameters) and sum(parameter.numel() for parameter in parameters) <= MOST_ORTHOGONAL


class Optimizers:
    """Several optimisers as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


class MaskedMuon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices with a support: steps along the momentum with equal singular values.

    A step is the orthogonalised momentum on the support, scaled so that the root mean square of its entries there is
    the step size.

    Args:
        groups: of matrices (out, in). Their nonzeros are their supports, outside which gradients are zero.
        momentum: decay of the mean of gradients.
    """

    def __init__(self, groups: list[dict], momentum: float) -> None:
        super().__init__(groups, {"momentum": momentum})
        self._stacks = [list(_stacks(group["params"])) for group in self.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            for stack in stacks:
                stack.step(group["lr"], group["momentum"])


def _stacks(parameters: list[nn.Parameter]) -> Iterator["_Stack"]:
    """Parameters of one shape together: small products, one by one, would leave a GPU idle."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, members in by_shape.items():
        count = max(1, MOST_STACKED // shape.numel())
        for first in range(0, len(members), count):
            yield _Stack(members[first : first + count])


class _Stack:
    """Matrices of one shape, with their momentum and support as (matrices, out, in)."""

    @torch.no_grad()
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._mask = torch.stack([parameter != 0 for parameter in parameters])
        self._root_of_count = self._mask.sum((1, 2), keepdim=True).float().sqrt()
        self._momentum = torch.zeros(self._mask.shape, device=self._mask.device)

    def step(self, lr: float | torch.Tensor, momentum: float) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        self._momentum.lerp_(torch.stack(gradients), 1 - momentum)
        steps = orthogonalised(self._momentum) * self._mask
        least = torch.finfo(steps.dtype).tiny
        sizes = torch.linalg.vector_norm(steps, dim=(1, 2), keepdim=True).clamp(min=least)
        moves = steps.div_(sizes).mul_(self._root_of_count * lr)
        torch._foreach_sub_(self._parameters, list(moves.unbind()))


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (count, out, in) with singular values near 1 and the same singular vectors, FP32.

    Five steps of Newton and Schulz with Jordan's coefficients, in BF16 on CUDA: singular values end within 0.7 and 1.2,
    but for tiny ones. A zero matrix stays zero.
    """
    X = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = X.shape[1] > X.shape[2]
    X = X.mT if tall else X
    X = X / torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp(min=1e-30).to(X.dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        square = X @ X.mT
        X = a * X + torch.baddbmm(b * square, square, square, alpha=c) @ X
    return (X.mT if tall else X).float()


@torch.no_grad()
def by_size(parameters: list[nn.Parameter], least: float) -> dict[float, list[nn.Parameter]]:
    """Parameters by the root mean square of their nonzero entries, rounded to a power of the square root of 2: each
    group of Adam's costs launches.

    Args:
        least: smaller ones count as this.
    """
    if not parameters:
        return {}
    counts = torch.stack([torch.count_nonzero(parameter) for parameter in parameters]).clamp(min=1)
    norms = torch.stack(torch._foreach_norm(parameters)) / counts.sqrt()
    sizes: dict[float, list[nn.Parameter]] = {}
    for parameter, size in zip(parameters, norms.tolist(), strict=True):
        sizes.setdefault(2 ** (round(2 * math.log2(max(size, least))) / 2), []).append(parameter)
    return sizes
