"""The options that each `effort` sets, of the default solver, of transformer matching and of distillation."""

from typing import Any

_PUBLISHED_TM = {"passes": 20, "lr": 2e-5, "final_lr": 0.2, "target": "block", "precision": "fp32"}
_TM = {
    "passes": 7,
    "lr": 4e-3,
    "relative_lr": True,
    "final_lr": 0.2,
    "batch_size": 4,
    "target": "mean",
    "precision": "auto",
}
_DISTILL = {
    "passes": 3,
    "lr": 2e-3,
    "relative_lr": True,
    "batch_size": 4,
    "self_samples": 4096,
    "self_len": 256,
    "hidden_weight": 3.0,
}
# A softer start and slower growth of the penalty find better supports, in more iterations.
_SOFT = {"rho": 0.03, "growth": (1.09, 1.045, 1.018), "weigh_outputs": True}
_SLOW = {**_SOFT, "growth": (1.05, 1.025, 1.01), "tolerance": 1e-4, "max_iterations": 3000}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "3basil": {"rho": 0.09, "weigh_outputs": True},
        "tm": {**_TM, "passes": 3},
        "distill": {**_DISTILL, "passes": 2, "self_samples": 2048},
    },
    "default": {"3basil": _SOFT, "tm": _TM, "distill": _DISTILL},
    "high": {"3basil": _SLOW, "tm": {**_TM, "passes": 14}, "distill": {**_DISTILL, "passes": 4, "self_samples": 8192}},
    "published": {
        "3basil": {"form": "textbook", "precision": "fp32", "refit_rounds": 1},
        "tm": _PUBLISHED_TM,
        "distill": _DISTILL,
    },
}

# Noisy windows for each calibration window; the published settings have none. They count in a pass of matching.
NOISY_WINDOWS = dict.fromkeys(PRESETS, 0.5) | {"published": 0.0}
