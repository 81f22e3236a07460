"""Single runs: a tokenizer, its tokens, one model; in this process, on all of its threads."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from varscale.cells import Cell, Trunk, check_lengths
from varscale.config import Experiment
from varscale.config_files import ExperimentError, changed
from varscale.files import ExperimentFiles, RunFiles
from varscale.identity import (
    processors,
    store_numerics,
    stored_numerics,
    tokenizer_fingerprint,
    tokenizer_threads,
    tokens_fingerprint,
)


def make_tokenizer(experiment: Experiment, runs: Path) -> RunFiles:
    """Train and measure the experiment's tokenizer, unless that was done; its files."""
    from varscale.training.tokenizer_run import train_tokenizer

    files, fingerprint, _ = _tokenizer(experiment, runs)
    _set_threads(tokenizer_threads(experiment, ExperimentFiles(runs, experiment.name)))
    with _bar("tokenizer") as report:
        train_tokenizer(experiment, files, fingerprint, report)
    return files


def make_tokens(experiment: Experiment, runs: Path, train_images: int | None = None) -> Path:
    """Encode the images, unless that was done: as many as the grid's longest run sees, or `train_images`."""
    from sweeps.plan import selected_cells
    from sweeps.plan import train_images as longest_run
    from varscale.training.tokenizer_run import encode_tokens, tokens_ready

    tokenizer = make_tokenizer(experiment, runs)
    _, fingerprint, tokens = _tokenizer(experiment, runs)
    folder = ExperimentFiles(runs, experiment.name).tokens(tokens)
    images = longest_run(selected_cells(experiment)) if train_images is None else train_images
    if not tokens_ready(folder, images):
        with _bar("tokens") as report:
            encode_tokens(experiment, tokenizer, fingerprint, folder, images, report)
    return folder


def train_single(experiment: Experiment, depth: int, budget: float | None, seed: int, runs: Path) -> Path:
    """Train one model from start to end, without trunk and branch; its result file.

    With a budget the run is the grid's cell, to the bit. Without, it takes `optim.epochs` passes, and `by_depth`'s
    recipe for its depth.

    Raises:
        ExperimentError: neither a budget nor `optim.epochs`, or a budget of fewer steps than `grid.min_steps`.
    """
    from varscale.training.model_run import Inputs, train_cell
    from varscale.training.numerics import choose_numerics, measure_matmul_peak

    if budget is None and depth in experiment.by_depth:
        experiment = changed(experiment, experiment.by_depth[depth], f"by_depth.{depth}")
    wsd = experiment.optim.schedule == "wsd"
    # the warm-up is a share of the grid's smallest run, but for linear of the run itself
    trunk = Trunk(experiment, depth, seed, min(experiment.grid.budgets) if wsd or budget is None else budget)
    cell = trunk.cell(budget) if budget is not None else _cell_of_epochs(trunk)
    trunk.check()
    if wsd:
        check_lengths([cell], experiment.grid.min_steps)
    elif cell.steps < 1:
        raise ExperimentError(f"--budget {cell.budget_flops:g}: less than one step of depth {depth}")
    files = ExperimentFiles(runs, experiment.name)
    folder = make_tokens(experiment, runs, cell.images)
    tokenizer, tokenizer_print, tokens = _tokenizer(experiment, runs)
    numerics = stored_numerics(experiment, files)
    if numerics is None:
        threads = experiment.runtime.threads or processors()
        numerics, seconds = choose_numerics(
            [(trunk, cell.images)], experiment.runtime, threads, tokenizer_threads(experiment, files)
        )
        store_numerics(files, numerics, seconds)
    peak = measure_matmul_peak(numerics.precision, numerics.threads)
    inputs = Inputs(tokenizer.tokenizer_checkpoint, tokenizer_print, folder, tokens, numerics, peak)
    run = files.cell(cell.name, cell.fingerprint(tokens, numerics))
    with _bar(cell.title) as report:
        train_cell(cell, None, run, inputs, report)
    return run.result


def _cell_of_epochs(trunk: Trunk) -> Cell:
    """The run of `optim.epochs` passes over stored images, its warm-up a share of itself."""
    from varscale.data.experiment_sources import training_source

    experiment = trunk.experiment
    if experiment.optim.epochs is None or experiment.data.kind == "rings":
        raise ExperimentError("name a --budget in FLOPs: optim.epochs is not set, or the data have no end")
    images = round(experiment.optim.epochs * len(training_source(experiment.data, 1)))
    steps = max(1, images // trunk.batch_size)
    budget = float(steps * trunk.batch_size * trunk.flops_per_image)
    return Trunk(experiment, trunk.depth, trunk.seed, budget).cell(budget)


def _tokenizer(experiment: Experiment, runs: Path) -> tuple[RunFiles, str, str]:
    """The tokenizer's files, its fingerprint and that of its tokens."""
    from varscale.data.experiment_sources import data_identity

    files = ExperimentFiles(runs, experiment.name)
    data = data_identity(experiment.data)
    print_ = tokenizer_fingerprint(experiment, data, tokenizer_threads(experiment, files))
    return files.tokenizer(print_), print_, tokens_fingerprint(data, print_)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
