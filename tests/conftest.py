import importlib.util
import os

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads would only wait for one another
if not torch.cuda.is_available():
    # Read when triton is imported, which transformers does where it is installed.
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from helpers.triton_interpreter import speed_up, suit_numpy

        suit_numpy()
        speed_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that are marked `gpu` where the GPUs they need are missing; one process runs the others."""
    for item in items:
        for marker in item.iter_markers("gpu"):
            item.add_marker(pytest.mark.xdist_group("gpu"))
            if reason := _missing_gpu(**marker.kwargs):
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing_gpu(count: int = 1, capability: tuple[int, int] | None = None) -> str | None:
    if torch.cuda.device_count() < count:
        return f"needs CUDA GPUs: {count}"
    if capability not in (None, torch.cuda.get_device_capability()):
        return f"needs a GPU of compute capability {capability[0]}.{capability[1]}"
    return None


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver as on a device whose products of BF16 are fast and round: not every CPU's do."""
    from hf_sparselr.solvers.threebasil import admm

    def rounded(precision: str, *matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(matrix.bfloat16().float() for matrix in matrices) if precision == "bf16" else matrices

    product, subtract = admm.product, admm.subtract_product
    monkeypatch.setattr(admm, "coarsest", lambda device: "bf16")
    monkeypatch.setattr(admm, "product", lambda x, y, precision: product(*rounded(precision, x, y), precision))
    monkeypatch.setattr(
        admm,
        "subtract_product",
        lambda to, x, y, precision: subtract(to, *rounded(precision, x, y), precision),
    )
