"""A first experiment for someone's pictures, made to end on this machine within the hours asked for.

What is chosen follows from the studies that were measured (docs/cifar10.md, docs/rings.md), and how much of it from the
same estimate as that of `varscale plan`: the tokenizer takes its share of the time, encoding a small one, and of all
ladders of sizes that fit into the rest the one is taken whose middle is nearest to the best size of the middle budget.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sweeps.costs import study_costs
from sweeps.devices import Paces, this_machine
from sweeps.draft_text import (
    BUDGETS,
    MOST_PASSES,
    TOKENIZER_BATCH,
    Choices,
    Ladder,
    Rung,
    experiment_text,
    tokens_a_parameter,
)
from varscale.config import Experiment, RuntimeConfig
from varscale.config.text import read_yaml
from varscale.config.yaml import validate
from varscale.data.sources.finding import FoundData
from varscale.errors import DataError, ExperimentError
from varscale.numerics.machine import MachineShares
from varscale.tokenizer.design import architecture, fillable_codes
from varscale.tokenizer.shape import TokenizerShape
from varscale.training.cells import Trunk

FEWEST_PICTURES = 20
"""To train and to measure on, where there is no validation split; else to train on."""
MOST_SEEDS = 8
"""Where a longer training would repeat pictures more than `MOST_PASSES` times."""
TOKENS_A_PARAMETER = 50.0
"""Tokens seen for each parameter by the size of the lowest loss, about (`BEST_TOKENS_A_PARAMETER`)."""
TOKENIZER_SHARE, ENCODING_SHARE = 0.3, 0.05
"""Of the time."""
LEAST_TOKENIZER_IMAGES, MOST_TOKENIZER_IMAGES = 9_600, 80_000
"""At 32 pixels: CIFAR-10's tokenizer was sound after 12,800 images, and had PSNR 25 dB after 80,000."""
MOST_VALIDATION_IMAGES = 1024
MOST_VIEWS = 64
START_SECONDS, JOB_SECONDS = 30.0, 0.7
"""What a sweep takes beside arithmetic: processes, laws and report; and of a worker for each trunk and branch."""
SLOWER = 1.1
"""Beside those. Whole sweeps of rings took 1.15 to 1.2 times what was planned after a calibration, starts included; a
drafted one of photographs (docs/your-images.md) 1.25 times what its draft had said, in which all three are counted."""

_RUNGS = (Rung(256), Rung(128), Rung(64), Rung(32), Rung(32, 8), Rung(24, 8), Rung(16, 8))
_LADDERS = tuple(
    Ladder(width, middle)
    for width, middles in ((8, (3, 4)), (16, (3, 4)), (32, (3, 4)), (64, (3, 4, 5, 6, 8, 10, 12, 16)))
    for middle in middles
)  # the larger the later
_FIRST_LADDER = Ladder(8, 4)
_LOADED = 16
_MEMORY_SHARE = 0.6
"""Of the memory that the tokenizer's step may take; it is estimated to within a third."""
_MOST_HOURS = 10_000

Measure = Callable[[Experiment], Paces]
"""Takes real steps of an experiment's tokenizer and sizes on this machine."""


@dataclass(frozen=True)
class Draft:
    """An experiment, as text, and what it was planned to take."""

    text: str
    choices: Choices

    def summary(self) -> str:
        """What it is, in a line."""
        chosen, made = self.choices, self.choices.architecture
        early = chosen.minutes < 0.7 * 60 * chosen.hours
        return (
            f"{made.image_size} px, {made.tokens_per_image} tokens of {made.vocab_size:,} codes, "
            f"{len(chosen.ladder.blocks)} sizes at {len(BUDGETS)} budgets: about {chosen.minutes:.0f} minutes"
            + "; more would only repeat these pictures"
            * early
        )


class Drafter:
    """Chooses an experiment for some pictures."""

    def __init__(self, found: FoundData, name: str, hours: float, measure: Measure, *, gpu: bool) -> None:
        """Look at what there is; a sweep may take so many hours on this machine, with its GPU or without.

        Raises:
            DataError: There are too few pictures for a study.
        """
        if len(found.train) < FEWEST_PICTURES:
            raise DataError(
                f"{found.train.name}: {len(found.train)} pictures; a study needs {FEWEST_PICTURES} or more, some to "
                "train on and others to measure on"
            )
        self._found, self._name, self._hours, self._measure = found, name, hours, measure
        self._paces, self._gpu = Paces(), gpu
        self._load_seconds = _load_seconds(found)
        self._memory = MachineShares.of(RuntimeConfig()).whole.memory_bytes()

    def draft(self, peak_flops: float) -> Draft:
        """The experiment with the largest images that the pictures and the hours allow.

        Args:
            peak_flops: FLOPs a second that nothing here exceeds; it leaves out at once what is far too large.

        Raises:
            ExperimentError: Not even the smallest study ends within the hours.
        """
        side = self._found.shorter_side()
        usable = [rung for rung in _RUNGS if rung.image_size <= side] or [_RUNGS[-1]]
        why_not: dict[int, str] = {}
        for rung in usable:
            choices = self._first_choices(rung, _why_this_size(rung.image_size, side, why_not))
            flops = TokenizerShape(choices.architecture).training_flops()
            too_long = _least_images(rung) * flops / peak_flops > TOKENIZER_SHARE * self._seconds
            why_not[rung.image_size] = "too long" if choices.at_once else "too much memory"
            if rung is not usable[-1] and (too_long or not choices.at_once):
                continue
            self._look_at(choices)
            fitted = self._fitted(choices)
            if fitted is not None and not self._paces.models.sizes.issuperset(_sizes(fitted)):
                self._look_at(fitted)
                fitted = self._fitted(choices)
            if fitted is not None:
                chosen = self._with_seeds(fitted)
                return Draft(experiment_text(chosen), chosen)
        slow = self._load_seconds > self._step_seconds(choices)
        raise ExperimentError(
            f"--hours {self._hours:g}: too short for a study of {choices.image_size} px on this machine; try --hours "
            f"{self._least_hours(choices):.5g} or more"
            + f", or smaller copies of the pictures: to load one takes {self._load_seconds:.2g} s"
            * slow
        )

    @property
    def _seconds(self) -> float:
        return self._hours * 3600

    def _first_choices(self, rung: Rung, why: str) -> Choices:
        found, pictures = self._found, len(self._found.train)
        if found.validation is None:
            held_out = min(MOST_VALIDATION_IMAGES, max(pictures // 10, min(pictures // 5, 50)))
            pictures -= held_out
        else:
            held_out = min(MOST_VALIDATION_IMAGES, len(found.validation))
        made = architecture(rung.image_size, images=pictures, base=rung.base_channels)
        step_bytes, images = TokenizerShape(made).step_bytes, _least_images(rung)
        parts = [TOKENIZER_BATCH >> halved for halved in range(TOKENIZER_BATCH.bit_length())]
        return Choices(
            *(found.settings, self._name, self._hours, found.remarks, made, pictures, held_out, images, _FIRST_LADDER),
            at_once=next((part for part in parts if step_bytes(part) <= _MEMORY_SHARE * self._memory), 0),
            gpu=self._gpu,
            captioned=found.captioned,
            why_image_size=why,
        )

    def _look_at(self, choices: Choices) -> None:
        """Measure an experiment's steps, beside what was measured before."""
        paces, experiment = self._measure(_experiment(choices)), _experiment(choices)
        for known, new in ((self._paces.models, paces.models), (self._paces.tokenizers, paces.tokenizers)):
            for size in new.sizes:
                known.add(size, 1, new.seconds(size))
        self._device = this_machine(experiment.runtime, self._paces)

    def _fitted(self, choices: Choices) -> Choices | None:
        """As much of everything as the time allows; None: the tokenizer or the models get too little of it."""
        shape, step = TokenizerShape(choices.architecture), self._step_seconds(choices)
        encoding = step * shape.encode_flops() / shape.training_flops() + self._load_seconds
        sequences = int(ENCODING_SHARE * self._seconds / encoding)
        least, images = _least_images(choices), int(TOKENIZER_SHARE * self._seconds / (step + self._load_seconds))
        if images < least:
            return None
        images = _rounded(min(images, MOST_TOKENIZER_IMAGES * least // LEAST_TOKENIZER_IMAGES))
        choices = replace(
            choices,
            tokenizer_images=images,
            views=max(1, min(MOST_VIEWS, sequences // choices.pictures)),
            training_images=_rounded(sequences) if sequences < 0.8 * choices.pictures else None,
        )
        codes = fillable_codes(choices.trained_pictures, shape.architecture.tokens_per_image, choices.image_size)
        choices = replace(
            choices,
            architecture=choices.architecture.model_copy(update={"vocab_size": codes}),
            tokenizer_minutes=images * (step + self._load_seconds) / 60,
            encoding_minutes=choices.encoded * encoding / 60,
        )
        return self._with_budgets(choices)

    def _step_seconds(self, choices: Choices) -> float:
        """Of the tokenizer, for an image; infinite where one took too long to be tried."""
        size = TokenizerShape(choices.architecture).training_flops()
        return self._paces.tokenizers.seconds(size) if size in self._paces.tokenizers.sizes else math.inf

    def _least_hours(self, choices: Choices) -> float:
        """That a study of such images takes at the least, about, rounded up."""
        longer = copy.copy(self)
        tokenizer = _least_images(choices) * (self._step_seconds(choices) + self._load_seconds)
        longer._hours = min(_MOST_HOURS, max(self._hours, tokenizer / TOKENIZER_SHARE / 3600))
        while longer._fitted(choices) is None and longer._hours < _MOST_HOURS:
            longer._hours *= 1.2
        digit = 10.0 ** (math.floor(math.log10(longer._hours)) - 1)
        return min(_MOST_HOURS, math.ceil(1.1 * longer._hours / digit) * digit)

    def _with_seeds(self, fitted: Choices) -> Choices:
        """With as many seeds as there is time for, where a longer training would only repeat pictures."""
        if fitted.minutes > 0.9 * self._seconds / 60:
            return fitted
        for seeds in range(MOST_SEEDS, 1, -1):
            tried = self._with_ladder(replace(fitted, seeds=seeds), fitted.ladder)
            if tried and (tried[1].ladder, tried[1].smallest_budget) == (fitted.ladder, fitted.smallest_budget):
                return tried[1]
        return fitted

    def _with_budgets(self, choices: Choices) -> Choices | None:
        """The sizes whose middle one is nearest to the best, and their budgets; None: none fit into the time."""
        best, low, high = None, 0, len(_LADDERS) - 1
        while low <= high:  # the larger the sizes, the fewer tokens they see in the same time
            middle = (low + high) // 2
            found = self._with_ladder(choices, _LADDERS[middle])
            if found is not None and (best is None or abs(found[0]) < abs(best[0])):
                best = found
            low, high = (low, middle - 1) if found is None or found[0] < 0 else (middle + 1, high)
        return best[1] if best else None

    def _with_ladder(self, choices: Choices, ladder: Ladder) -> tuple[float, Choices] | None:
        """The budgets of these sizes that fill the time; before it, above 0 where their middle one should be larger.

        Sizes that would have too few steps are left out; None: too few are left.
        """
        while len(ladder.blocks) >= 3 and ladder.blocks[-1] > ladder.middle:
            tried = replace(choices, ladder=ladder)
            trunks = _trunks(tried)
            most = max(trunk.flops_per_image * trunk.batch_size for trunk in trunks)
            smallest = (trunks[0].experiment.grid.min_steps + 1) * most
            one, two = (self._estimate(tried, trunks, factor * smallest) for factor in (1, 2))
            factor = 1 + (self._seconds - one) / (two - one)  # the time grows in proportion
            middle = trunks[ladder.blocks.index(ladder.middle)]
            repeated = MOST_PASSES * choices.trained_pictures * middle.flops_per_image / BUDGETS[-1]
            fits = factor >= 1 and all(trunk.fits(self._device.memory_bytes) for trunk in trunks)
            if fits and (repeated >= smallest or len(ladder.blocks) == 3):
                budget = max(smallest, min(factor * smallest, repeated))
                minutes = self._estimate(tried, trunks, budget) / 60
                chosen = replace(tried, smallest_budget=budget, minutes=minutes)
                return math.log(tokens_a_parameter(chosen) / TOKENS_A_PARAMETER), chosen
            ladder = replace(ladder, left_out=ladder.left_out + 1)
        return None

    def _estimate(self, choices: Choices, trunks: Sequence[Trunk], smallest_budget: float) -> float:
        """Seconds from start to end."""
        experiment = trunks[0].experiment
        cells = [trunk.cell(smallest_budget * ratio) for trunk in trunks for ratio in BUDGETS]
        costs = study_costs(experiment, cells, validation=choices.validation_images, encoded=choices.encoded)
        jobs = JOB_SECONDS * (len(cells) + len(costs.sizes)) / self._device.workers
        loading = self._load_seconds * (choices.tokenizer_images + choices.encoded)
        return START_SECONDS + jobs + loading + SLOWER * self._device.least_seconds(costs)


def _experiment(choices: Choices) -> Experiment:
    return validate(read_yaml(experiment_text(choices)), "the experiment that is being made")


def _trunks(choices: Choices) -> list[Trunk]:
    experiment = _experiment(choices)
    return [
        Trunk(experiment, blocks, seed, choices.smallest_budget)
        for seed in range(choices.seeds)
        for blocks in choices.ladder.blocks
    ]


def _sizes(choices: Choices) -> set[int]:
    return {trunk.flops_per_image for trunk in _trunks(choices)}


def _why_this_size(image_size: int, side: int, why_not: Mapping[int, str]) -> str:
    """Why images have this side, given that of three quarters of the pictures and why larger ones were left out."""
    larger = min((size for size in why_not if size > image_size), default=None)
    if larger is not None:
        return f"{larger} px would take {why_not[larger]} here"
    if image_size > side:
        return f"no draft has less; a quarter of the pictures have {side} px or less, and are enlarged"
    return f"three quarters of the pictures have {side} px or more"


def _least_images(choices: Rung | Choices) -> int:
    """Images that a tokenizer is trained on at the least: with the pixels, since that many more must be said."""
    return round(LEAST_TOKENIZER_IMAGES * max(1.0, (choices.image_size / 32) ** 2))


def _rounded(images: int) -> int:
    """Down, to two digits."""
    digit = int(10 ** max(0, len(str(images)) - 2))
    return max(1, images // digit * digit)


def _load_seconds(found: FoundData) -> float:
    """To load a picture, of those that are loaded side by side: the median of some."""
    from varscale.tokenizer.training import loading_threads

    chosen = np.linspace(0, len(found.train) - 1, _LOADED, dtype=np.int64).tolist()
    taken = []
    for index in chosen:
        found.train.load(index)  # of Parquet files this reads a whole group of rows
        started = time.perf_counter()
        found.train.load(index)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken)) / loading_threads()
