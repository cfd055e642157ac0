"""The weight of a compressed layer as other code sees it: a tensor that is built when it is read, never edited."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

_COMPUTED = ("T", "mT", "H", "mH", "real", "imag")  # the properties of a tensor that are tensors
_METADATA = ("size", "dim", "numel", "nelement", "element_size", "__len__", "is_floating_point", "is_complex")


class LazyDenseWeight(torch.Tensor):
    """S + B A of a layer: shape, dtype and device at hand, the values computed anew for every use.

    Reading shape, dtype or device builds nothing; an operation on the values builds the dense tensor for that
    operation. Editing in place, through `.data` too, raises: it would change a temporary tensor and be lost.

    Args:
        shape: of the dense weight.
        like: a tensor of its dtype and device.
        build: computes the dense weight.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, int], like: torch.Tensor, build: Callable[[], torch.Tensor]):
        view = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        view.build = build
        return view

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        attribute = func.__self__.__name__ if name == "__get__" else None
        if attribute == "data":
            return args[0]
        if name in _METADATA or (attribute is not None and attribute not in _COMPUTED):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        target = args[0] if args else kwargs.get("tensor")
        if (isinstance(target, cls) and _edits(name)) or isinstance(kwargs.get("out"), cls):
            raise RuntimeError(
                "the weight S + B A of a compressed layer cannot be edited: S is stored packed, and the edit would be "
                "lost. Adapters that merge are LoRA's (peft.LoraConfig), into B and A; others stay beside the layer "
                "until unload() removes them."
            )
        args, kwargs = tree_map(lambda x: x.build() if isinstance(x, cls) else x, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise NotImplementedError(f"{func} reached the weight of a compressed layer, which holds no values itself")


def _edits(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__set__", "__setitem__") or (name.startswith("__i") and name != "__invert__")
