"""The cells of an experiment: its grid of depth × budget × seed, and its variants. Pure."""

from collections.abc import Iterable, Sequence

from varscale.config import Experiment
from varscale.config.yaml import changed
from varscale.errors import ExperimentError
from varscale.training.cells import Cell, Trunk


def grid_cells(experiment: Experiment) -> tuple[Cell, ...]:
    """All cells of an experiment's grid and variants, each once, sizes in order, budgets rising.

    Raises:
        ExperimentError: Cells of fewer than `grid.min_steps` steps, a warm-up that runs into a decay, or a variant
            whose settings are invalid.
    """
    grid = experiment.grid
    _check_schedule(experiment, "optim.schedule")
    cells = [
        cell
        for depth in grid.depths
        for seed in grid.seeds
        for cell in _cells(experiment, depth, seed, "", grid.budgets)
    ]
    for variant in grid.variants:
        source = f"grid.variants: {variant.name}"
        for key in variant.settings:
            if not key.startswith(("model.", "optim.")):
                raise ExperimentError(f"{source}: {key}: only fields of model and optim can vary within a study")
        altered = changed(experiment, variant.settings, source)
        _check_schedule(altered, f"{source}: optim.schedule")
        name = variant.name if variant.settings else ""  # further seeds of the same recipe are cells like any other
        for depth in variant.depths:
            for seed in variant.seeds:
                cells += _cells(altered, depth, seed, name, variant.budgets)
    check_lengths(cells, grid.min_steps)
    _check_repeats(cells)
    unique: dict[tuple[str, float], Cell] = {}
    for cell in cells:
        unique.setdefault((cell.trunk.label, cell.budget_flops), cell)
    return tuple(unique.values())


def check_lengths(cells: Sequence[Cell], min_steps: int, budgets: str = "grid.budgets") -> None:
    """Raise `ExperimentError` for models that can't be, cells of fewer steps, and warm-ups that run into the decay."""
    short = [cell for cell in cells if cell.steps < min_steps]
    if short:
        worst = min(short, key=lambda cell: cell.steps)
        needed = [min_steps * cell.trunk.flops_per_image * cell.trunk.batch_size for cell in (worst, *short)]
        raise ExperimentError(
            f"{budgets}: {len(short)} of the cells have fewer than grid.min_steps = {min_steps} steps; depth "
            f"{worst.trunk.depth} at {worst.budget_flops:.3g} FLOPs has {worst.steps} and needs "
            f"{_rounded_up(needed[0])}; the smallest budget that every size can hold needs {_rounded_up(max(needed))} "
            "FLOPs"
        )
    for cell in cells:
        optim = cell.trunk.experiment.optim
        if optim.schedule == "cosine" and not 0 < cell.branch_images < cell.images:
            raise ExperimentError(
                f"optim.warmup_fraction: the warm-up takes {cell.trunk.warmup_images} of the {cell.images} images of "
                f"{cell.title}: a cosine needs a step before its end, and one after it"
            )
        if optim.schedule == "wsd" and not 0 < cell.decay_images < cell.images:
            raise ExperimentError(
                f"optim.decay_fraction: {optim.decay_fraction:g} of the {cell.steps} steps of "
                f"{cell.title} leaves no whole step to decay the rate over, or none before"
            )
        if cell.branch_images < cell.trunk.warmup_images:
            raise ExperimentError(
                f"optim.warmup_fraction: the warm-up takes {cell.trunk.warmup_images} images, but the decay of "
                f"{cell.title} starts at {cell.branch_images} of {cell.images}: lower it, or optim.decay_fraction"
            )


def unfit_sizes(trunks: Iterable[Trunk], memory_bytes: float) -> str:
    """Names the sizes of which not even one image fits into the memory that a run has; "" where all fit."""
    unfit = {trunk.depth: trunk for trunk in trunks if not trunk.fits(memory_bytes)}
    if not unfit:
        return ""
    needs = ", ".join(
        f"depth {depth} needs {trunk.step_bytes(1) / 2**30:.1f} GiB" for depth, trunk in sorted(unfit.items())
    )
    return f"grid.depths: for a step of one image {needs}, and a run has {memory_bytes / 2**30:.1f} GiB"


def _rounded_up(flops: int) -> str:
    """With three digits, and no less."""
    digit = 10 ** max(0, len(str(flops)) - 3)
    return f"{-(-flops // digit) * digit:.3g}"


def _check_schedule(experiment: Experiment, key: str) -> None:
    if experiment.optim.schedule == "linear":
        raise ExperimentError(f"{key}: a grid's cells leave the trunk of their size, which wsd and cosine allow")


def _check_repeats(cells: Sequence[Cell]) -> None:
    budgets: dict[tuple[str, int], float] = {}
    for cell in cells:
        first = budgets.setdefault((cell.trunk.label, cell.steps), cell.budget_flops)
        if first != cell.budget_flops:
            raise ExperimentError(
                f"grid.budgets: {first:.6g} and {cell.budget_flops:.6g} are the same run of {cell.steps} steps at "
                f"depth {cell.trunk.depth}: leave one out"
            )


def _cells(experiment: Experiment, depth: int, seed: int, variant: str, budgets: Iterable[float]) -> Iterable[Cell]:
    trunk = Trunk(experiment, depth, seed, min(experiment.grid.budgets), variant)
    return [trunk.cell(budget) for budget in sorted(budgets)]
