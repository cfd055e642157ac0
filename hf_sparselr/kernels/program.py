"""A product as a short list of steps, which Python runs, or C without Python in between (`fast_calls`).

Steps name what they read and write by slots: `ROWS`, the number of rows of x; `X`, x; `y(i)`, the result of weight i;
after the results, memory for the length of a call. A program holds addresses of weights, not their memory.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from .launch import COUNTERS, DriverLaunch, TritonLaunch, scratch
from .packed_weight import PackedWeight

ROWS, X = 0, 1
_MOST_ARGUMENTS = 256  # of a launch by C


def y(number: int) -> int:
    """The slot of a weight's result."""
    return 2 + number


class Memory(NamedTuple):
    """Memory for the length of a call.

    Attributes:
        dtype: of its entries.
        fixed, per_row: entries, and more for each row of x.
        shared: the stream's scratch memory, which its launches use one after the other; `fixed` entries of 4 bytes. In
            Python only where the program has one step: between two, another thread may use the stream.
        counters: the part of that which is zero between launches.
    """

    dtype: torch.dtype
    fixed: int = 0
    per_row: int = 0
    shared: bool = False
    counters: bool = False


class PerRows(NamedTuple):
    """A size of a grid that grows with the rows of x: ceil(rows * times / over)."""

    times: int
    over: int

    def at(self, rows: int) -> int:
        return -(-rows * self.times // self.over)


class Part(NamedTuple):
    """A tensor of a weight: "A", "B" or "bias"."""

    weight: int
    name: str

    def of(self, weights: Sequence[PackedWeight]) -> torch.Tensor:
        return getattr(weights[self.weight], self.name)


class Step(Protocol):
    """Something to enqueue on the current stream."""

    def run(self, slots: list[Any], weights: Sequence[PackedWeight]) -> None: ...

    def moved(self, slot: Callable[[int], int], weight: Callable[[int], int]) -> "Step":
        """The same step of a program with other slots and weights."""
        ...

    def words(self, weights: Sequence[PackedWeight]) -> list[int] | None:
        """As `fast_calls.c` reads it; None if it cannot."""
        ...


@dataclass(frozen=True)
class Launch:
    """A kernel launch.

    Attributes:
        slots: for each `Varying` of the launch.
        grid: None: that of the launch.
    """

    launch: DriverLaunch | TritonLaunch
    slots: tuple[int, ...]
    grid: tuple[int | PerRows, int | PerRows, int | PerRows] | None = None

    def run(self, slots: list[Any], weights: Sequence[PackedWeight]) -> None:
        grid = self.grid and tuple(n if isinstance(n, int) else n.at(slots[ROWS]) for n in self.grid)
        self.launch(*(slots[slot] for slot in self.slots), grid=grid)

    def moved(self, slot: Callable[[int], int], weight: Callable[[int], int]) -> "Launch":
        return replace(self, slots=tuple(map(slot, self.slots)))

    def words(self, weights: Sequence[PackedWeight]) -> list[int] | None:
        launch = self.launch if isinstance(self.launch, DriverLaunch) else self.launch.bound
        if launch is None or len(launch.content[5]) > _MOST_ARGUMENTS:
            return None
        function, grid, block, shared, overlaps, arguments, places = launch.content
        slot_of = dict(zip(places, self.slots, strict=True))
        sizes = [(0, 1, n) if isinstance(n, int) else (*n, 0) for n in self.grid or grid]
        given = [(slot_of.get(place, -1), value) for place, value in enumerate(arguments)]
        return [0, function, block, shared, overlaps, *sum(sizes, ()), len(given), *sum(given, ())]


class Joint(Launch):
    """A launch that reads only x and weights: those of merged programs come first, in fewer launches."""

    def joined(self, launches: Sequence["Joint"]) -> list["Joint"]:
        """As few launches as do the same.

        Args:
            launches: of the same x, this one among them.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Multiply:
    """out (rows, n) = left (rows, k) @ right (n, k)^T, + bias (n,) or + out, by cuBLAS.

    Attributes:
        right: a slot, or a tensor of a weight.
        adds: to what `out` holds.
        straight: right is (k, n), and not transposed.
    """

    out: int
    left: int
    right: int | Part
    n: int
    k: int
    bias: Part | None = None
    adds: bool = False
    straight: bool = False

    def run(self, slots: list[Any], weights: Sequence[PackedWeight]) -> None:
        rows = slots[ROWS]
        left, out = _matrix(slots[self.left], rows, self.k), _matrix(slots[self.out], rows, self.n)
        held = isinstance(self.right, Part)
        shape = (self.k, self.n) if self.straight else (self.n, self.k)
        right = self.right.of(weights) if held else _matrix(slots[self.right], *shape)
        right = right if self.straight else right.T
        if self.adds:
            out.addmm_(left, right)
        elif self.bias is not None:
            torch.addmm(self.bias.of(weights), left, right, out=out)
        else:
            torch.mm(left, right, out=out)

    def moved(self, slot: Callable[[int], int], weight: Callable[[int], int]) -> "Multiply":
        right = Part(weight(self.right.weight), self.right.name) if isinstance(self.right, Part) else slot(self.right)
        bias = None if self.bias is None else Part(weight(self.bias.weight), self.bias.name)
        return replace(self, out=slot(self.out), left=slot(self.left), right=right, bias=bias)

    def words(self, weights: Sequence[PackedWeight]) -> list[int] | None:
        held = isinstance(self.right, Part)
        right = (-1, self.right.of(weights).data_ptr()) if held else (self.right, 0)
        bias = 0 if self.bias is None else self.bias.of(weights).data_ptr()
        return [1, self.out, self.left, *right, self.n, self.k, bias, self.adds, self.straight]


def _matrix(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The start of a contiguous tensor."""
    return tensor.view(-1)[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class Program:
    """Enqueues the product of some weights.

    Attributes:
        outs: of each weight.
        memories: what steps use beside x, the results and the weights.
        steps: in order.
        captured: takes its place while a CUDA graph is captured, or None.
    """

    outs: tuple[int, ...]
    memories: tuple[Memory, ...]
    steps: tuple[Step, ...]
    captured: "Program | None" = None

    def __call__(self, inputs: torch.Tensor, rows: int, weights: Sequence[PackedWeight]) -> list[torch.Tensor]:
        """x (..., in), contiguous, to (..., out) of each weight."""
        if self.captured is not None and inputs.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.captured(inputs, rows, weights)
        ys = [inputs.new_empty((*inputs.shape[:-1], out)) for out in self.outs]
        slots = [rows, inputs, *ys, *self._memory(inputs, rows)]
        for step in self.steps:
            step.run(slots, weights)
        return ys

    def _memory(self, inputs: torch.Tensor, rows: int) -> list[Any]:
        size = sum(4 * memory.fixed for memory in self.memories if memory.shared)
        start = scratch(inputs.get_device(), COUNTERS + size) if size and self._takes_addresses else None
        slots, place = [], COUNTERS
        for dtype, fixed, per_row, shared, counters in self.memories:
            if counters and start is not None:
                slots.append(start)
            elif shared and start is not None and len(self.steps) == 1:
                slots.append(start + place)
                place += 4 * fixed
            else:
                slots.append(torch.empty(fixed + per_row * rows, dtype=dtype, device=inputs.device))
        return slots

    @property
    def _takes_addresses(self) -> bool:
        return all(step.launch.takes_addresses for step in self.steps if isinstance(step, Launch))

    def words(self, weights: Sequence[PackedWeight]) -> list[int] | None:
        """As `fast_calls.c` reads it; None if a step is not for C."""
        steps = [step.words(weights) for step in self.steps]
        known = [words for words in steps if words is not None]
        if len(known) < len(steps):
            return None
        words, place = [len(self.outs), len(self.memories)], COUNTERS
        for dtype, fixed, per_row, shared, counters in self.memories:
            if counters or shared:
                words += [1, 0 if counters else place, 0 if counters else place + 4 * fixed]
                place += 0 if counters else 4 * fixed
            else:
                words += [0, fixed * dtype.itemsize, per_row * dtype.itemsize]
        return [*words, len(steps), *itertools.chain(*known)]


def merge(parts: Sequence[tuple[list[int], Program]]) -> Program:
    """One program of several, each for the weights of these numbers."""
    count = sum(len(numbers) for numbers, _ in parts)
    outs, memories, steps = [0] * count, [], []
    for numbers, part in parts:
        early = {slot - 2 - len(numbers) for step in part.steps if isinstance(step, Joint) for slot in step.slots}
        places = _add_memories(memories, part.memories, early)

        def slot(old: int, numbers: list[int] = numbers, places: list[int] = places) -> int:
            if old < 2:
                return old
            number = old - 2 - len(numbers)
            return y(numbers[old - 2]) if number < 0 else 2 + count + places[number]

        for number, out in zip(numbers, part.outs, strict=True):
            outs[number] = out
        steps += [step.moved(slot, numbers.__getitem__) for step in part.steps]
    captured = None
    if any(part.captured for _, part in parts):
        captured = merge([(numbers, part.captured or part) for numbers, part in parts])
    return Program(tuple(outs), tuple(memories), with_joined(steps), captured)


def with_joined(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The same steps, those that can be joined first."""
    first = [step for step in steps if isinstance(step, Joint)]
    joined = first[0].joined(first) if first else []
    return *joined, *(step for step in steps if not isinstance(step, Joint))


def _add_memories(memories: list[Memory], more: Sequence[Memory], early: set[int]) -> list[int]:
    """Places for those of one more part, which takes those of the parts before it where they are of one kind.

    Args:
        early: those that are written before the parts before it run, by number.
    """
    places: list[int] = []
    for number, memory in enumerate(more):
        alike = (
            i
            for i, other in enumerate(memories)
            if number not in early
            and i not in places
            and other._replace(fixed=0, per_row=0) == memory._replace(fixed=0, per_row=0)
        )
        place = next(alike, len(memories))
        if place == len(memories):
            memories.append(memory)
        old = memories[place]
        memories[place] = old._replace(fixed=max(old.fixed, memory.fixed), per_row=max(old.per_row, memory.per_row))
        places.append(place)
    return places
