"""Which ways of sharding a model's training work with packed layers."""

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

FSDP2_TORCH = "2.12"  # the first torch whose fully_shard takes integer parameters


def check_sharding() -> None:
    """Raises ValueError where this process is set up to train with FSDP1, DeepSpeed ZeRO-3 or too old an FSDP2.

    FSDP1 flattens the parameters of a module into one tensor, which cannot hold the integer mask; before torch 2.12
    FSDP2 makes every parameter one that requires gradients, which the mask cannot.
    """
    zero3, kind = is_deepspeed_zero3_enabled(), DistributedType.NO
    if is_initialized():
        state = AcceleratorState()
        kind = state.distributed_type
        zero3 |= kind == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3
    if zero3 or (kind == DistributedType.FSDP and not state.is_fsdp2):
        raise ValueError(
            f"{'DeepSpeed ZeRO-3' if zero3 else 'FSDP1'} is not supported for packed layers: use DDP, FSDP2 "
            f"(fsdp_version=2, torch >= {FSDP2_TORCH}), or DeepSpeed ZeRO-1 or ZeRO-2"
        )
    if kind == DistributedType.FSDP and torch.__version__ < FSDP2_TORCH:
        raise ValueError(
            f"torch {torch.__version__}: FSDP2 with packed layers needs torch >= {FSDP2_TORCH}; use DDP, or DeepSpeed "
            "ZeRO-1 or ZeRO-2"
        )
