"""Learning rate and weight decay as plain functions of images seen, so that resuming and branching change nothing."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run.

    `wsd`: linear warm-up, constant, then linear decay over the last `decay_images` (warm-up–stable–decay). A trunk is
    the same schedule without an end (`total_images` None); its branch, from any point before the decay, is equal to a
    separate run of the whole schedule.
    `linear`: the reference VAR's `lin0`: warm-up, 5% of the rest constant, then linear to `final_ratio`, which the last
    step has. (Its warm-up begins at 0.5% of the peak, ours at the first of equal steps.)
    `cosine`: warm-up, then half a cosine to `final_ratio`, which comes after the last step.

    Raises:
        ValueError: an end is needed and missing, or lies before the warm-up's.
    """

    kind: Literal["wsd", "linear", "cosine"]
    peak_lr: float
    batch_size: int
    warmup_images: int = 0
    total_images: int | None = None
    decay_images: int = 0
    final_ratio: float = 0.0
    weight_decay: float = 0.0
    final_weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.total_images is None and (self.kind != "wsd" or self.final_weight_decay is not None):
            raise ValueError(f"a {self.kind} schedule needs total_images")
        if self.total_images is not None and self.total_images - self.decay_images < self.warmup_images:
            raise ValueError(
                f"warm-up of {self.warmup_images} images runs into the decay, which starts at "
                f"{self.total_images - self.decay_images} of {self.total_images}: lower the warm-up or raise the budget"
            )

    def lr(self, images: int) -> float:
        """Rate of the step that is taken after `images` images were seen."""
        if images + self.batch_size < self.warmup_images:
            return self.peak_lr * (images + self.batch_size) / self.warmup_images
        if self.total_images is None:
            return self.peak_lr
        if self.kind == "wsd":
            decayed = (images - (self.total_images - self.decay_images)) / max(1, self.decay_images)
        else:
            last_images = self.total_images - (self.batch_size if self.kind == "linear" else 0)
            decayed = (images - self.warmup_images) / max(1, last_images - self.warmup_images)
        if self.kind == "linear":
            decayed = (decayed - 0.05) / 0.95
        decayed = min(max(decayed, 0.0), 1.0)
        if self.kind == "cosine":
            decayed = 0.5 - 0.5 * math.cos(math.pi * decayed)
        return self.peak_lr * (1 - (1 - self.final_ratio) * decayed)

    def decay(self, images: int) -> float:
        """Weight decay of that step: constant, or half a cosine to `final_weight_decay` as in the reference."""
        if self.final_weight_decay is None or self.total_images is None:
            return self.weight_decay
        passed = min(images / max(1, self.total_images - self.batch_size), 1.0)
        return self.final_weight_decay + (self.weight_decay - self.final_weight_decay) * (
            0.5 + 0.5 * math.cos(math.pi * passed)
        )
