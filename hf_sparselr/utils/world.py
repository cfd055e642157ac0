"""The processes that do one piece of work together, through torch.distributed."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes that share the work. Every one of them calls every method, in the same order.

    Tensors are on the compute device. Sums are the same bits in every process. With one process nothing is sent.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_default_group(cls) -> "World":
        """All processes of the default process group, which is initialised."""
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces a contiguous tensor by its sum over all processes, and returns it."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def total(self, value: torch.Tensor | float, device: torch.device) -> float:
        """The sum of a number over all processes, in FP64."""
        if self.size == 1:
            return float(value)
        return float(self.sum_(torch.as_tensor(value, dtype=torch.float64, device=device).clone()))

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item, from the one at `rank` on."""
        return list(items[self.rank :: self.size])

    def rows(self, count: int, rank: int | None = None) -> slice:
        """The rows of a matrix of `count` that a process, by default this one, works on: a contiguous part."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def all_rows(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """The whole matrix (count, ...) from the `rows` of all processes."""
        if self.size == 1:
            return own
        most = -(-count // self.size)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        gathered = own.new_empty(self.size * most, *own.shape[1:])
        distributed.all_gather_into_tensor(gathered, padded)
        parts = gathered.split(most)
        lengths = [self.rows(count, rank).stop - self.rows(count, rank).start for rank in range(self.size)]
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def copy_of(self, value: T, source: int, device: torch.device) -> T:
        """The value of one process, which can be pickled. Tensors in it are on the device and not pickled."""
        if self.size == 1:
            return value
        packed = _pack(value, device) if self.rank == source else None
        sent: list[Any] = [packed and (packed[0], [(tensor.shape, tensor.dtype) for tensor in packed[1]])]
        distributed.broadcast_object_list(sent, source)
        data, kinds = sent[0]
        tensors = packed[1] if packed else [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]
        for tensor in tensors:
            distributed.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, source)
        return value if self.rank == source else _Unpickler(data, tensors).load()

    def objects(self, value: T) -> list[T]:
        """The values, which can be pickled, of all processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def of_first(self, value: T) -> T:
        """The value, which can be pickled, of the first process."""
        if self.size == 1:
            return value
        values = [value if self.first else None]
        distributed.broadcast_object_list(values, 0)
        return values[0]

    def wait(self) -> None:
        """Returns when all processes have called it."""
        self.objects(None)

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in some process."""
        return any(self.objects(flag))


def _pack(value: Any, device: torch.device) -> tuple[bytes, list[torch.Tensor]]:
    """A pickled value without its tensors, and these on a device."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), [tensor.to(device) for tensor in pickler.tensors]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value.contiguous())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensors = tensors

    def persistent_load(self, index: int) -> torch.Tensor:
        return self._tensors[index]


ALONE = World()
