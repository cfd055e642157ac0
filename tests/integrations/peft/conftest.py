import pytest
import torch
from helpers.peft_models import compressed_model, logits


@pytest.fixture
def reference() -> torch.Tensor:
    """What the compressed model gives without adapters."""
    return logits(compressed_model())
