"""LoRA over `SparseLRLinear`. Adapters replace its factors or add to them; S never changes.

An adapter with `init_lora_weights="sparselr"` starts from the layer's own A and B. While it is active it replaces
them: S x + s B' A' x. Every other adapter adds to the layer's output: S x + B A x + s B' A' x.

PEFT's own LoRA layer merges into a dense base weight, which a compressed layer does not have.
"""

import copy
import dataclasses
import warnings
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ...nn.linear import SparseLRLinear

REPLACING = "sparselr"
_ALLOWED_INITS = ("gaussian", "eva", "orthogonal", REPLACING)
_Factors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # A, B, bias


def is_replacing(config: PeftConfig | None) -> bool:
    return getattr(config, "init_lora_weights", None) == REPLACING


def check_config(config: LoraConfig) -> None:
    """Raises ValueError if PEFT would read or edit a dense base weight under this config."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _ALLOWED_INITS:
        raise ValueError(
            f"init_lora_weights={init!r} is computed from a dense base weight (and most such initialisations "
            "edit it), which a compressed layer does not have. Use True, False or one of "
            f"{', '.join(_ALLOWED_INITS)}; {REPLACING!r} (see hf_sparselr.lora_config) starts from the layer's "
            "own low-rank factors."
        )
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in (*variants, "use_qalora"):
        if value := getattr(config, name):
            raise ValueError(
                f"{name}={value!r} is not supported on a compressed layer: the variant needs a dense base "
                "weight or a forward pass of its own. Use plain LoRA, without this argument."
            )


def _is_hooked(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)  # accelerate puts its own there


class SparseLRLoraLayer(LoraLinear):
    """LoRA around a `SparseLRLinear`; inputs (..., in), outputs (..., out). Nothing dense is built."""

    other_param_names = (*LoraLinear.other_param_names, "replacing")
    base_layer: SparseLRLinear

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if not isinstance(base_layer, SparseLRLinear) or kwargs.get("parameter_name") is not None:
            raise ValueError(
                "a compressed layer takes LoRA as a module (target_modules), not on a parameter or over "
                "another adapter method"
            )
        self.replacing: dict[str, bool] = {}  # the parent's __init__ already calls update_layer
        self._original: _Factors | None = None  # a tuple, so that the factors are not registered twice
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Adds an adapter. ValueError if a replacing adapter's rank does not fit the layer."""
        self.replacing.pop(adapter_name, None)
        if not is_replacing(config):
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            return
        self._check_rank(r, kwargs.get("target_name"))
        self.replacing[adapter_name] = True
        plain = copy.copy(config)
        plain.init_lora_weights = False
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=plain, **kwargs)
        if not self.pair(adapter_name)[0].weight.is_meta:  # meta: the values come from a checkpoint
            self._copy_factors(adapter_name)

    def pair(self, name: str) -> tuple[nn.Linear, nn.Linear]:
        """An adapter's modules A (in to r) and B (r to out)."""
        return cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])

    def _check_rank(self, r: int, name: str | None) -> None:
        rank = self.base_layer.rank
        if 0 < rank <= r:
            return
        raise ValueError(
            f"init_lora_weights={REPLACING!r} of rank {r} cannot hold the factors of {name or 'the layer'}, "
            f"whose rank is {rank}: let hf_sparselr.lora_config choose ranks and layers, or load the adapter on "
            "the compressed model that it was made for"
        )

    @torch.no_grad()
    def _copy_factors(self, name: str) -> None:
        base, (A, B) = self.base_layer, (module.weight for module in self.pair(name))
        B.zero_()  # a rank above the layer's (add_weighted_adapter) leaves the output as it is
        if base.A is not None and base.B is not None:
            A[: base.rank].copy_(base.A)
            B[:, : base.rank].copy_(base.B / self.scaling[name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` takes the adapter: it takes adapters that add to the layer."""
        return adapter_name not in self.replacing and super().supports_lora_conversion(adapter_name)

    def _replacing(self, names: list[str]) -> str | None:
        """The adapter among these that replaces the layer's factors, if any."""
        found = [name for name in names if name in self.replacing]
        if len(found) > 1:
            raise ValueError(
                f"the adapters {', '.join(found)} each replace the layer's low-rank factors: activate or merge "
                "one of them at a time"
            )
        return found[0] if found else None

    def _stands_in(self, name: str) -> bool:
        """Whether an adapter's A and B can enter the base's product in the place of its own factors.

        The outputs then have the same bits and cost no more. If not, the adapter's modules are called: for their
        hooks (offloading, sharding), their dropout, another dtype or another scale.
        """
        (A, B), dropout, scale = self.pair(name), self.lora_dropout[name], self.scaling[name]
        return (
            not isinstance(scale, torch.Tensor)  # as hot-swapping without recompiling needs it
            and scale == 1
            and A.weight.dtype == B.weight.dtype == self.base_layer.dtype
            and (isinstance(dropout, nn.Identity) or not dropout.training)
            and not (_is_hooked(A) or _is_hooked(B))
        )

    def _held(self, names: list[str]) -> list[str]:
        """Those of some adapters that this layer has."""
        return [name for name in names if name in self.lora_A]

    def _adapted(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        names = self._held(names)
        factors: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
        replacing = self._replacing(names)
        if replacing is not None:
            factors = (None, None)
            if self._stands_in(replacing):
                A, B = self.pair(replacing)
                factors = A.weight, B.weight
                names = [name for name in names if name != replacing]
        # Called as a module, as accelerate's and FSDP's hooks bring offloaded or sharded tensors in.
        out = self.base_layer(x, factors=factors)
        dtype = out.dtype
        for name in names:
            A, B = self.pair(name)
            inputs = self.lora_dropout[name](self._cast_input_dtype(x, A.weight.dtype))
            out = out + B(A(inputs)) * self.scaling[name]
        return out.to(dtype)

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault(name, []).append(row)
        parts = [self._adapted(x[index], [name]) for name, index in rows.items()]
        order = torch.tensor([row for index in rows.values() for row in index], device=x.device)
        return torch.cat(parts)[order.argsort()]

    def forward(self, x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        """x: (..., in), or (batch, ..., in) with one adapter name or "__base__" per row."""
        self._check_forward_args(x, adapter_names=adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or (self.merged and adapter_names is None):
            return self.base_layer(x)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names=adapter_names)
        return self._adapted(x, self.active_adapters)

    @torch.no_grad()
    def _merged_factors(self, original: _Factors, names: list[str]) -> _Factors:
        values = self.base_layer.values
        own_A, own_B, bias = original
        A_parts, B_parts = [], []
        if self._replacing(names) is None and own_A is not None and own_B is not None:
            A_parts, B_parts = [own_A], [own_B]
        for name in names:
            A, B = self.pair(name)
            A_parts.append(A.weight.to(values))
            B_parts.append((B.weight * self.scaling[name]).to(values))
            if not self.lora_bias[name]:
                continue
            if bias is None:
                raise ValueError(f"adapter {name} has lora_bias=True: it cannot be merged into a layer without bias")
            bias = (bias + B.bias * self.scaling[name]).to(bias)
        return torch.cat(A_parts), torch.cat(B_parts, dim=1), bias

    @property
    def own_rank(self) -> int:
        """The rank of the layer's own factors, also while adapters are merged into them."""
        A = self._original[0] if self._original else self.base_layer.A
        return 0 if A is None else A.shape[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Moves adapters (default: the active ones) into A and B, whose rank may grow; S stays as it is.

        A replacing adapter takes the place of the factors, an additive one is concatenated to them.

        Raises:
            ValueError: two replacing adapters, or with `safe_merge` factors that are not finite. The layer is
                unchanged then.
        """
        names = self._held(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        base = self.base_layer
        # From the originals each time, so that a replacing adapter merged later keeps the additive ones.
        original: _Factors = self._original or (base.A, base.B, base.bias)
        merged = self._merged_factors(original, [*self.merged_adapters, *names])
        if safe_merge and not all(tensor.isfinite().all() for tensor in merged if tensor is not None):
            raise ValueError(f"NaN or infinite values in the factors merged from {', '.join(names)}")
        self._original = original
        for field, tensor in zip(("A", "B", "bias"), merged, strict=True):
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(base, field, tensor)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the original A, B and bias back."""
        if self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.base_layer
        for field, tensor in zip(("A", "B", "bias"), self._original, strict=True):
            if tensor is not None:
                tensor.data = tensor.data.to(base.values)  # the model may have moved since the merge
            setattr(base, field, tensor)
        self._original = None
        self.merged_adapters.clear()
