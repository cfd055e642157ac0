"""Distillation: a compressed model is trained against its dense self's logits, as a whole.

Minimises the Kullback-Leibler divergence KL(dense || compressed) of predicted distributions, and the relative distance
of the blocks' outputs, over the nonzeros of S, the factors, the norms and the biases. Zeros stay zero. The dense model
computes batch by batch beside the compressed one; nothing of it is stored.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config.options import DistillOptions
from ..data.model_inputs import Sample, first_row, rows
from ..nn.linear import packed_layers
from ..utils.modules import detached_states, eval_mode, named_tensors
from ..utils.precision import arithmetic, available
from ..utils.world import ALONE, World
from .capture import first_tensor, instance_forwards, model_inputs
from .fused_operators import fused_norms
from .masters import original_places, pack_masters, round_masters, unpack_masters
from .model_structure import find_blocks
from .padding import MASKS
from .training_loop import Groups, Training, is_large, restore, shared_steps, snapshot, train

if TYPE_CHECKING:
    from ..config.sparselr_config import SparseLRConfig

JUDGING_WINDOWS = 8  # on which the loss before and after is measured, where none are kept back
BETAS = (0.9, 0.95)
SHALLOW = 6  # blocks, up to which relative step sizes are those of the options


def copy_sharing_blocks(model: nn.Module, blocks: dict[str, nn.Module]) -> nn.Module:
    """A copy of a dense model, to distill from. Its blocks share their tensors with the model's: the pipeline replaces
    those and never edits them. The other tensors are its own."""
    tensors = [tensor for block in blocks.values() for _, tensor in named_tensors(block)]
    return copy.deepcopy(model, {**detached_states(model), **{id(tensor): tensor for tensor in tensors}})


@torch.no_grad()
def check_logits(teacher: nn.Module, sample: Sample, config: "SparseLRConfig") -> None:
    """Checks by a forward pass that a dense model has logits to distill.

    Args:
        teacher: `on_device`.
        sample: one of the calibration samples.

    Raises:
        ValueError: it cannot be run on the sample, or its output has no logits.
    """
    field, kind = f"refine={config.refine!r}", type(teacher).__name__
    device = next(teacher.parameters()).device
    try:
        with arithmetic(device, available(config.distill.precision, device)):
            output = teacher(**model_inputs(teacher, first_row(sample)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own
        raise ValueError(
            f"{field}: {kind} cannot be run on a calibration sample ({error!r}); leave distillation out"
        ) from error
    if not isinstance(getattr(output, "logits", None), torch.Tensor):
        found = ", ".join(output) if isinstance(output, dict) else type(output).__name__
        raise ValueError(f"{field}: {kind} has no logits to distill (it returns {found}); leave distillation out")


def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: list[Sample],
    options: DistillOptions,
    seed: int,
    device: torch.device,
    on_pass: Callable[[float], None] = lambda loss: None,
    kept_back: dict[str, list[Sample]] | None = None,
    world: World = ALONE,
) -> dict:
    """Trains a packed model in place, and leaves its best state in it, if need be the start; its tensors keep their
    dtypes, devices and support.

    Args:
        model: with `SparseLRLinear` layers.
        teacher: the dense model, `on_device`.
        batches: model inputs.
        seed: of the order of the steps.
        on_pass: called after every pass with its mean loss.
        kept_back: {kind of text: batches that are not trained on}. They choose the best state: the one with the least
            mean over the kinds of loss / loss of the start, among those that are worse than the start for no kind.
            None judges by the first of `batches`.
        world: the processes that train the same model, each on its own batches.

    Returns:
        losses (nats a prediction, one a pass), kept_back ({kind: losses of the start and after every pass}), best_pass
        (0: the start), loss_before, loss_after (means over the kinds, of the models as they are stored), passes,
        seconds.
    """
    started = time.perf_counter()
    layers = packed_layers(model)
    dtypes = {name: tensor.dtype for name, tensor in named_tensors(model)}
    few = max(1, JUDGING_WINDOWS // (rows(batches[0]) * world.size)) if batches else 0
    pairs = block_pairs(model, teacher) if options.hidden_weight else []
    judging = {kind: own for kind, own in (kept_back or {}).items() if world.any(bool(own))}
    with original_places(model), eval_mode(model), _checkpointing(model, options.checkpointing):
        try:
            groups = unpack_masters(model, layers, device, options)
            parameters = [parameter for group in groups.values() for parameter in group]
            start = snapshot(parameters, in_main_memory=is_large(parameters))
            with fused_norms([model, teacher], device, options.precision):
                scale = Scale(model, teacher, judging or {"trained on": batches[:few]}, options, device, world)
                training = _train(model, teacher, pairs, groups, batches, options, seed, on_pass, scale.weigh, world)
                best, history = training.best_pass, scale.history
                if best:
                    round_masters(model, dtypes)
                    if not scale.weigh() < 1:
                        restore(parameters, start)
                        best = 0
            after = scale.history[-1] if best else history[0]
        finally:
            pack_masters(model, layers)
    return {
        "losses": training.losses,
        "kept_back": {kind: [losses[kind] for losses in history] for kind in judging},
        "best_pass": best,
        "loss_before": statistics.fmean(history[0].values()),
        "loss_after": statistics.fmean(after.values()),
        "passes": len(training.losses),
        "seconds": time.perf_counter() - started,
    }


class Scale:
    """Weighs states of a model against its state when the scale was made.

    Args:
        judging: {kind of text: batches}.

    Attributes:
        history: {kind: loss} of every state that was weighed and has finite losses, that one first.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        judging: dict[str, list[Sample]],
        options: DistillOptions,
        device: torch.device,
        world: World,
    ) -> None:
        counts = {kind: sum(predictions(teacher, own, options)) for kind, own in judging.items()}
        counts = {kind: world.total(count, device) for kind, count in counts.items()}

        def losses() -> dict[str, float]:
            found = {kind: _divergence(model, teacher, own, options, device) for kind, own in judging.items()}
            return {kind: world.total(total, device) / counts[kind] for kind, total in found.items()}

        self._losses = losses
        self.history = [losses()]

    def weigh(self) -> float:
        """The mean over the kinds of loss / loss of the start; the largest quotient if one is above 1; NaN without a
        finite loss."""
        first, last = self.history[0], self._losses()
        if not all(map(math.isfinite, last.values())):
            return math.nan
        self.history.append(last)
        shares = [last[kind] / max(first[kind], torch.finfo(torch.float64).tiny) for kind in first]
        return max(shares) if max(shares) > 1 else statistics.fmean(shares)


def _train(
    model,
    teacher,
    pairs: list[tuple[nn.Module, nn.Module]],
    groups: Groups,
    batches,
    options: DistillOptions,
    seed: int,
    on_pass,
    judge,
    world: World,
) -> Training:
    counts = {id(batch): count for batch, count in zip(batches, predictions(teacher, batches, options), strict=True)}
    device = next(model.parameters()).device
    padded = any(_is_padded(batch) for batch in batches)

    def size(step: list[Sample]) -> float | torch.Tensor:
        total = world.total(sum(counts[id(batch)] for batch in step), device)
        return torch.tensor(total, device=device) if padded else total

    def backward(batch: Sample, size: float | torch.Tensor) -> torch.Tensor:
        return add_gradients(model, teacher, batch, size, options, pairs)

    steps = _steps(batches, list(counts.values()), options.batch_size, world)
    if options.relative_lr:
        options = replace(options, lr=options.lr * depth_share(len(find_blocks(teacher))))
    return train(model, groups, steps, size, backward, options, BETAS, seed, on_pass, judge, world)


def depth_share(blocks: int) -> float:
    """The share of a relative step size for a model of so many blocks: their changes add up like random ones."""
    return math.sqrt(SHALLOW / max(blocks, SHALLOW))


def add_gradients(
    model: nn.Module,
    teacher: nn.Module,
    batch: Sample,
    size: float | torch.Tensor,
    options: DistillOptions,
    pairs: Sequence[tuple[nn.Module, nn.Module]] = (),
) -> torch.Tensor:
    """Adds the gradient of a batch's loss to the model's parameters.

    The loss is the summed divergence / `size`, and `hidden_weight` times the distance of the blocks' outputs.

    Args:
        model, teacher: on one device.
        batch: model inputs, on any device.
        pairs: blocks of both whose outputs are compared.

    Returns:
        The summed divergence / `size`.
    """
    device = next(model.parameters()).device
    with arithmetic(device, options.precision):
        with outputs_of([own for own, _ in pairs]) as mine_hidden:
            student = _logits(model, batch)
        with torch.no_grad(), outputs_of([dense for _, dense in pairs]) as their_hidden:
            target = _logits(teacher, batch)
            real = _real_positions(batch, student)
            gradient = torch.empty_like(student)
            loss = torch.zeros((), device=device)
            for row in range(len(student)):  # FP32 copies of all logits could be larger than the model
                mine = F.log_softmax(student[row].float(), -1)
                theirs = F.log_softmax(target[row].float(), -1)
                divergence, slope = theirs.exp() * (theirs - mine), mine.exp() - theirs.exp()
                if real is not None:
                    divergence, slope = divergence * real[row][:, None], slope * real[row][:, None]
                loss += divergence.sum() / size
                gradient[row] = slope / size
            count = student.shape[:-1].numel() if real is None else real.sum()
        outputs = zip(mine_hidden, their_hidden, strict=True)
        distances = [hidden_distance(*each, real) for each in outputs if each[0] is not None and each[1] is not None]
        if distances:
            hidden = options.hidden_weight * torch.stack(distances).mean() * count / size
            torch.autograd.backward([student, hidden], [gradient, None])
        else:
            student.backward(gradient)
    return loss


def block_pairs(model: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The blocks of a model and those of the same names in its dense model."""
    mine, theirs = find_blocks(model), find_blocks(teacher)
    return [(block, theirs[name]) for name, block in mine.items() if name in theirs]


@contextmanager
def outputs_of(blocks: list[nn.Module]) -> Iterator[list[torch.Tensor | None]]:
    """A list that gets the hidden states that each block returns inside; None for a block that is not called."""
    found: list[torch.Tensor | None] = [None] * len(blocks)

    def note(index: int) -> Callable:
        def hook(block: nn.Module, args: tuple, output: Any) -> None:
            found[index] = first_tensor(output)

        return hook

    handles = [block.register_forward_hook(note(index)) for index, block in enumerate(blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def hidden_distance(mine: torch.Tensor, theirs: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The mean over positions of |mine - theirs|^2 / |theirs|^2.

    Args:
        mine, theirs: hidden states (..., width).
        real: (rows, length) bool, the positions that count; None for all.
    """
    mine, theirs = mine.float(), theirs.float()
    least = torch.finfo(torch.float32).tiny
    share = (mine - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=least)
    if real is not None and real.shape == share.shape:
        return (share * real).sum() / real.sum()
    return share.mean()


@torch.no_grad()
def _divergence(model, teacher, batches: list[Sample], options: DistillOptions, device: torch.device) -> torch.Tensor:
    """Summed over the predictions of the batches."""
    total = torch.zeros((), device=device, dtype=torch.float64)
    for batch in batches:
        with arithmetic(device, options.precision):
            student, target = (_logits(each, batch) for each in (model, teacher))
        real = _real_positions(batch, student)
        for row, (mine, theirs) in enumerate(zip(student, target, strict=True)):
            if real is not None:
                mine, theirs = mine[real[row]], theirs[real[row]]
            total += F.kl_div(
                F.log_softmax(mine.float(), -1),
                F.log_softmax(theirs.float(), -1),
                log_target=True,
                reduction="sum",
            )
    return total


@torch.no_grad()
def predictions(teacher: nn.Module, batches: list[Sample], options: DistillOptions) -> list[int]:
    """How many distributions the model predicts for each batch: one a token, a row or a patch, but none for padding."""
    device, per_row, counts = next(teacher.parameters()).device, {}, []
    for batch in batches:
        kind = tuple((key, tensor.shape[1:]) for key, tensor in batch.items())
        if kind not in per_row or _is_padded(batch):
            sample = batch if _is_padded(batch) else first_row(batch)
            with arithmetic(device, options.precision):
                logits = _logits(teacher, sample)
            real = _real_positions(sample, logits)
            per_row[kind] = logits.shape[:-1].numel() / rows(sample) if real is None else int(real.sum()) / rows(sample)
        counts.append(round(per_row[kind] * rows(batch)))
    return counts


def _is_padded(batch: Sample) -> bool:
    return any(key in batch and not bool(batch[key].all()) for key in MASKS)


def _real_positions(batch: Sample, logits: torch.Tensor) -> torch.Tensor | None:
    """(rows, length) bool: the positions of logits (rows, length, vocabulary) that are no padding; None for all."""
    for key in reversed(MASKS):  # the logits are the decoder's
        mask = batch.get(key)
        if mask is not None and mask.shape == logits.shape[:2] and logits.ndim == 3:
            return mask.bool().to(logits.device)
    return None


@torch.no_grad()
def takes_batches(model: nn.Module, sample: Sample) -> bool:
    """Whether a model predicts for several samples at a time. Classifiers without a padding token refuse it."""
    try:
        _logits(model, {key: torch.cat([tensor, tensor]) for key, tensor in sample.items()})
    except ValueError:
        return False
    return True


def _logits(model: nn.Module, batch: Sample) -> torch.Tensor:
    return model(**model_inputs(model, batch)).logits


def _steps(batches: list[Sample], counts: list[int], samples: int, world: World) -> list[list[Sample]]:
    """Batches grouped into steps of at least the predictions of so many long samples. The last may have fewer."""
    longest = max((count // rows(batch) for batch, count in zip(batches, counts, strict=True)), default=0)
    least = samples * max(world.objects(longest))
    return [[batches[index] for index in group] for group in shared_steps(counts, least, world)]


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, blocks recompute their activations. transformers' own switch does nothing in eval mode."""
    blocks = list(find_blocks(model).values()) if wanted else []
    recomputing = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with instance_forwards(blocks, lambda _, forward: partial(recomputing, forward)):
        yield
