"""Tests that need a GPU. `make test-gpu` runs them where there is one; nothing else does."""

import pytest
from requirements import require_gpu


@pytest.fixture(autouse=True)
def _gpu() -> None:
    require_gpu()
