"""Distillation: a compressed model is trained against its dense self's logits, as a whole.

Minimises the Kullback-Leibler divergence KL(dense || compressed) of predicted distributions over the nonzeros of S,
the factors, the norms and the biases. Zeros stay zero. The dense model's logits are computed batch by batch beside
the compressed model's and never stored.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config.options import DistillOptions
from ..format.bitmask import unpack, unpack_mask
from ..format.decomposition import Decomposition
from ..nn.linear import SparseLRLinear, packed_layers
from ..utils.modules import eval_mode, named_tensors
from ..utils.precision import arithmetic
from .capture import instance_forwards, model_inputs
from .model_structure import find_stacks
from .training_loop import Groups, Training, group_batches, restore, snapshot, train
from .working_linear import WorkingLinear, trainable

PROBE_WINDOWS = 8  # on which the loss before and after is measured
BETAS = (0.9, 0.95)


def copy_sharing_blocks(model: nn.Module, stacks: dict[str, nn.ModuleList]) -> nn.Module:
    """A copy of a dense model, to distill from. Its blocks share their tensors with the model's: the pipeline replaces
    those and never edits them. The other tensors are its own."""
    blocks = [tensor for stack in stacks.values() for tensor in (*stack.parameters(), *stack.buffers())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in blocks})


def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: list[torch.Tensor],
    options: DistillOptions,
    seed: int,
    device: torch.device,
    on_pass: Callable[[float], None] = lambda loss: None,
) -> dict:
    """Trains a packed model in place; its tensors keep their dtypes, devices and support.

    Args:
        model: with `SparseLRLinear` layers.
        teacher: the dense model, `on_device`.
        batches: token ids (batch, length).
        seed: of the order of the steps.
        on_pass: called after every pass with its mean loss.

    Returns:
        losses (nats a prediction, one a pass), loss_before, loss_after (on the first batches), passes, seconds.
    """
    started = time.perf_counter()
    layers = packed_layers(model)
    dtypes = {name: tensor.dtype for name, tensor in named_tensors(model)}
    probe = batches[: max(1, PROBE_WINDOWS // len(batches[0]))]
    with _original_places(model), eval_mode(model), _checkpointing(model, options.checkpointing):
        try:
            groups = _unpack(model, layers, device, options)
            parameters = [parameter for group in groups.values() for parameter in group]
            start = snapshot(parameters)
            before = _mean_loss(model, teacher, probe, options, device)
            losses = _train(model, teacher, groups, batches, options, seed, on_pass).losses
            _round(model, dtypes)
            after = _mean_loss(model, teacher, probe, options, device)
            if not after < before:  # NaN included
                restore(parameters, start)
                after = before
        finally:
            _pack(model, layers)
    return {
        "losses": losses,
        "loss_before": before,
        "loss_after": after,
        "passes": len(losses),
        "seconds": time.perf_counter() - started,
    }


def _train(model, teacher, groups: Groups, batches, options: DistillOptions, seed: int, on_pass) -> Training:
    count = _predictions(teacher, batches[0], options)

    def size(step: list[torch.Tensor]) -> int:
        return sum(map(count, step))

    def backward(batch: torch.Tensor, size: int) -> torch.Tensor:
        return add_gradients(model, teacher, batch, size, options)

    steps = _steps(batches, options.batch_size)
    return train(model, groups, steps, size, backward, options, BETAS, seed, on_pass, keep_best=False)


def add_gradients(
    model: nn.Module, teacher: nn.Module, ids: torch.Tensor, size: int, options: DistillOptions
) -> torch.Tensor:
    """Adds the gradient of a batch's summed divergence / `size` to the model's parameters, and returns that quotient.

    Args:
        model, teacher: on one device.
        ids: (batch, length), on any device.
    """
    device = next(model.parameters()).device
    ids = ids.to(device)
    with arithmetic(device, options.precision):
        student = _logits(model, ids)
        with torch.no_grad():
            target = _logits(teacher, ids)
            gradient = torch.empty_like(student)
            loss = torch.zeros((), device=device)
            for row in range(len(ids)):  # FP32 copies of all logits could be larger than the model
                mine = F.log_softmax(student[row].float(), -1)
                theirs = F.log_softmax(target[row].float(), -1)
                loss += (theirs.exp() * (theirs - mine)).sum() / size
                gradient[row] = (mine.exp() - theirs.exp()) / size
        student.backward(gradient)
    return loss


@torch.no_grad()
def _mean_loss(model, teacher, batches, options: DistillOptions, device) -> float:
    total = torch.zeros((), device=device, dtype=torch.float64)
    for batch in batches:
        with arithmetic(device, options.precision):
            student, target = (_logits(each, batch.to(device)) for each in (model, teacher))
        for mine, theirs in zip(student, target, strict=True):
            total += F.kl_div(
                F.log_softmax(mine.float(), -1),
                F.log_softmax(theirs.float(), -1),
                log_target=True,
                reduction="sum",
            )
    return float(total) / sum(map(_predictions(teacher, batches[0], options), batches))


@torch.no_grad()
def _predictions(
    teacher: nn.Module, batch: torch.Tensor, options: DistillOptions
) -> Callable[[torch.Tensor], int]:
    """How many distributions a model predicts for a batch: one a token, or one a row (sequence classification)."""
    device = next(teacher.parameters()).device
    with arithmetic(device, options.precision):
        by_token = _logits(teacher, batch[:1].to(device)).ndim > 2
    return lambda batch: batch.numel() if by_token else len(batch)


@torch.no_grad()
def takes_batches(model: nn.Module, window: torch.Tensor) -> bool:
    """Whether a model predicts for several windows at a time. Classifiers without a padding token refuse it."""
    try:
        _logits(model, torch.stack([window, window]))
    except ValueError:
        return False
    return True


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(**model_inputs(model, ids)).logits


def _steps(batches: list[torch.Tensor], windows: int) -> list[list[torch.Tensor]]:
    """Batches grouped into steps of at least the tokens of `windows` long windows (the last may have fewer)."""
    tokens = windows * max(batch.shape[1] for batch in batches)
    groups = group_batches([batch.numel() for batch in batches], tokens)
    return [[batches[index] for index in group] for group in groups]


def _unpack(
    model: nn.Module, layers: dict[str, SparseLRLinear], device: torch.device, options: DistillOptions
) -> Groups:
    """Puts the model on the device with FP32 masters of what is trained, and returns these in groups."""
    if options.train == "all":
        for name, layer in layers.items():
            layer.to(device)
            mask = unpack_mask(layer.mask, layer.in_features)
            S = unpack(layer.mask, layer.values, layer.in_features)
            factors = (None, None) if layer.A is None else (layer.A.data, layer.B.data)
            model.set_submodule(name, WorkingLinear(Decomposition(S, mask, *factors), layer.bias))
    groups = trainable(model) if options.train == "all" else _without_sparse(model, layers)
    trained = {id(parameter) for group in groups.values() for parameter in group}
    for _, tensor in named_tensors(model):
        own = id(tensor) in trained
        dtype = torch.float32 if own else _frozen_dtype(tensor, options)
        tensor.data = tensor.data.to(
            device, dtype, copy=own
        )  # the tensors that the model came with stay as they are
    return groups


def _frozen_dtype(tensor: torch.Tensor, options: DistillOptions) -> torch.dtype:
    """FP32, except where memory is short and autocast takes BF16 as it is."""
    if options.train == "factors" and options.precision == "bf16" and tensor.dtype == torch.bfloat16:
        return tensor.dtype
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


@torch.no_grad()
def _round(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Rounds to the stored dtypes but stays FP32: the last loss is then that of the stored model."""
    for name, tensor in named_tensors(model):
        if tensor.is_floating_point():
            packed = f"{name.removesuffix('S')}values"
            tensor.copy_(tensor.to(dtypes[name if name in dtypes else packed]))


def _pack(model: nn.Module, layers: dict[str, SparseLRLinear]) -> None:
    for name, layer in layers.items():
        working = model.get_submodule(name)
        if working is layer:
            continue
        layer.values.data = working.S.detach()[working.mask]
        if layer.rank:
            layer.A.data, layer.B.data = working.A.detach(), working.B.detach()
        if layer.bias is not None:
            layer.bias.data = working.bias.detach()
        model.set_submodule(name, layer)


def _without_sparse(model: nn.Module, layers: dict[str, SparseLRLinear]) -> Groups:
    """The groups of `trainable` for a model whose S stays packed."""
    values = {id(layer.values) for layer in layers.values()}
    return {
        "factors": [f for layer in layers.values() if layer.rank for f in (layer.A, layer.B)],
        "vectors": [
            p for p in model.parameters() if p.ndim == 1 and p.is_floating_point() and id(p) not in values
        ],
    }


@contextmanager
def on_device(teacher: nn.Module, device: torch.device, options: DistillOptions) -> Iterator[None]:
    """Inside, the dense model is on the device, frozen, in the precision that distillation needs; then as it was."""
    before = [(tensor, tensor.data, tensor.requires_grad) for _, tensor in named_tensors(teacher)]
    with eval_mode(teacher):
        try:
            for tensor, data, _ in before:
                tensor.requires_grad_(False)
                tensor.data = data.to(device, _frozen_dtype(data, options))
            yield
        finally:
            for tensor, data, flag in before:
                tensor.data = data
                tensor.requires_grad_(flag)


@contextmanager
def _original_places(model: nn.Module) -> Iterator[None]:
    """After it, every tensor is where it was, in the dtype that it had."""
    places = [(tensor, tensor.device, tensor.dtype) for _, tensor in named_tensors(model)]
    try:
        yield
    finally:
        for tensor, device, dtype in places:
            tensor.data = tensor.data.to(device, dtype)


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, blocks recompute their activations. transformers' own switch does nothing in eval mode."""
    blocks = [block for stack in find_stacks(model).values() for block in stack] if wanted else []
    recomputing = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with instance_forwards(blocks, lambda _, forward: partial(recomputing, forward)):
        yield
