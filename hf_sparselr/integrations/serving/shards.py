"""The packed layers behind one merged layer of an engine, loaded in the slices that a rank of tensor parallelism needs.

Rows of a layer (column parallel) are rows of mask, values and B; A is whole. Columns (row parallel) are columns of
mask, values and A; B is whole, and the outputs of the ranks add up to the layer's.
"""

import logging
from collections.abc import Callable, Hashable

import torch
from torch import nn

from ...format.bitmask import pack_mask, unpack_mask
from ...format.checkpoint import SENTINEL, FormatError
from ...format.slicing import take_columns, take_rows
from .operator import merged_linear, warm_up

logger = logging.getLogger(__name__)

PARTS = ("mask", "values", "A", "B", SENTINEL)

Loader = Callable[..., None]


class PackedShards(nn.Module):
    """Packed layers that take one input, one below the other: (sum of outs, in) on this rank.

    Args:
        name: of the merged layer, for messages.
        shape: (out, in) on this rank.
        all_inputs: `in` of the whole layer.
        loader: the engine's loader of a dense weight of the merged layer, called with (parameter, tensor) or, for a
            layer merged with others, (parameter, tensor, shard). It copies the part that this rank keeps, along the
            dimension that the parameter's `output_dim` or `input_dim` names. Given row numbers as the weight it tells
            which rows this rank keeps, for any class of layer.
        dtype, device: of the values in memory.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        all_inputs: int,
        loader: Loader,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.name = name
        self.out_features, self.in_features = shape
        self.all_inputs = all_inputs
        self.dtype = dtype
        self.device = device
        self.count = 0  # of layers, known once they are loaded
        self._loader = loader
        # By shard: a whole mask or values that wait for the other, and this rank's slices.
        self._waiting: dict[Hashable, dict[str, torch.Tensor]] = {}
        self._kept: dict[Hashable, dict[str, torch.Tensor]] = {}
        self._places: dict[Hashable, range] = {}  # the rows of a layer in the merged one

    # -- loading

    @torch.no_grad()
    def load(self, part: str, tensor: torch.Tensor, shard: Hashable = None) -> None:
        """Takes one tensor of the checkpoint and keeps this rank's slice of it.

        Args:
            part: one of PARTS. A `weight` with elements is a dense layer beside packed ones: it gets a full mask.
            tensor: as in the file.
            shard: the engine's id of the layer within the merged one; None if the file holds the merged layer.

        Raises:
            FormatError: shapes do not fit, or the mask does not keep as many values as there are.
        """
        with torch.device("cpu"):  # engines load in a context of their device
            if part == SENTINEL:
                if tensor.numel():
                    self._load_dense(tensor.cpu(), shard)
            elif part in ("A", "B"):
                self._load_factor(part, tensor, shard)
            else:
                waiting = self._waiting.setdefault(shard, {})
                waiting[part] = tensor.cpu()
                if len(waiting) == 2:
                    self._load_support(shard, **self._waiting.pop(shard))

    def _load_factor(self, part: str, tensor: torch.Tensor, shard: Hashable) -> None:
        if part == "B":
            return self._keep(shard, B=tensor[self._rows(len(tensor), shard)])
        if tensor.shape[1] != self.all_inputs:
            raise FormatError(f"{self._where(shard)}: A has {tensor.shape[1]} columns, expected {self.all_inputs}")
        return self._keep(shard, A=tensor[:, self._columns()])

    def _load_support(self, shard: Hashable, mask: torch.Tensor, values: torch.Tensor) -> None:
        kept = int(unpack_mask(mask, 8 * mask.shape[1]).sum())
        if mask.shape[1] != -(-self.all_inputs // 8) or kept != len(values):
            raise FormatError(
                f"{self._where(shard)}: a mask of {mask.shape[1]} bytes a row that keeps {kept} values, for "
                f"{self.all_inputs} inputs and {len(values)} values"
            )
        if self.in_features == self.all_inputs:
            mask, values = take_rows(mask, values, self._rows(len(mask), shard))
        else:
            self._rows(len(mask), shard)
            columns = self._columns()
            mask, values = take_columns(mask, values, columns.start, columns.stop)
        self._keep(shard, mask=mask, values=values)

    def _load_dense(self, weight: torch.Tensor, shard: Hashable) -> None:
        logger.warning("%s is dense, but merged with packed layers: it runs with a full mask", self._where(shard))
        self._load_support(shard, pack_mask(torch.ones_like(weight, dtype=torch.bool)), weight.reshape(-1))

    def _keep(self, shard: Hashable, **parts: torch.Tensor) -> None:
        for part, tensor in parts.items():
            dtype = tensor.dtype if part == "mask" else self.dtype
            # A copy: a slice of a mapped file would keep all of it in memory.
            self._kept.setdefault(shard, {})[part] = tensor.to(self.device, dtype, copy=True).contiguous()

    def _rows(self, count: int, shard: Hashable) -> torch.Tensor:
        """Which of a layer's `count` rows this rank keeps: int64 (n,)."""
        if self.in_features != self.all_inputs:  # row parallel
            self._places[shard] = range(count)
            return torch.arange(count)
        numbers = nn.Parameter(torch.full((self.out_features,), -1), requires_grad=False)
        numbers.output_dim = 0
        self._loader(numbers, torch.arange(count), *(() if shard is None else (shard,)))
        places = (numbers >= 0).nonzero().flatten()
        self._places[shard] = range(int(places[0]), int(places[-1]) + 1)
        return numbers.data[places]

    def _columns(self) -> slice:
        if self.in_features == self.all_inputs:
            return slice(0, self.all_inputs)
        numbers = nn.Parameter(torch.full((self.in_features,), -1), requires_grad=False)
        numbers.input_dim = 0
        self._loader(numbers, torch.arange(self.all_inputs))
        start = int(numbers[0])
        if not torch.equal(numbers.data, torch.arange(start, start + self.in_features)):
            raise ValueError(f"{self.name}: its {self.all_inputs} inputs cannot be split evenly over the ranks")
        return slice(start, start + self.in_features)

    def _where(self, shard: Hashable) -> str:
        return self.name if shard is None else f"{self.name} ({shard})"

    # -- running

    @torch.no_grad()
    def finish(self, bias: torch.Tensor | None = None) -> None:
        """Makes parameters of the loaded slices, and makes kernels ready for them.

        Args:
            bias: that the merged layer has, on this rank.

        Raises:
            FormatError: a tensor or a layer is missing.
        """
        for shard, parts in self._kept.items():
            missing = [part for part in ("mask", "values") if part not in parts]
            missing += [part for part, other in (("A", "B"), ("B", "A")) if other in parts and part not in parts]
            if missing:
                raise FormatError(f"{self._where(shard)}: the checkpoint lacks its {' and '.join(missing)}")
        order = sorted(self._kept, key=lambda shard: self._places[shard].start)
        rows = [row for shard in order for row in self._places[shard]]
        if rows != list(range(self.out_features)):
            found = ", ".join(map(str, order)) or "nothing"
            raise FormatError(
                f"{self.name}: the checkpoint holds {len(rows)} of its {self.out_features} rows (loaded: {found})"
            )
        for number, shard in enumerate(order):
            for part, tensor in self._kept[shard].items():
                self.register_parameter(f"{part}_{number}", nn.Parameter(tensor, requires_grad=False))
        self.count = len(order)
        self._kept.clear()
        warm_up(*self.tensors(), bias, self.in_features)

    def tensors(self) -> tuple[list, list, list, list]:
        """(masks, values, As, Bs) of the layers, from top to bottom."""
        return tuple(
            [getattr(self, f"{part}_{number}", None) for number in range(self.count)]
            for part in ("mask", "values", "A", "B")
        )

    def forward(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., in) to (..., out)."""
        return merged_linear(inputs, *self.tensors(), bias, self.in_features)
