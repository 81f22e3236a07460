"""Which device a model runs on where Lightning doesn't choose it, and that a GPU gives the same bits every time."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

# what cuBLAS needs to sum in the same order every time; read when a process first multiplies
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def best_device() -> torch.device:
    """A GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Within it a GPU gives the same bits every time; processors do anyway.

    Many of its fastest kernels add numbers in whatever order they arrive, and compiled ones are tuned anew in every
    process. Drawing samples is not possible within (PyTorch's cumulative sum refuses).
    """
    if best_device().type != "cuda":
        yield
        return
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # every empty tensor would be filled with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]
