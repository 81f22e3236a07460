"""varscale: scaling-law studies of visual autoregressive (next-scale prediction) image models."""

from varscale import torchvision_repair

__version__ = "0.1.0"

torchvision_repair.install()
