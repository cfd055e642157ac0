"""Groups of options, as data: transformer matching, distillation, allocation and its budgets."""

import math
from dataclasses import dataclass
from typing import Any

from ..format.patterns import EMPTY, NM, Pattern, Unstructured
from ..utils.precision import PRECISIONS
from ..utils.validation import check_choice, check_integer, check_number
from .fields import ALLOCATIONS


@dataclass(frozen=True)
class TMOptions:
    """Options of transformer matching.

    Attributes:
        passes: number of passes over the calibration windows and their noisy copies.
        lr: first step size of Adam: with `relative_lr` a share of the weights' size, 4e-3 by default; else absolute, as
            2e-5 of effort="published". For a step of your own in absolute size, such as 3e-4, pass relative_lr=False.
            Blocks that a too large step makes no better stay as they were; the report counts them.
        relative_lr: whether `lr` is a share of a parameter's root mean square over its nonzero entries, taken as at
            least 0.02 for norms and biases. The sizes of weights differ tenfold between models.
        factor_lr: step size of A and B, as a multiple of `lr`.
        final_lr: last step size, as a share of the first; between them it follows a cosine.
        batch_size: windows in a step.
        target: target of the block's output: "block", the output of the dense block on the same inputs, as published;
            "stream", the activations of the dense model at that place, which also makes up for errors of the blocks
            before; "mean", the mean of both.
        precision: precision of the products: "fp32", "tf32" (GPUs only), "bf16" (autocast with FP32 masters, hidden
            states between blocks in BF16; "fp32" on a CPU without BF16 instructions), or "auto": "bf16" if a layer of
            the block has more than 2^22 weights, else "tf32". The forward passes of the layer solves use it too.
    """

    passes: int = 20
    lr: float = 2e-5
    relative_lr: bool = False
    factor_lr: float = 1.0
    final_lr: float = 0.2
    batch_size: int = 8
    target: str = "block"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_schedule("tm", self)
        check_choice("tm.target", self.target, ("block", "stream", "mean"))
        check_choice("tm.precision", self.precision, ("auto", *PRECISIONS))


def check_schedule(field: str, options: Any) -> None:
    """Checks steps and step sizes, which matching and distillation have in common."""
    check_integer(f"{field}.passes", options.passes, 1)
    check_integer(f"{field}.batch_size", options.batch_size, 1)
    check_number(f"{field}.lr", options.lr, 0, exclusive=True)
    check_choice(f"{field}.relative_lr", options.relative_lr, (True, False))
    check_number(f"{field}.factor_lr", options.factor_lr, 0)
    check_number(f"{field}.final_lr", options.final_lr, 0)


Shape = tuple[int, int]


@dataclass(frozen=True)
class UniformOptions:
    """`allocation="uniform"`, the same settings for every layer, has no options."""

    def check(self, pattern: Pattern, rank: int | None) -> None:
        """Uniform settings always exist."""


@dataclass(frozen=True)
class OwlOptions:
    """Options of `allocation="owl"`; the defaults are the paper's.

    Attributes:
        outlier_threshold: a score is an outlier if it is above this multiple of the mean score of its layer.
        spread: largest distance of a block's sparsity from the mean.
    """

    outlier_threshold: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        check_number("allocation_options.outlier_threshold", self.outlier_threshold, 0, exclusive=True)
        check_number("allocation_options.spread", self.spread, 0, 1, exclusive=True)

    def check(self, pattern: Pattern, rank: int | None) -> None:
        """Raises ValueError where the uniform settings leave nothing to choose."""
        if not isinstance(pattern, Unstructured) or pattern == EMPTY:
            sparsity = None if pattern == EMPTY else str(pattern)
            raise ValueError(
                f"allocation='owl' chooses each block's sparsity, which sparsity={sparsity!r} fixes: pass a "
                "fraction, or allocation='global', which then chooses ranks"
            )
        if not 0 <= pattern.sparsity - self.spread <= pattern.sparsity + self.spread < 1:
            raise ValueError(
                f"allocation_options.spread={self.spread!r}: at a sparsity of {pattern}, block sparsities would leave "
                "[0, 1)"
            )


@dataclass(frozen=True)
class GlobalOptions:
    """Options of `allocation="global"`.

    Attributes:
        spread: largest distance of a layer's sparsity from the uniform one.
        rank_floor, rank_ceiling: bounds of a layer's rank, as multiples of the uniform one.
        iterations: iterations of 3BASiL in each of the trial solves that measure a layer's errors.
    """

    spread: float = 0.15
    rank_floor: float = 0.25
    rank_ceiling: float = 3.0
    iterations: int = 20

    def __post_init__(self) -> None:
        check_number("allocation_options.spread", self.spread, 0, 1)
        check_number("allocation_options.rank_floor", self.rank_floor, 0, 1)
        check_number("allocation_options.rank_ceiling", self.rank_ceiling, 1)
        check_integer("allocation_options.iterations", self.iterations, 1)

    def check(self, pattern: Pattern, rank: int | None) -> None:
        """Raises ValueError where the uniform settings leave nothing to choose."""
        if isinstance(pattern, NM) and rank == 0:
            raise ValueError(
                f"allocation='global' has nothing to choose with sparsity={str(pattern)!r} and rank=0: pass a rank, "
                "or a fraction"
            )


def budget_pattern(compression: float, rank_ratio: float) -> Unstructured:
    """S of a layer that keeps a share 1 - c of its parameters, a share k of them in B and A: sparsity c + k - c k."""
    return Unstructured(compression + rank_ratio - compression * rank_ratio)


def budget_rank(compression: float, rank_ratio: float, shape: Shape) -> int:
    """Rank of such a layer (out, in): floor(k (1 - c) out in / (out + in)), as in OATS (arXiv 2409.13652)."""
    return math.floor(rank_ratio * (1 - compression) * math.prod(shape) / sum(shape))


@dataclass(frozen=True)
class DistillOptions:
    """Options of distillation.

    Attributes:
        passes: number of passes over the calibration windows, those of `self_samples`, and their noisy copies.
        lr: first step size of Adam: with `relative_lr` a share of the weights' size, else absolute.
        relative_lr: whether `lr` is a share of a parameter's root mean square over its nonzero entries, taken as at
            least 0.02 for norms and biases, and falls with the square root of the blocks beyond six. The sizes of
            weights differ tenfold between models, and the changes of many blocks add up.
        factor_lr: step size of A and B, as a multiple of `lr`.
        final_lr: last step size, as a share of the first; between them it follows a cosine.
        batch_size: calibration windows in a step, or as many tokens of shorter ones.
        train: "all" (nonzeros of S, factors, norms and biases; 26 bytes for each weight on the device, the dense model
            included), or "factors" (without S, which stays packed) for models that are too large for that.
        self_samples: windows of text that the dense model writes itself, beside the calibration windows. If there are
            few calibration tokens, they keep the model from learning these by heart.
        prompted: the share of them that continue 16 tokens from a random place of a calibration window. The others
            begin with the model's first token. None takes half, or all where the others repeat each other: where the
            share of runs of four tokens that stand in the text before is larger by 0.1 among them.
        self_len: tokens in such a window, bounded by the model's context.
        hidden_weight: weight of the second term of the loss: the squared distance of each block's outputs from those of
            the dense model, relative to their size, in the mean over the blocks that are called and positions. It tells
            more of a token than its predictions do, which helps most on text unlike the calibration's.
        checkpointing: recompute activations in the backward pass; takes less memory and a third more time.
        precision: precision of the products: "fp32", "tf32" (GPUs only), or "bf16" (autocast with FP32 masters; "fp32"
            on a CPU without BF16 instructions).
    """

    passes: int = 8
    lr: float = 1e-3
    relative_lr: bool = True
    factor_lr: float = 1.0
    final_lr: float = 0.05
    batch_size: int = 8
    train: str = "all"
    self_samples: int = 0
    prompted: float | None = None
    self_len: int = 256
    hidden_weight: float = 3.0
    checkpointing: bool = False
    precision: str = "bf16"

    def __post_init__(self) -> None:
        check_schedule("distill", self)
        check_integer("distill.self_samples", self.self_samples, 0)
        if self.prompted is not None:
            check_number("distill.prompted", self.prompted, 0, 1)
        check_integer("distill.self_len", self.self_len, 2)
        check_number("distill.hidden_weight", self.hidden_weight, 0)
        check_choice("distill.train", self.train, ("all", "factors"))
        check_choice("distill.checkpointing", self.checkpointing, (True, False))
        check_choice("distill.precision", self.precision, PRECISIONS)


ALLOCATION_OPTIONS: dict[str, type] = dict(zip(ALLOCATIONS, (UniformOptions, OwlOptions, GlobalOptions), strict=True))
