"""The settings of a valid little experiment, as plain values, for tests to change."""

from typing import Any

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"kind": "rings", "image_size": 32, "num_classes": 3, "validation_images": 64},
    "tokenizer": {
        "patch_nums": [1, 2, 4],
        "vocab_size": 64,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multipliers": [1, 1, 1, 2],
    },
    "model": {"width_per_depth": 16, "head_dim": 16},
    "optim": {},
    "grid": {"depths": [2, 3], "budgets": [1e12]},
}
