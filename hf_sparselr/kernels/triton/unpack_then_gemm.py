"""x S^T + (x A^T) B^T + bias by a product that reads S dense, unpacked for the length of one call."""

from collections.abc import Sequence

from ..cuda.low_rank import factor_step
from ..launch_config import LaunchConfig
from ..packed_weight import PackedWeight
from ..program import Launch, Memory, Multiply, Part, Program, X, y
from .unpack import bind_densify


def bind_unpacked(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """The product of one weight: by S + B A where the configuration joins them, else by S, B and A."""
    (weight,) = weights
    outs, ins, rank = weight.out_features, weight.in_features, weight.rank
    bias = None if weight.bias is None else Part(0, "bias")
    memory, dense = Memory(weight.values.dtype, outs * ins), 3
    if config.joined or not rank:
        steps = Launch(bind_densify(weight), (dense,)), Multiply(y(0), X, dense, outs, ins, bias)
        return Program((outs,), (memory,), steps)
    beside = (
        factor_step(rows, weight, 4),
        Multiply(y(0), 4, Part(0, "B"), outs, rank, bias),
        Launch(bind_densify(weight._replace(A=None, B=None)), (dense,)),
        Multiply(y(0), X, dense, outs, ins, adds=True),  # y is read where the larger product waits anyway
    )
    return Program((outs,), (memory, Memory(weight.values.dtype, per_row=rank)), beside)


def bind_gradient(weight: PackedWeight) -> Program:
    """grad (S + B A) of one weight, which is not empty: (..., out) to (..., in), for any number of rows."""
    outs, ins, dense = weight.out_features, weight.in_features, 3
    steps = Launch(bind_densify(weight), (dense,)), Multiply(y(0), X, dense, ins, outs, straight=True)
    return Program((ins,), (Memory(weight.values.dtype, outs * ins),), steps)
