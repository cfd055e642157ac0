"""The optimiser of transformer matching and distillation, and its schedule of step sizes."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..config.options import DistillOptions, TMOptions
from ..utils.precision import LARGE

Groups = dict[str, list[nn.Parameter]]

# The least root mean square of a parameter for relative step sizes: biases begin at zero, matrices do not.
LEAST_VECTOR, LEAST_MATRIX = 0.02, 1e-3


class Schedule:
    """Adam's step sizes: a cosine from those given to `final` times these over all steps.

    Args:
        optimizer: with step sizes as tensors where a captured step reads them.
        steps: of the whole training.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, final: float) -> None:
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
    groups: Groups, options: DistillOptions | TMOptions, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Adam with the first step sizes."""
    rates = []
    for name, parameters in groups.items():
        lr = options.lr * (options.factor_lr if name == "factors" else 1)
        least = LEAST_VECTOR if name == "vectors" else LEAST_MATRIX
        sizes = by_size(parameters, least) if options.relative_lr else {1.0: parameters}
        rates += [{"params": members, "lr": lr * size} for size, members in sizes.items() if members]
    device = rates[0]["params"][0].device
    on_cuda = device.type == "cuda"
    for group in rates if on_cuda else ():
        group["lr"] = torch.tensor(group["lr"], device=device)  # a captured step reads it
    return torch.optim.Adam(rates, betas=betas, fused=on_cuda, capturable=on_cuda)


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
