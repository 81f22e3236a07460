"""Whether a machine can hold what is asked for, and get it done in a year: found out before anything runs.

Only what certainly can't be is refused. Memory is compared with what a part holds at the least, in the whole machine;
time with arithmetic faster than that of any device.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from sweeps.costs import Work, encoding_work, fidelity_work, size_costs, tokenizer_work, training_work
from sweeps.grid import unfit_sizes
from sweeps.study import Study
from varscale.config import Experiment
from varscale.data.sources.of_experiment import validation_source
from varscale.errors import ExperimentError
from varscale.families.base import FLOAT32_BYTES
from varscale.numerics.machine import MachineShares, Share, processors
from varscale.store.records import encoded_images, read_result
from varscale.tokenizer.shape import TokenizerShape
from varscale.training.cells import Cell, Trunk

YEAR_SECONDS = 365 * 86_400
GPU_PEAK = 5e15
"""FLOPs a second: twice what a B200's data sheet has for dense bfloat16."""
PROCESSOR_PEAKS = {"float32": 4e11, "bfloat16": 8e12}
"""Of one processor: two products and sums of 512 bits, or one of AMX's tiles, at more than 4 GHz."""
STEP_SECONDS = 1e-3
"""Of a training step, however small the model: Python and Lightning take that long."""
_CERTAIN = 0.75
"""Share of an estimate, right to within a third, that is needed for certain."""


def check_machine(study: Study, shares: MachineShares, missing: Sequence[Cell]) -> None:
    """Whether this machine can make a study's tokenizer and tokens, as far as they are missing, and train these cells.

    Raises:
        ExperimentError: It can't; names the setting that asks for too much.
    """
    shares.check()
    experiment = study.experiment
    for cell in missing:
        shares.check_run(cell.trunk.title, cell.trunk.resources)
    if unfit := unfit_sizes((cell.trunk for cell in missing), shares.worker.memory_bytes()):
        raise ExperimentError(f"{unfit} here: leave them out, or plan for another --device")
    fidelity = experiment.evaluation.fidelity
    drawn = [(cell, guidance) for guidance in (fidelity.drawings if fidelity else ()) for cell in missing]
    _check(
        [*_preparation_bytes(study), *_training_bytes(missing, shares), *_drawing_bytes(experiment, drawn)],
        [*_study_seconds(study, missing, shares), *_drawing_seconds(experiment, drawn, shares)],
    )


def check_evaluations(experiment: Experiment, drawn: Sequence[tuple[Cell, float]], shares: MachineShares) -> None:
    """Whether this machine can measure images of cells, each drawn at a guidance; raises as `check_machine` does."""
    shares.check()
    _check(_drawing_bytes(experiment, drawn), _drawing_seconds(experiment, drawn, shares))


def _check(least_bytes: Iterable[tuple[str, float]], least_seconds: Iterable[tuple[str, float]]) -> None:
    """Refuse settings by what each takes at the least."""
    memory = Share(processors()).memory_bytes()
    for key, needed in least_bytes:
        if needed > memory:
            raise ExperimentError(
                f"{key}: this takes at least {needed / 2**30:.1f} GiB at once, and there are {memory / 2**30:.1f} GiB "
                "here: lower it"
            )
    seconds: defaultdict[str, float] = defaultdict(float)
    for key, least in least_seconds:
        seconds[key] += least
    years = sum(seconds.values()) / YEAR_SECONDS
    if years > 1:
        key = max(seconds, key=lambda each: seconds[each])
        raise ExperimentError(f"{key}: this takes at least {years:.3g} years here, however fast it goes: lower it")


def _preparation_bytes(study: Study) -> Iterator[tuple[str, float]]:
    """Of the tokenizer and the tokens, where they are missing."""
    settings, training = study.experiment.tokenizer, study.experiment.tokenizer.training
    if settings.checkpoint is None and read_result(study.tokenizer) is None:
        needed = TokenizerShape(settings.architecture).step_bytes(training.micro_batch or training.batch_size)
        yield "tokenizer.training.micro_batch", _CERTAIN * needed
    if encoded_images(study.tokens) == 0:
        images = min(settings.encode_batch_size, _validation_images(study.experiment))
        numbers = 3 + 2 * settings.base_channels  # a pixel's: the image, and a layer's input and output
        yield "tokenizer.encode_batch_size", images * numbers * settings.image_size**2 * FLOAT32_BYTES


def _training_bytes(cells: Sequence[Cell], shares: MachineShares) -> Iterator[tuple[str, float]]:
    """Of training and measuring cells."""
    for trunk in {cell.trunk.label: cell.trunk for cell in cells}.values():
        model, evaluation = trunk.model, trunk.experiment.evaluation
        images = trunk.images_at_once(shares.worker.memory_bytes())
        yield "runtime.micro_batch", _CERTAIN * trunk.step_bytes(images)
        outputs = model.outputs * FLOAT32_BYTES
        images = min(evaluation.batch_size, _validation_images(trunk.experiment))
        yield "evaluation.batch_size", images * model.tokens * outputs
        images = evaluation.samples_per_class * min(evaluation.sample_classes, model.num_classes)
        yield "evaluation.samples_per_class", images * _drawn_bytes(trunk)


def _drawing_bytes(experiment: Experiment, drawn: Sequence[tuple[Cell, float]]) -> Iterator[tuple[str, float]]:
    """Of drawing images that are measured."""
    if (settings := experiment.evaluation.fidelity) is not None:
        for trunk in {cell.trunk.label: cell.trunk for cell, _ in drawn}.values():
            images = max(min(settings.batch_size, settings.samples), *settings.candidates)  # all candidates of an image
            yield "evaluation.fidelity.batch_size", images * _drawn_bytes(trunk)


def _drawn_bytes(trunk: Trunk) -> int:
    """Of an image that is drawn: its pixels, and what the model gives for its last scale."""
    model = trunk.model
    return (3 * trunk.experiment.data.image_size**2 + model.groups[-1] * model.outputs) * FLOAT32_BYTES


def _study_seconds(study: Study, missing: Sequence[Cell], shares: MachineShares) -> Iterator[tuple[str, float]]:
    """Of tokenizer, tokens and training."""
    experiment, peak = study.experiment, _peak(shares, "float32")
    if read_result(study.tokenizer) is None:
        work = tokenizer_work(experiment)
        steps = experiment.tokenizer.training.steps if work else 0
        yield "tokenizer.training.images", max(_flops(work) / peak, steps * STEP_SECONDS)
    if encoded_images(study.tokens) == 0:
        yield "data.validation_images", _flops(encoding_work(experiment, _validation_images(experiment))) / peak
        stored = study.data.stored_images
        if stored or study.cells:
            views = study.train_images * experiment.data.views
            yield "data.views" if stored else "grid.budgets", _flops(encoding_work(experiment, views)) / peak
    if missing:
        peak, longest = _peak(shares, experiment.optim.precision), max(missing, key=lambda cell: cell.budget_flops)
        sizes = size_costs(missing)
        together = _flops(training_work(size.trunk, size.all_images) for size in sizes)
        alone = _flops([training_work(longest.trunk, longest.images)])
        steps = max(cell.steps for cell in missing)
        yield "grid.budgets", max(together / max(1, shares.gpus) / peak, alone / peak, steps * STEP_SECONDS)


def _drawing_seconds(
    experiment: Experiment, drawn: Sequence[tuple[Cell, float]], shares: MachineShares
) -> Iterator[tuple[str, float]]:
    """Of drawing images that are measured."""
    flops = _flops(fidelity_work(experiment, drawn, floors=False)) / max(1, shares.gpus)
    yield "evaluation.fidelity.samples", flops / _peak(shares, "float32")


def _peak(shares: MachineShares, arithmetic: str) -> float:
    """FLOPs a second that no run here reaches."""
    return GPU_PEAK if shares.gpus else processors() * PROCESSOR_PEAKS[arithmetic]


def _flops(works: Iterable[Work]) -> float:
    return sum(work.executed for work in works)


def _validation_images(experiment: Experiment) -> int:
    return experiment.data.validation_images or len(validation_source(experiment.data))
