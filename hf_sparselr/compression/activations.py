"""The device that a block is worked on, and the device and dtype in which the hidden states of all windows wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..config.sparselr_config import SparseLRConfig
from ..utils.disk_tensors import on_disk
from ..utils.modules import move_to_device
from ..utils.precision import arithmetic
from ..utils.world import ALONE, World
from .capture import Call, replay
from .fused_operators import fused_operators
from .rounded_weights import rounded_weights
from .transformer_matching import resolve_precision


@dataclass(frozen=True)
class Workplace:
    """Devices and dtypes of the work on one block.

    Attributes:
        device: the compute device.
        activation_device: where hidden states and arguments of all windows wait.
        activation_dtype: of the hidden states.
        on_disk: hidden states wait in files.
        precision: of the products in forward passes, see `TMOptions.precision`.
        world: the processes that share the work, each with some of the windows.
    """

    device: torch.device
    activation_device: torch.device
    activation_dtype: torch.dtype
    precision: str
    world: World = ALONE
    on_disk: bool = False

    @classmethod
    def of(cls, block: nn.Module, config: SparseLRConfig, world: World = ALONE) -> "Workplace":
        """The devices and dtypes that the config asks for, for one block."""
        device = work_device(config.device, next(block.parameters()).device)
        precision = resolve_precision(config.tm, block, device).precision
        return cls(
            device,
            device if config.activations == "device" else torch.device("cpu"),
            torch.bfloat16 if precision == "bf16" else torch.float32,
            precision,
            world,
            config.activations == "disk",
        )

    @contextmanager
    def products(self, block: nn.Module) -> Iterator[None]:
        """Inside, a block with constant weights multiplies in the precision of forward passes."""
        with (
            rounded_weights(block, self.precision),
            fused_operators(block, self.device, self.precision),
            arithmetic(self.device, self.precision),
        ):
            yield

    def keep(self, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Hidden states, moved to the device and dtype in which they wait."""
        return [self._kept(batch) for batch in hidden]

    def _kept(self, batch: torch.Tensor) -> torch.Tensor:
        dtype = self.activation_dtype if batch.is_floating_point() else batch.dtype
        if not self.on_disk:
            return batch.to(self.activation_device, dtype)
        return on_disk(batch.to(dtype))

    def keep_calls(self, calls: list[Call]) -> list[Call]:
        """Arguments, moved to the device of the hidden states, so that no pass waits for them."""
        return move_to_device(calls, self.activation_device)

    @torch.no_grad()
    def forward(self, block: nn.Module, hidden: list[torch.Tensor], calls: list[Call]) -> list[torch.Tensor]:
        """The outputs of a block, one tensor a batch, kept."""
        with self.products(block):
            outputs = (replay(block, batch, call) for batch, call in zip(hidden, calls, strict=True))
            return self.keep(outputs)


def work_device(asked: torch.device | str | None, original_device: torch.device) -> torch.device:
    """The device to work on: the one asked for, else the model's accelerator, else CUDA, else the CPU.

    Args:
        original_device: of the model; "meta" for one that is streamed, to the CPU.
    """
    if asked is not None:
        return torch.device(asked)
    if original_device.type not in ("cpu", "meta"):
        return original_device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
