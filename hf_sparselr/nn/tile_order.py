"""Mask and values of a packed layer in the order of tiles, which nobody else sees."""

import logging
import sys
import threading
from typing import Any

import torch
from torch import nn

from ..kernels.tile_order import packed_from_tiles, packed_to_tiles

logger = logging.getLogger(__name__)

MOST_RETURNS = 4  # to the order of rows, after which a layer stays there
_PAIR = ("mask", "values")
_SWAPPING = threading.RLock()  # parameters and their order change together


class TileOrdered(nn.Module):
    """A module with the parameters `mask` and `values`, which its own calls may put into the order of tiles.

    Only `own_parameters` shows that. Whoever asks for parameters otherwise, by name, by iterating over those of a
    model, for a copy or a file, gets rows: they are put back first. Tensors are replaced, not written: what others hold
    of them stays as it is, and where others hold the parameters themselves the order does not change.

    Attributes:
        in_features: in.
        is_tiled: whether mask and values are in the order of tiles.
        may_be_tiled: whether calls may change the order.
    """

    in_features: int
    may_be_tiled = False
    is_tiled = False
    _returns = 0
    _is_captured = False
    _captured: tuple[nn.Parameter, ...] = ()

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        if self.is_tiled and not torch.compiler.is_compiling():
            self.to_rows()
        return vars(self)["_parameters"]

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        vars(self)["_parameters"] = parameters

    def __getattr__(self, name: str) -> Any:
        if name in _PAIR and self.is_tiled and not torch.compiler.is_compiling():
            self.to_rows()
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if self.is_tiled and name in vars(self)["_parameters"] and name not in _PAIR:
            vars(self)["_parameters"][name] = param  # as torch does, which would ask for all of them
        else:
            super().register_parameter(name, param)

    def own_parameters(self) -> tuple[dict[str, nn.Parameter | None], bool]:
        """Those of the module as they are, and `is_tiled`."""
        with _SWAPPING:
            return vars(self)["_parameters"].copy(), self.is_tiled

    def to_tiles(self) -> None:
        """Puts mask and values into the order of tiles, unless they are, or others hold them."""
        with _SWAPPING:
            if not self.is_tiled and self.is_free_to_tile():
                self._reorder(True)

    def is_free_to_tile(self) -> bool:
        """Whether nobody else holds mask and values, and nothing else speaks against another order."""
        if self._is_captured or self._returns > MOST_RETURNS:
            return False
        return all(_is_free(vars(self)["_parameters"].get(name)) for name in _PAIR)

    def to_rows(self) -> None:
        """Puts mask and values back into the order of rows, if they are not."""
        with _SWAPPING:
            if not self.is_tiled:
                return
            if self._is_captured:
                # The graph goes on reading them.
                self._captured += tuple(vars(self)["_parameters"][name] for name in _PAIR)
                logger.warning(
                    "the values of a packed layer were asked for after a CUDA graph of it was captured: the graph "
                    "keeps the values it has, in memory of its own"
                )
            vars(self)["_returns"] = self._returns + 1
            self._reorder(False)

    def note_capture(self) -> bool:
        """Whether a CUDA graph is being captured, which goes on reading the parameters where they are."""
        values = vars(self)["_parameters"].get("values")
        if values is None or not values.is_cuda or not torch.cuda.is_current_stream_capturing():
            return False
        vars(self)["_is_captured"] = True
        return True

    def _reorder(self, tiled: bool) -> None:
        own = vars(self)["_parameters"]
        old = [own[name] for name in _PAIR]
        reorder = packed_to_tiles if tiled else packed_from_tiles
        with torch.inference_mode(False), torch.no_grad():
            new = [nn.Parameter(t, requires_grad=False) for t in reorder(*(p.detach() for p in old), self.in_features)]
        for before, after in zip(old, new, strict=True):
            vars(after).update(vars(before))
        _wait(new[0])  # other streams may read the new ones
        with _SWAPPING:
            own.update(zip(_PAIR, new, strict=True))
            vars(self)["is_tiled"] = tiled
            self._forget_calls()
        _wait(new[0])  # and may still read the old ones, whose memory is free now

    def _forget_calls(self) -> None:
        """Drops what was made ready for these parameters."""
        raise NotImplementedError


def _is_free(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter, given by its dictionary alone, and its memory are held by nobody else."""
    if type(parameter) is not nn.Parameter or parameter.requires_grad or parameter.is_inference():
        return False
    return sys.getrefcount(parameter) <= _HELD[0] and _users(parameter) <= _HELD[1]


def _users(tensor: torch.Tensor) -> int:
    """How many hold its memory, this call among them."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _counts(parameter: torch.Tensor) -> tuple[int, int]:
    return sys.getrefcount(parameter), _users(parameter)


_ALONE = {"parameter": torch.empty(1, device="cpu")}
_HELD = _counts(_ALONE.get("parameter"))  # of a parameter that only its dictionary holds, asked for as in `_is_free`


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
