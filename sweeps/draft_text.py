"""The text of a first experiment: every choice with a comment that says why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from varscale.config.captions import CaptionsSection
from varscale.config.text import yaml_line
from varscale.config.tokenizer import TokenizerArchitecture
from varscale.families.base import TokenSpace
from varscale.families.shared.description import TransformerDescription
from varscale.families.var.config import VARSection
from varscale.tokenizer.design import PAPER_IMAGE, section_lines

BUDGETS = tuple(2 ** (step / 2) for step in range(6))
"""Six, a factor √2 apart, as multiples of the smallest: five points from which a law predicts the sixth."""

MOST_PASSES = 100
"""Of the middle size over the pictures: with 32 of them, at 16 px, losses fell for about as many, then rose again."""
TOKENIZER_BATCH = 32
"""Images of a step of the tokenizer."""
MIDDLE_STEPS = 800
"""Of the middle size at the largest budget, at least: so few pictures are trained on in smaller batches."""
COMPILING_HOURS = 0.5
"""Below which a GPU does not try whether to compile, which takes minutes; processors never do."""
RINGS_RATE, CIFAR_RATE, CIFAR_CHANNELS = 5e-3, 3e-3, 64
"""Rates of experiments/rings.yaml and cifar10.yaml, and the channels of the latter's middle size."""
BEST_TOKENS_A_PARAMETER = 25, 110
"""That the sizes of the lowest loss saw in the studies of CIFAR-10 and rings."""
FEW_PICTURES = 500
"""Of fewer, crops should differ more."""


@dataclass(frozen=True)
class Rung:
    """Images of a size, and the tokenizer's network for them."""

    image_size: int
    base_channels: int = 16


@dataclass(frozen=True)
class Ladder:
    """Sizes of transformers around one of them."""

    width: int
    """Channels for each block."""
    middle: int
    """Blocks of the size that should be the best at the middle budget."""
    left_out: int = 0
    """Of the largest sizes, since they would have too few steps."""

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Of each size: from half of the middle, two at least, to 1.6 times as many, but for those left out."""
        sizes = sorted({max(2, round(self.middle * ratio)) for ratio in (0.5, 0.7, 1.0, 1.3, 1.6)})
        return tuple(sizes[: len(sizes) - self.left_out])

    @property
    def batch_size(self) -> int:
        """One image for each channel of a block's width: that is 16 for the models of CIFAR-10."""
        return self.width

    @property
    def rate(self) -> float:
        """CIFAR-10's, 3e-3 for the 64 channels of its middle size, over the channels here; no more than rings' 5e-3."""
        return min(RINGS_RATE, CIFAR_RATE * CIFAR_CHANNELS / (self.width * self.middle))

    @property
    def why_rate(self) -> str:
        """Where the rate comes from."""
        channels = self.width * self.middle
        if self.rate == RINGS_RATE:
            return f"of experiments/rings.yaml, not measured for {channels} channels"
        return f"of experiments/cifar10.yaml, whose middle size has {CIFAR_CHANNELS} channels" + (
            f"; scaled to {channels}, not measured" if channels != CIFAR_CHANNELS else ""
        )


@dataclass(frozen=True)
class Choices:
    """What an experiment is made of."""

    data: Mapping[str, Any]
    """Where the pictures are: fields of the section `data`."""
    name: str
    hours: float
    remarks: Sequence[str]
    """What was found among the data and can't be used."""
    architecture: TokenizerArchitecture
    pictures: int
    """Training pictures that there are."""
    validation_images: int
    tokenizer_images: int
    ladder: Ladder
    at_once: int = TOKENIZER_BATCH
    """Images of a step of the tokenizer that pass together."""
    views: int = 1
    training_images: int | None = None
    smallest_budget: float = 1e18
    seeds: int = 1
    minutes: float = 0.0
    """That the sweep should take."""
    tokenizer_minutes: float = 0.0
    encoding_minutes: float = 0.0
    why_image_size: str = ""
    gpu: bool = False
    """Whether it runs on one."""
    captioned: bool = False
    """Whether every picture has a caption."""

    @property
    def tells_captions(self) -> bool:
        """Whether models are told captions: where there are no classes to tell."""
        return self.captioned and self.data["num_classes"] == 1

    @property
    def image_size(self) -> int:
        """Pixels."""
        return self.architecture.image_size

    @property
    def trained_pictures(self) -> int:
        """Training pictures that are used."""
        return self.training_images or self.pictures

    @property
    def batch_size(self) -> int:
        """The ladder's, or where it would leave too few steps a smaller one, a power of two."""
        fitting = max(2, MOST_PASSES * self.trained_pictures // MIDDLE_STEPS)
        return min(self.ladder.batch_size, 1 << (fitting.bit_length() - 1))

    @property
    def encoded(self) -> int:
        """Images that are encoded into tokens."""
        return self.trained_pictures * self.views + self.validation_images


def experiment_text(choices: Choices) -> str:
    """The YAML, which `load_experiment` reads."""
    return "\n".join([*_head(choices), *_data(choices), *_tokenizer(choices), *_models(choices)]) + "\n"


def most_passes(choices: Choices) -> float:
    """How often the middle size sees each picture at the largest budget."""
    return choices.smallest_budget * BUDGETS[-1] / _middle(choices).training_flops() / choices.trained_pictures


def tokens_a_parameter(choices: Choices) -> float:
    """That the middle size sees at the middle budget."""
    middle = _middle(choices)
    images = choices.smallest_budget * BUDGETS[-1] ** 0.5 / middle.training_flops()
    return float(images * middle.tokens / middle.parameters())


def _head(choices: Choices) -> list[str]:
    return [
        "# Made by `varscale init` from a look at the pictures and at this machine, on which a sweep should take about",
        f"# {choices.minutes:.0f} minutes (asked for: {choices.hours:g} hours). `varscale sweep` takes it as it is.",
        *(f"# Not used: {' '.join(remark.split())}" for remark in choices.remarks),
        yaml_line("name", choices.name, indent=0),
    ]


def _data(choices: Choices) -> list[str]:
    held_out = choices.data["validation_path"] is None
    why = {
        "train_path": "" if Path(choices.data["train_path"]).is_absolute() else "seen from where varscale is called",
        "validation_path": "none that can be used" if held_out else "",
        "label_column": "no labels: one class" if choices.data.get("label_column", "") is None else "",
    }
    crops, encoding = choices.trained_pictures * choices.views, choices.encoding_minutes
    views = f"crops of each picture; {crops:,} in all, encoded in about {_duration(encoding)}"
    return [
        *("", "data:"),
        *(yaml_line(name, value, why.get(name, "")) for name, value in choices.data.items()),
        yaml_line(
            "validation_images",
            choices.validation_images,
            "training pictures held out, spread evenly over them" if held_out else "on which cells are measured",
        ),
        yaml_line(
            "training_images",
            choices.training_images,
            f"of {choices.pictures:,}, spread evenly over them: to encode all would take about "
            f"{_duration(encoding * choices.pictures / choices.trained_pictures)}"
            if choices.training_images
            else f"all {choices.pictures:,}",
        ),
        yaml_line("image_size", choices.image_size, choices.why_image_size),
        yaml_line("views", choices.views, views),
        yaml_line("resize_ratio", 1.5, "few pictures: crops that differ more than the paper's (1.125)")
        if choices.trained_pictures < FEW_PICTURES
        else yaml_line(
            "resize_ratio", 1.125, "shorter side before cropping, as a multiple of image_size (the paper's)"
        ),
        yaml_line("horizontal_flip", False, "true is worth trying where a mirrored picture is as good as the picture"),
        *_captions(choices),
    ]


def _captions(choices: Choices) -> list[str]:
    line = "captions: {encoder: words}"
    if choices.tells_captions:
        return [f"  {line}    # every picture has one, and there are no classes (docs/text.md)"]
    if choices.captioned:
        return [f"  # {line}    # every picture has one; with model.condition: text models are told it, not the class"]
    return []


def _tokenizer(choices: Choices) -> list[str]:
    made, images, at_once = choices.architecture, choices.tokenizer_images, choices.at_once
    large = made.image_size >= PAPER_IMAGE
    recipe = "not measured at this size" if large else "of experiments/cifar10.yaml"
    passes = images / choices.trained_pictures
    passed = f"{passes:,.0f}" if passes >= 100 else f"{passes:.3g}"
    return [
        *("", *section_lines(made, choices.trained_pictures)),
        *([yaml_line("encode_batch_size", 4 * at_once, "images that are encoded at once")] if large else []),
        "  training:",
        yaml_line("images", images, f"{passed} passes, in about {_duration(choices.tokenizer_minutes)}", 4),
        yaml_line("batch_size", TOKENIZER_BATCH, "", 4),
        *([yaml_line("micro_batch", at_once, "of these at once, as fit into memory", 4)] if large else []),
        yaml_line("lr", 3e-4 if large else 2e-3, recipe, 4),
        yaml_line("betas", [0.9, 0.99], "", 4),
        yaml_line("weight_decay", 0.0, "", 4),
        yaml_line("warmup_images", min(3_200, images // 10), "", 4),
        yaml_line("final_lr_ratio", 0.02, "", 4),
        yaml_line(
            "quantize_after", 0.2, "a plain autoencoder first: of rings 0.0072 instead of 0.04 after the same time", 4
        ),
    ]


def _models(choices: Choices) -> list[str]:
    ladder, sizes = choices.ladder, _sizes(choices)
    parameters = ", ".join(f"{size.parameters():,}" for size in sizes)
    steps = choices.smallest_budget / (sizes[-1].training_flops() * choices.batch_size)
    least, most = BEST_TOKENS_A_PARAMETER
    seen = f"{ladder.middle} blocks see {_plain(tokens_a_parameter(choices))} tokens a parameter at the middle budget"
    budgets = [float(f"{choices.smallest_budget * ratio:.3e}") for ratio in BUDGETS]
    lines = [
        *("", "model:"),
        *([yaml_line("condition", "text", "models are told captions")] if choices.tells_captions else []),
        yaml_line("width_per_depth", ladder.width, f"{seen}; the best of CIFAR-10 and rings saw {least} to {most}"),
        yaml_line("head_dim", max(8, min(64, ladder.width)), "heads = depth"),
        yaml_line("drop_path_at_depth_24", 0.0),
        yaml_line("adaln_gamma_init", 0.1, "as in experiments/rings.yaml and cifar10.yaml"),
        *("", "optim:"),
        yaml_line("lr", ladder.rate, f"{ladder.why_rate}; `varscale tune` looks for a better one"),
        yaml_line("lr_batch_size", choices.batch_size),
        yaml_line("batch_size", choices.batch_size, _why_batch(choices)),
        yaml_line("precision", "bfloat16" if choices.gpu else "float32"),
        yaml_line("schedule", "wsd", "what lets all budgets of a size share one trunk"),
        *("", "grid:"),
        f"  depths: {list(ladder.blocks)}    # {parameters} parameters",
        f"  # The smallest gives the largest size {steps:,.0f} steps; at the largest the middle size sees each picture",
        f"  # {most_passes(choices):,.0f} times, in {choices.views} crops.",
        yaml_line("budgets", budgets),
        *([yaml_line("min_steps", 50)] if choices.batch_size < ladder.batch_size else []),
        yaml_line(
            "seeds",
            list(range(choices.seeds)),
            "longer training would repeat pictures more often" * (choices.seeds > 1),
        ),
    ]
    if choices.image_size >= PAPER_IMAGE:
        lines += ["", "evaluation:", yaml_line("batch_size", 32, "images at once")]
    if not choices.gpu or choices.hours < COMPILING_HOURS:
        lines += [
            "",
            "runtime:",
            yaml_line("compile", "off", "auto tries whether it pays, which takes minutes"),
        ]
    return lines


def _duration(minutes: float) -> str:
    """Two digits or so, in a unit in which they are plain."""
    if minutes < 2:
        return f"{_plain(60 * minutes)} seconds"
    return f"{_plain(minutes)} minutes" if minutes < 120 else f"{_plain(minutes / 60)} hours"


def _plain(number: float) -> str:
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"


def _why_batch(choices: Choices) -> str:
    if choices.batch_size == choices.ladder.batch_size:
        return ""
    steps = f"fewer than {MIDDLE_STEPS} steps in {MOST_PASSES} passes"
    return f"{choices.ladder.batch_size} would leave the middle size {steps}"


def _middle(choices: Choices) -> TransformerDescription:
    return _sizes(choices)[choices.ladder.blocks.index(choices.ladder.middle)]


def _sizes(choices: Choices) -> list[TransformerDescription]:
    made, ladder = choices.architecture, choices.ladder
    tokens = TokenSpace(
        patch_nums=made.patch_nums,
        vocab_size=made.vocab_size,
        latent_channels=made.latent_channels,
        num_classes=choices.data["num_classes"],
        text_width=CaptionsSection().embedding_width if choices.tells_captions else None,
    )
    section = VARSection(width_per_depth=ladder.width, head_dim=max(8, min(64, ladder.width)))
    return [section.describe(tokens, blocks) for blocks in ladder.blocks]
