"""Single runs: a tokenizer, its tokens, one model; in this process, with the share of a sweep's worker."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from sweeps.decided import Decided, decided
from sweeps.plan import train_images
from sweeps.shares import shares
from sweeps.view import SweepView
from varscale.config import Experiment
from varscale.config.yaml import changed, sets
from varscale.errors import ExperimentError
from varscale.store.fingerprint import DataIdentity, store_numerics
from varscale.store.layout import ExperimentFiles, RunFiles, TokenFiles
from varscale.tracking import Forwarder
from varscale.training.cells import Cell, Trunk, check_lengths, grid_cells


def make_tokenizer(experiment: Experiment, runs: Path) -> RunFiles:
    """Train and measure the experiment's tokenizer, unless that was done; its files."""
    inputs = _inputs(experiment, runs)
    _train_tokenizer(experiment, inputs)
    return inputs.tokenizer


def make_tokens(experiment: Experiment, runs: Path) -> TokenFiles:
    """Encode the images that the grid's cells train on, unless that was done."""
    inputs = _inputs(experiment, runs)
    cells = () if inputs.data.stored_images else grid_cells(experiment)  # a single run's recipe makes no grid
    images = train_images(cells, inputs.data)
    _train_tokenizer(experiment, inputs)
    return _encode(experiment, inputs, images)


def train_single(
    experiment: Experiment,
    depth: int,
    budget: float | None,
    seed: int,
    runs: Path,
    forwarder: Forwarder,
    overrides: Sequence[str] = (),
) -> Path:
    """Train one model from start to end, without trunk and branch, delivered to MLflow meanwhile; its result file.

    With a budget the run is the grid's cell, to the bit. Without, it takes `optim.epochs` passes, and `by_depth`'s
    recipe for its depth, but for fields that `overrides`, `key=value` as they were merged into the experiment, set.

    Raises:
        ExperimentError: neither a budget nor `optim.epochs`, or a budget of fewer steps than `grid.min_steps`.
    """
    if budget is None and depth in experiment.by_depth:
        recipe = experiment.by_depth[depth].items()
        own = {key: value for key, value in recipe if not any(sets(override, key) for override in overrides)}
        experiment = changed(experiment, own, f"by_depth.{depth}")
    wsd = experiment.optim.schedule == "wsd"
    # the warm-up is a share of the grid's smallest run, but for linear of the run itself
    trunk = Trunk(experiment, depth, seed, min(experiment.grid.budgets) if wsd or budget is None else budget)
    cell = trunk.cell(budget) if budget is not None else _cell_of_epochs(trunk)
    trunk.check()
    if wsd:
        check_lengths([cell], experiment.grid.min_steps)
    elif cell.steps < 1:
        raise ExperimentError(f"--budget {cell.budget_flops:g}: less than one step of depth {depth}")
    inputs = _inputs(experiment, runs, cell)
    forwarder.watch(inputs.tokenizer.folder)
    forwarder.start()
    try:
        _train_tokenizer(experiment, inputs)
        tokens = _encode(experiment, inputs, train_images([cell], inputs.data))
        return _train_cell(cell, inputs, tokens, forwarder)
    finally:
        forwarder.stop()


def _train_tokenizer(experiment: Experiment, inputs: "_Inputs") -> None:
    from varscale.tokenizer.training import train_tokenizer

    _set_threads(inputs.decided.tokenizer_threads)
    with _stage("tokenizer") as report:
        train_tokenizer(experiment, inputs.tokenizer, inputs.decided.tokenizer, report)


def _encode(experiment: Experiment, inputs: "_Inputs", images: int) -> TokenFiles:
    from varscale.tokenizer.training import encode_tokens, tokens_ready

    tokens = inputs.files.tokens(inputs.decided.tokens, images)
    if not tokens_ready(tokens, images):
        with _stage("tokens") as report:
            encode_tokens(experiment, inputs.tokenizer, inputs.decided.tokenizer, tokens, images, report)
    return tokens


def _train_cell(cell: Cell, made: "_Inputs", tokens: TokenFiles, forwarder: Forwarder) -> Path:
    from varscale.training.execution import choose_numerics, measure_matmul_peak
    from varscale.training.runs import Inputs, train_cell

    experiment, files, known = cell.trunk.experiment, made.files, made.decided
    numerics, seconds = known.numerics, dict[str, float]()
    if numerics is None:
        share = shares(experiment.runtime)
        numerics, seconds = choose_numerics(
            [(cell.trunk, cell.images)],
            experiment.runtime,
            share.threads,
            known.tokenizer_threads,
            share.workers_a_device,
        )
    numerics = store_numerics(files, experiment.runtime, numerics, seconds)
    cell.trunk.check_memory(numerics)
    peak = measure_matmul_peak(numerics.precision, numerics.threads)
    tokenizer = made.tokenizer.tokenizer_checkpoint
    inputs = Inputs(tokenizer, known.tokenizer, tokens, known.tokens, numerics, peak)
    print_ = cell.fingerprint(known.tokens, numerics)
    run = files.finished_cell(print_) or files.cell(cell.name, print_)
    forwarder.watch(run.folder)
    with _stage(cell.title) as report:
        train_cell(cell, None, run, inputs, report)
    return run.result


def _cell_of_epochs(trunk: Trunk) -> Cell:
    """The run of `optim.epochs` passes over stored images, its warm-up a share of itself."""
    from varscale.data.sources.of_experiment import training_source

    experiment = trunk.experiment
    if experiment.optim.epochs is None or experiment.data.kind == "rings":
        raise ExperimentError("name a --budget in FLOPs: optim.epochs is not set, or the data have no end")
    images = round(experiment.optim.epochs * len(training_source(experiment.data, 1)))
    steps = max(1, images // trunk.batch_size)
    budget = float(steps * trunk.batch_size * trunk.flops_per_image)
    return Trunk(experiment, trunk.depth, trunk.seed, budget).cell(budget)


class _Inputs(NamedTuple):
    files: ExperimentFiles
    data: DataIdentity
    decided: Decided
    tokenizer: RunFiles


def _inputs(experiment: Experiment, runs: Path, *cells: Cell) -> _Inputs:
    from varscale.data.sources.of_experiment import data_identity

    files, data = ExperimentFiles(runs, experiment.name), data_identity(experiment.data)
    known = decided(experiment, files, cells, data)
    return _Inputs(files, data, known, files.tokenizer(known.tokenizer))


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@contextmanager
def _stage(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on standard error how far a stage is: on a terminal at once, in a log now and then."""
    view = SweepView(Console(stderr=True), patient=True)
    try:
        yield lambda done, total: view.stage(name, done, total)
    except BaseException:
        view.clear()
        raise
    view.stage_done(name)
