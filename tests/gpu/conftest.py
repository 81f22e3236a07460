"""Tests that need a GPU. `make test-gpu` runs them where there is one; nothing else does."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
