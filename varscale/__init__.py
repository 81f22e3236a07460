"""varscale: scaling-law studies of visual autoregressive (next-scale prediction) image models."""

__version__ = "0.1.0"
