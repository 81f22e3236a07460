"""What a single run is of: a tokenizer, its tokens, or one model of an experiment."""

from collections.abc import Sequence

from sweeps.grid import check_lengths, grid_cells
from sweeps.study import Study
from varscale.config import Experiment
from varscale.config.yaml import changed, sets
from varscale.errors import ExperimentError
from varscale.store.layout import Store
from varscale.training.cells import Cell, Trunk


def study_of_tokens(experiment: Experiment, store: Store) -> Study:
    """The study whose tokenizer and tokens are made: with the grid's cells where they say how many images to encode."""
    study = Study.of(experiment, store, ())
    return study if study.data.stored_images else Study.of(experiment, store, grid_cells(experiment))


def study_of_one(
    experiment: Experiment, store: Store, cell: tuple[int, float | None, int], overrides: Sequence[str] = ()
) -> Study:
    """The study whose one cell is trained from start to end, without trunk and branch.

    With a budget the run is the grid's cell, to the bit. Without, it takes `optim.epochs` passes, and `by_depth`'s
    recipe for its depth, but for fields that `overrides`, `key=value` as they were merged into the experiment, set;
    the study keeps its own settings, so that sizes trained by one experiment's recipes stand in one table. `cell` is
    depth, budget (training FLOPs) or None, and seed.

    Raises:
        ExperimentError: Neither a budget nor `optim.epochs`, or a budget of fewer steps than `grid.min_steps`.
    """
    (depth, budget, seed), settings = cell, experiment
    if budget is None and depth in experiment.by_depth:
        recipe = experiment.by_depth[depth].items()
        own = {key: value for key, value in recipe if not any(sets(override, key) for override in overrides)}
        experiment = changed(experiment, own, f"by_depth.{depth}")
    linear = experiment.optim.schedule == "linear"
    # the warm-up is a share of the grid's smallest run, but for linear of the run itself
    trunk = Trunk(experiment, depth, seed, budget if linear and budget else min(experiment.grid.budgets))
    one = trunk.cell(budget) if budget is not None else _cell_of_epochs(trunk)
    if not linear:
        check_lengths([one], experiment.grid.min_steps, "optim.epochs" if budget is None else "--budget")
    elif one.steps < 1:
        raise ExperimentError(f"--budget {one.budget_flops:g}: less than one step of depth {depth}")
    return Study.of(settings, store, (one,))


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
