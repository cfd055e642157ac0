"""The share of a model that became packed: logged after every run, as a warning if it is small."""

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..nn.linear import SparseLRLinear
from ..nn.pointwise import is_pointwise

logger = logging.getLogger("hf_sparselr")

LEAST = 0.6  # share of the blocks' linear weights below which a warning lists the dense ones
SHOWN = 12

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def coverage(model: nn.Module, blocks: Iterable[str]) -> dict:
    """The weights of the linear layers and experts in the blocks of a packed model.

    All parameters with two dimensions or more count, but those of embeddings and of convolutions whose kernel is not 1.

    Returns:
        "packed" and "total", numbers of weights, and "dense", {name of a layer, or a parameter: its weights}.
    """
    packed, dense, seen = 0, {}, set()
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if id(module) in seen or _is_other(module):
                continue
            seen.add(id(module))
            if isinstance(module, SparseLRLinear):
                seen.update(map(id, module.modules()))  # a hierarchy belongs to its layer
                packed += module.in_features * module.out_features
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 and not key.endswith("bias") and id(parameter) not in seen:
                    seen.add(id(parameter))  # tied ones count once
                    dense[name if key == "weight" else f"{name}.{key}"] = parameter.numel()
    return {"packed": packed, "total": packed + sum(dense.values()), "dense": dense}


def _is_other(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, *_CONVOLUTIONS)) and not is_pointwise(module)


def log_coverage(found: dict, reasons: dict[str, str]) -> None:
    """Logs the share of linear weights that became packed; a warning, with the largest dense ones, if it is small.

    Args:
        found: from `coverage`.
        reasons: {layer name: why it stayed dense}, as far as known.
    """
    if share_of(found) >= LEAST:
        logger.info(share_line(found))
    else:
        logger.warning(f"only {share_line(found)}; dense stayed {dense_names(found, reasons)}")


def is_coverage(found: Any) -> bool:
    """Whether an object, such as one from a report's file, is a result of `coverage` with weights in it."""
    if not isinstance(found, dict) or not isinstance(found.get("dense"), dict):
        return False
    numbers = [found.get("packed"), found.get("total"), *found["dense"].values()]
    return all(type(number) is int and number >= 0 for number in numbers) and 0 < found["total"] >= found["packed"]


def share_of(found: dict) -> float:
    return found["packed"] / max(found["total"], 1)


def share_line(found: dict) -> str:
    return f"{share_of(found):.0%} of the linear weights in the blocks are packed"


def dense_names(found: dict, reasons: dict[str, str]) -> str:
    """The names of what stayed dense, the largest first, with the reasons that are known."""
    largest = sorted(found["dense"], key=found["dense"].__getitem__, reverse=True)
    shown = [f"{name} ({reasons[name]})" if name in reasons else name for name in largest[:SHOWN]]
    more = f", ... ({len(largest)} in all)" if len(largest) > SHOWN else ""
    return ", ".join(shown) + more
