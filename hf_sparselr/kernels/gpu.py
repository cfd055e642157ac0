"""The product on a GPU: selects a kernel, and keeps it ready for its weights."""

import contextlib
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .autotune import choose, known
from .bindings import Binding, binding_of
from .cuda import small_batch, vector, wgmma
from .cuda.bitmask import bind_bitmask, supports_bitmask
from .cuda.medium_batch import bind_tiles, supports_tiles
from .cuda.nvrtc import CompileError
from .cuda.wgmma import supports_wgmma
from .launch import drives
from .launch_config import (
    FEW_ROWS,
    VECTOR,
    LaunchConfig,
    bitmask_config,
    bucket,
    candidates,
    row_key,
    takes_bitmask,
    takes_vector,
    takes_wide,
    wide_config,
)
from .measured import measured
from .packed_weight import PackedWeight, check_count
from .program import Program, merge
from .reference import no_product
from .support_index import index_of
from .triton import unpack
from .triton.decode import bind_decode, kind_of
from .triton.medium_batch import bind_medium_batch
from .triton.unpack import bind_densify
from .triton.unpack_then_gemm import bind_gradient, bind_unpacked

logger = logging.getLogger(__name__)

_BINDERS = {
    "gemv": bind_decode,
    "small_batch": bind_decode,
    "mma": small_batch.bind_mma,
    "tiles": bind_tiles,
    "wgmma": wgmma.bind_wgmma,
    "bitmask": bind_bitmask,
    "vector": vector.bind_vector,
    "medium_batch": bind_medium_batch,
    "unpack_then_gemm": bind_unpacked,
}


def multiply(
    inputs: torch.Tensor, weights: Sequence[PackedWeight], binding: Binding, kernel: str
) -> list[torch.Tensor]:
    """x S^T + (x A^T) B^T + bias of every weight; weights that are alike share a launch.

    Each comes out as it would alone: weights whose sums differ in order do not share one. To the bit, but for "wgmma",
    which several weights have summed in other parts.

    Args:
        inputs: x (..., in).
        binding: of the weights, with their ready kernels.
        kernel: "auto" or "packed".
    """
    rows = inputs.numel() // binding.in_features if binding.in_features else 0
    program = binding.products.get((row_key(rows), kernel))
    if program is None or binding.device != torch._C._cuda_getDevice():
        return _first(inputs, rows, weights, binding, kernel)
    return program(ready(inputs), rows, weights)


def ready(inputs: torch.Tensor) -> torch.Tensor:
    """x as kernels read it: contiguous, at an address that wide loads take."""
    if inputs.is_contiguous() and inputs.data_ptr() % 16 == 0:
        return inputs
    return inputs.clone(memory_format=torch.contiguous_format)


def _first(
    inputs: torch.Tensor,
    rows: int,
    weights: Sequence[PackedWeight],
    binding: Binding,
    kernel: str,
) -> list[torch.Tensor]:
    if rows == 0 or not all(weight.out_features for weight in weights) or not inputs.shape[-1]:
        return [no_product(inputs, weight) for weight in weights]
    with _on_device_of(inputs):
        plain = [weight.contiguous() for weight in weights]
        program = bind(ready(inputs), rows, plain, kernel)
        kept = drives() and all(a is b for a, b in zip(plain, weights, strict=True))
        if kept and not torch.cuda.is_current_stream_capturing():  # where nothing could be measured
            binding.products[row_key(rows), kernel] = program
        return program(ready(inputs), rows, plain)


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def bind(
    inputs: torch.Tensor, rows: int, weights: Sequence[PackedWeight], kernel: str, measures: bool = True
) -> Program:
    """The product of these weights with so many rows, or up to the next power of two from 33 on.

    Args:
        measures: whether the fastest kernel may be measured, by x.

    Raises:
        ValueError: a mask that keeps another number of values than there are.
    """
    for _ in _BINDERS:  # without those that NVRTC refuses, one after the other
        with contextlib.suppress(CompileError):
            return _bind(inputs, rows, weights, kernel, measures)
    return _bind(inputs, rows, weights, kernel, measures)


def _bind(inputs: torch.Tensor, rows: int, weights: Sequence[PackedWeight], kernel: str, measures: bool) -> Program:
    outs = sum(weight.out_features for weight in weights)
    configs = [select(inputs, rows, weight, kernel, measures, outs) for weight in weights]
    groups = defaultdict(list)
    for number, (weight, config) in enumerate(zip(weights, configs, strict=True)):
        alone = len(weights) == 1 or config.shares == 1
        groups[number if alone else (config.order, _kind_of(weight, config))].append(number)
    parts = []
    for numbers in groups.values():
        largest = configs[max(numbers, key=lambda number: weights[number].out_features)]
        for first in range(0, len(numbers), largest.shares):
            some = numbers[first : first + largest.shares]
            parts.append((some, run(rows, [weights[number] for number in some], largest)))
    return parts[0][1] if len(parts) == 1 else merge(parts)


def _kind_of(weight: PackedWeight, config: LaunchConfig) -> tuple:
    """The properties that weights must share to share a launch."""
    if config.kernel in ("mma", "vector"):
        kind = small_batch.kind_of if config.kernel == "mma" else vector.kind_of
        return kind(weight, index_of(weight.mask, weight.in_features))
    if config.kernel == "wgmma":
        return wgmma.kind_of(weight)
    return kind_of(weight)


def run(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """The product of these weights by one configuration.

    Raises:
        CompileError: NVRTC refuses its source, which `select` does not choose again on this device.
    """
    for weight in weights:
        check_count(weight, index_of(weight.mask, weight.in_features).nonzeros)
    try:
        return _BINDERS[config.kernel](rows, weights, config)
    except CompileError as error:
        device = weights[0].values.device
        if (config.kernel, device) not in _REFUSED:
            _REFUSED.add((config.kernel, device))
            logger.warning('packed layers run without the kernel "%s", by slower ones: %s', config.kernel, error)
        raise


_REFUSED: set[tuple[str, torch.device]] = set()  # kernels that cannot be compiled, as NVRTC is older, say


def select(
    inputs: torch.Tensor,
    rows: int,
    weight: PackedWeight,
    kernel: str,
    measures: bool = True,
    together: int | None = None,
) -> LaunchConfig:
    """The fastest configuration for a weight: known, measured on such cards before, or measured now.

    Args:
        measures: whether it may be measured.
        together: rows of S of all weights that share x; None: of this one.
    """
    index = index_of(weight.mask, weight.in_features)
    native = small_batch.supports(weight, index)
    outs, ins, device = weight.out_features, weight.in_features, weight.values.device
    refused = {name for name, where in _REFUSED if where == device}
    if native and "wgmma" not in refused and supports_wgmma(weight):
        size = together or outs, ins, _multiprocessors(inputs)
        if takes_wide(rows, *size):
            return wide_config(bucket(rows), *size)
    other = native and not index.pairs
    if other and "vector" not in refused and takes_vector(rows, outs, ins) and vector.supports_vector(weight):
        return VECTOR
    if other and "bitmask" not in refused and takes_bitmask(rows, outs, ins) and supports_bitmask(weight):
        return bitmask_config(rows, outs, _multiprocessors(inputs))
    tiles = rows <= FEW_ROWS or not index.pairs or ("tiles" not in refused and supports_tiles(weight))
    native = native and "mma" not in refused and tiles
    options = candidates(rows, weight, index.pairs, native)
    if kernel == "packed" and rows <= FEW_ROWS:
        return options[0]
    capturing = inputs.is_cuda and torch.cuda.is_current_stream_capturing()
    config = known(rows, weight)
    if config is None and native:
        config = measured(rows, weight.out_features, index.pairs, inputs.device)
    if config is not None and (native or config.kernel not in ("mma", "tiles")):
        return config
    if capturing or not measures:  # nothing can be measured now
        return options[0]

    @functools.cache
    def bound(config: LaunchConfig) -> Program:
        return run(rows, [weight], config)

    return choose(rows, weight, options, lambda config: bound(config)(inputs, rows, [weight]))


def _multiprocessors(inputs: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(inputs.device).multi_processor_count


def input_gradient(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """grad (S + B A): (..., out) to (..., in).

    Raises:
        ValueError: a mask that keeps another number of values than there are.
    """
    plain, rows = weight.contiguous(), grad.numel() // max(1, grad.shape[-1])
    if not (rows and plain.out_features and plain.in_features):
        return grad.new_zeros((*grad.shape[:-1], plain.in_features))
    binding = binding_of((plain,))
    with _on_device_of(grad):
        program = _kept(binding, "gradient", bind_gradient, plain, weight)
        return program(ready(grad), rows, (plain,))[0]


def densify(weight: PackedWeight) -> torch.Tensor:
    """S + B A as a new tensor (out, in).

    Raises:
        ValueError: a mask that keeps another number of values than there are.
    """
    plain = weight.contiguous()
    binding = binding_of((plain,))
    with _on_device_of(weight.values):
        return unpack.densify(plain, _kept(binding, "densify", bind_densify, plain, weight))


def _kept(
    binding: Binding, name: str, bind: Callable[[PackedWeight], Any], plain: PackedWeight, weight: PackedWeight
) -> Any:
    """What a binding keeps under a name, bound at first use, after the number of values was checked.

    Args:
        plain: `weight`, contiguous. Of a copy nothing is kept.
    """
    found = getattr(binding, name)
    if found is None:
        check_count(plain, index_of(plain.mask, plain.in_features).nonzeros)
        found = bind(plain)
        if drives() and plain is weight:
            setattr(binding, name, found)
    return found
