"""Where float32 must stay float32."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it autocast leaves the dtypes on the device alone; TF32 stays as it was set."""
    if device.type == "meta":  # has no autocast to switch off
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within it neither autocast nor TF32 lowers the precision of float32 products on the device."""
    with without_autocast(device):
        if device.type != "cuda":
            yield
            return
        matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = matmul.fp32_precision, convolution.fp32_precision
        matmul.fp32_precision = convolution.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision, convolution.fp32_precision = before
