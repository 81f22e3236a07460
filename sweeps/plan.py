"""What a study would cost on a device, shown before anything runs: a line a size, totals, and where branches leave."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sweeps.costs import (
    SizeCosts,
    StudyCosts,
    Work,
    extractor_flops,
    fidelity_work,
    size_costs,
    stored_bytes,
    study_costs,
    training_work,
    validation_work,
)
from sweeps.devices import Device
from sweeps.grid import unfit_sizes
from sweeps.jobs.evaluation import EvaluationJob, evaluation_jobs
from sweeps.study import Study
from varscale.config import Experiment
from varscale.data.sources.of_experiment import validation_source
from varscale.errors import UserError
from varscale.store.layout import Store
from varscale.store.records import encoded_images, read_result
from varscale.tokenizer.shape import TokenizerShape
from varscale.training.cells import Cell

_DRAWING_WIDTH = 48


@dataclass(frozen=True)
class StudyPlan:
    """A study's costs on a device."""

    cells: tuple[Cell, ...]
    device: Device
    costs: StudyCosts
    left: StudyCosts
    """What is still to be done."""
    study: Study | None
    """None: its data can't be opened."""
    encoded: int
    """Views of training images, and validation images, that are encoded into tokens."""
    unknown: str
    """What of it is not known, and why."""

    @property
    def experiment(self) -> Experiment:
        """Its settings."""
        return self.cells[0].trunk.experiment

    @property
    def missing(self) -> tuple[Cell, ...]:
        """Cells without a result."""
        return tuple(cell for size in self.left.sizes for cell in size.cells)


def plan_of(experiment: Experiment, store: Store, cells: tuple[Cell, ...], device: Device) -> StudyPlan:
    """Count everything. Without data, tokens and what is there already stay unknown."""
    validation, encoded, study, unknown = experiment.data.validation_images or 0, 0, None, ""
    try:
        study = Study.of(experiment, store, cells)
        validation = len(validation_source(experiment.data))
        encoded = study.train_images * experiment.data.views + validation
    except UserError as error:
        unknown = f"epochs, tokens, passes over a whole validation set, and what is there already: {error}"

    costs = study_costs(experiment, cells, validation=validation, encoded=encoded)
    if study is None:
        return StudyPlan(cells, device, costs, costs, None, encoded, unknown)
    jobs: list[EvaluationJob] = []
    try:
        jobs = evaluation_jobs(study)
    except UserError as error:  # the sweep stops at it
        unknown = f"which images are measured already: {error}"
    drawn = [(job.cell, each) for job in jobs if job.cell is not None for each in job.plan.settings.drawings]
    floors = any(job.cell is None for job in jobs)
    left = StudyCosts(
        tuple(_left(size, study) for size in size_costs(study.missing)),
        () if read_result(study.tokenizer) else costs.tokenizer,
        () if encoded_images(study.tokens) >= study.train_images else costs.encoding,
        (*validation_work(study.missing, validation), *fidelity_work(experiment, drawn, floors=floors)),
    )
    return StudyPlan(cells, device, costs, left, study, encoded, unknown)


def print_plan(plan: StudyPlan, console: Console) -> None:
    """A line a size, totals, the schedule, and what the figures rest on."""
    table = _sizes_table(plan)
    _widen(console, table)
    console.print(table)
    console.print(_schedule(plan), soft_wrap=True)
    console.print()
    for line in _remarks(plan):
        console.print(Text(line))


def print_cells(plan: StudyPlan, console: Console) -> None:
    """A line a cell, each with the hours that it would take by itself."""
    device, experiment = plan.device, plan.experiment
    title = f"{experiment.name}: {len(plan.cells)} cells"
    table = _table(title, ("model", "width", "params", "FLOPs", "steps", "images", "GiB", device.unit))
    table.caption = f"each cell by itself, from its start to its end; {_basis(plan)}"
    if work := plan.costs.tokenizer:
        shape, training = TokenizerShape(experiment.tokenizer.architecture), experiment.tokenizer.training
        counts = f"{_flops(work):.3g}", f"{training.steps:,}", f"{training.total_images:,}"
        gib = _gib(shape.step_bytes(training.batch_size))
        table.add_row("tokenizer", "", _count(shape.parameters()), *counts, gib, _hours(device, work))
    for cell in plan.cells:
        trunk, model = cell.trunk, cell.trunk.model
        table.add_row(
            trunk.label,
            f"{model.columns().get('width', '')}",
            _count(model.parameters()),
            f"{cell.budget_flops:.3g}",
            f"{cell.steps:,}",
            f"{cell.images:,}",
            _gib(trunk.step_bytes(trunk.batch_size // trunk.resources.processes)),
            _hours(device, (training_work(trunk, cell.images),)),
        )
    _widen(console, table)
    console.print(table)
    for line in _cannot_run(plan):
        console.print(Text(line))


def _left(size: SizeCosts, study: Study) -> SizeCosts:
    """What a trunk still trains for these missing cells, from its furthest checkpoint that serves."""
    wanted = [cell.branch_images for cell in size.cells if not study.has_branch_point(cell)]
    if not wanted:
        return replace(size, trunk_images=0)
    there = (images for images in study.checkpoints(size.trunk) if images <= min(wanted))
    return replace(size, trunk_images=max(wanted) - max(there, default=0))


def _sizes_table(plan: StudyPlan) -> Table:
    experiment, device, costs, study = plan.experiment, plan.device, plan.costs, plan.study
    title = f"{experiment.name} on {device.title}: {len(costs.sizes)} sizes, {len(plan.cells)} cells"
    columns = ("params", "FLOPs", "images", "epochs", "GiB", "at once", device.unit, "disk", "there")
    table = _table(title, ("model", *columns))
    table.caption = (
        "images, FLOPs and hours of a size: its trunk and branches; GiB: of a whole step; at once: images that pass "
        "then; disk: GiB that stay"
    )
    stays = sum(size.bytes for size in costs.sizes)
    if costs.tokenizer:
        shape, training = TokenizerShape(experiment.tokenizer.architecture), experiment.tokenizer.training
        images, parts = f"{training.total_images:,}", training.micro_batch or training.batch_size
        memory = _gib(shape.step_bytes(training.batch_size)), f"{parts:,}"
        counts = _count(shape.parameters()), f"{_flops(costs.tokenizer):.3g}", images, ""
        stays += (weights := shape.parameters() * 4)
        done = "" if study is None else "no" if plan.left.tokenizer else "yes"
        table.add_row("tokenizer", *counts, *memory, _hours(device, costs.tokenizer), _gib(weights), done)
    if study is not None:
        images, done = f"{plan.encoded:,}", "no" if plan.left.encoding else "yes"
        stays += (tokens := plan.encoded * stored_bytes(experiment))
        row = f"{_flops(costs.encoding):.3g}", images, "", "", "", _hours(device, costs.encoding), _gib(tokens), done
        table.add_row("tokens", "", *row)
    missing = {cell.label for cell in plan.missing}
    for size in costs.sizes:
        trunk, model, work = size.trunk, size.trunk.model, training_work(size.trunk, size.all_images)
        finished = sum(cell.label not in missing for cell in size.cells)
        table.add_row(
            trunk.label,
            _count(model.parameters()),
            f"{work.flops:.3g}",
            f"{size.all_images:,}",
            "" if study is None else f"{max(cell.images for cell in size.cells) / study.train_images:.2g}",
            _gib(trunk.step_bytes(trunk.batch_size // trunk.resources.processes)),
            f"{trunk.images_at_once(device.memory_bytes):,}" if trunk.fits(device.memory_bytes) else "none",
            _hours(device, (work,)),
            _gib(size.bytes),
            "" if study is None else f"{finished}/{len(size.cells)}",
        )
    table.add_section()
    totals = {"trunks": costs.trunks, "branches": costs.branches, "evaluations": costs.evaluations, "all": costs.all}
    for name, works in totals.items():
        disk = _gib(stays) if name == "all" else ""
        table.add_row(name, "", f"{_flops(works):.3g}", "", "", "", "", _hours(device, works), disk, "")
    return table


def _schedule(plan: StudyPlan) -> Text:
    """Each trunk along its FLOPs, with marks where branches leave, and the images that it has seen there."""
    missing = {cell.label for cell in plan.missing}
    longest = max(size.trunk_images * size.trunk.flops_per_image for size in plan.costs.sizes)
    width = max(len(size.trunk.label) for size in plan.costs.sizes)
    lines = ["trunks along their FLOPs; ┬ a checkpoint from which a branch leaves, ● one whose cell is finished"]
    for size in plan.costs.sizes:

        def place(images: int, size: SizeCosts = size) -> int:
            return max(1, round(images * size.trunk.flops_per_image / longest * _DRAWING_WIDTH))

        line = ["─"] * place(size.trunk_images)
        for cell in size.cells:
            line[place(cell.branch_images) - 1] = "┬" if cell.label in missing else "●"
        seen = " · ".join(_short(images) for images in sorted({cell.branch_images for cell in size.cells}))
        lines.append(f"{size.trunk.label:<{width}} {''.join(line):<{_DRAWING_WIDTH}} {seen} images")
    return Text("\n".join(lines))


def _remarks(plan: StudyPlan) -> Iterable[str]:
    device, costs, left = plan.device, plan.costs, plan.left
    together, separate = _flops((*costs.trunks, *costs.branches)), _flops(costs.separate)
    separate_time, time = device.seconds(costs.separate), device.seconds((*costs.trunks, *costs.branches))
    hours = f" and {_number(separate_time.seconds - time.seconds)} {device.unit}" if separate_time and time else ""
    yield (
        f"Trunks and branches train {together:.3g} FLOPs, {together / separate:.2f} of what separate runs would; that "
        f"saves {separate - together:.3g} FLOPs{hours}."
    )
    if total := device.seconds(costs.all):
        workers = f"{device.workers} workers" if device.workers > 1 else "1 worker"
        yield (
            f"{workers}: {_number(total.seconds)} {device.unit}, from start to end at least "
            f"{_duration(device.least_seconds(costs))} (start of processes and writing not counted)."
        )
    if several := [size.trunk for size in costs.sizes if size.trunk.resources.processes > 1]:
        of_each = ", ".join(
            f"{trunk.label} {trunk.resources.processes}{' (sharded)' if trunk.resources.sharded else ''}"
            for trunk in several
        )
        yield f"Devices of a run: {of_each}; GiB and images at once are of each, hours of all."
    if plan.study is not None and left != costs:
        rest = device.seconds(left.all)
        hours = f", {_number(rest.seconds)} {device.unit}" if rest else ""
        yield f"Left to do: {len(plan.missing)} of {len(plan.cells)} cells, {_flops(left.all):.3g} FLOPs{hours}."
    if plan.study is not None and plan.missing:
        yield f"Disk: up to {plan.study.bytes_to_write(plan.missing) / 2**30:.2g} GiB more while it runs."
    yield f"Hours are {_basis(plan)}."
    if apart := _not_counted(plan):
        yield f"Not counted: {'; '.join(apart)}."
    if plan.unknown:
        yield f"Not known: {plan.unknown}"
    yield from _cannot_run(plan)


def _cannot_run(plan: StudyPlan) -> Iterable[str]:
    """What the device's memory is too small for."""
    shape, training = TokenizerShape(plan.experiment.tokenizer.architecture), plan.experiment.tokenizer.training
    needed = shape.step_bytes(training.micro_batch or training.batch_size)
    if plan.costs.tokenizer and 0.75 * needed > plan.device.memory_bytes:
        yield f"The tokenizer can't run: a step needs about {_gib(needed)} GiB; lower tokenizer.training.micro_batch."
    if unfit := unfit_sizes((cell.trunk for cell in plan.cells), plan.device.memory_bytes):
        yield f"These can't run: {unfit} there."


def _not_counted(plan: StudyPlan) -> list[str]:
    costs, device, training = plan.costs, plan.device, plan.experiment.tokenizer.training
    names = {"LPIPS": training.perceptual_weight, "the discriminator": training.adversarial_weight}
    added = [name for name, weight in names.items() if weight and costs.tokenizer]
    found = [f"FLOPs of {' and '.join(added)} beside the tokenizer's"] if added else []
    if extractor_flops(plan.experiment) is None:
        found.append("the extractor of evaluation.fidelity")
    works: dict[str, Sequence[Work]] = {
        "the tokenizer and encoding": (*costs.tokenizer, *costs.encoding),
        "the models": costs.trunks,
        "the extractor": [work for work in costs.evaluations if work.network == "extractor" and work.flops],
    }
    unknown = [name for name, parts in works.items() if parts and device.seconds(parts) is None]
    if unknown and device.seconds(costs.all) is not None:
        found.append(f"hours of {', of '.join(unknown)}")
    return found


def _basis(plan: StudyPlan) -> str:
    return plan.device.basis or "not known: they follow once a size was trained here, or with --calibrate"


def _flops(works: Iterable[Work]) -> float:
    return sum(work.flops for work in works)


def _hours(device: Device, works: Iterable[Work]) -> str:
    """With ~ where it is estimated from other work."""
    estimate = device.seconds(works)
    return "" if estimate is None else f"{'' if estimate.exact else '~'}{_number(estimate.seconds)}"


def _number(seconds: float) -> str:
    """In hours."""
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 99.5 else f"{hours:.2g}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{_number(seconds)} hours"


def _count(parameters: int) -> str:
    return f"{parameters:.3g}" if parameters >= 1e7 else f"{parameters:,}"


def _gib(number: float) -> str:
    return f"{number / 2**30:.2g}" if number < 99.5 * 2**30 else f"{number / 2**30:,.0f}"


def _short(images: int) -> str:
    """Three digits, with k or M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if images >= unit:
            return f"{images / unit:.3g}{name}"
    return f"{images}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    return table


def _widen(console: Console, table: Table) -> None:
    """Numbers stay whole: a narrow terminal wraps the lines."""
    console.width = max(console.width, console.measure(table, options=console.options.update_width(1000)).maximum)
