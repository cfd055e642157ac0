"""Adapters around packed layers, which stand in the way of taking a model apart."""

from torch import nn

from ...nn.linear import packed_layers


def reject_adapters(model: nn.Module, action: str) -> None:
    """Raises ValueError where adapters wrap packed layers of a model: `action` would leave them behind.

    Args:
        action: the verb of the error, such as "dequantize".
    """
    if any(name.endswith(".base_layer") for name in packed_layers(model)):
        raise ValueError(
            f"the model has adapters, so this cannot {action} it: merge them (hf_sparselr.merge_and_unload) or unload "
            "them first"
        )
