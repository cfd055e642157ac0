"""PEFT's preparation of quantized models for training."""

from collections.abc import Callable

from torch import nn

from ...nn.linear import SparseLRLinear

_METHOD = "quantization_method"


def prepare_for_kbit_training(call: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    """Around `prepare_model_for_kbit_training`: a compressed model is treated as a GPTQ model is.

    All parameters are frozen, and gradient checkpointing is enabled if asked for. Dtypes stay: PEFT casts the models
    of methods that it does not know to FP32, which would double the packed layers.
    """
    if not any(isinstance(module, SparseLRLinear) for module in model.modules()):
        return call()
    own = vars(model).get(_METHOD)
    setattr(model, _METHOD, "gptq")
    try:
        return call()
    finally:
        delattr(model, _METHOD)
        if own is not None:
            setattr(model, _METHOD, own)
