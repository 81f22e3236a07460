"""Which device a model runs on where Lightning doesn't choose it."""

import torch


def best_device() -> torch.device:
    """A GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
