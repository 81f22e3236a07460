"""Verbs about one run, and its weights."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from varscale.cli.options import (
    RUNS,
    ExperimentName,
    Overrides,
    RunsDir,
    TrackingUri,
    check_output,
    load,
    mistakes_as_one_line,
    open_store,
    patient_view,
    tracking_store,
    whole_numbers,
)
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from sweeps.executors.here import HereExecutor
    from sweeps.jobs.base import Job
    from sweeps.study import Study
    from varscale.training.cells import Cell


def train(
    experiment: ExperimentName,
    depth: Annotated[int, typer.Option(min=1, max=1024, help="Transformer blocks.")],
    budget: Annotated[float | None, typer.Option(help="Training FLOPs; default: optim.epochs passes.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed.")] = 0,
    set_: Overrides = None,
    runs_dir: RunsDir = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train one model in a single run, without trunk and branch; with `by_depth`'s recipe where no budget is given."""
    from sweeps.orchestrator import Orchestrator
    from sweeps.single import study_of_one
    from varscale.tracking import Forwarder

    if budget is not None and not 0 < budget <= 1e30:
        raise ExperimentError(f"--budget {budget:g}: expected training FLOPs, such as 1e15")
    settings, store = load(experiment, set_), open_store(runs_dir)
    uri = tracking_store(tracking_uri, store)
    forwarder = Forwarder(uri, store, settings.name, notify=partial(typer.echo, err=True))
    with mistakes_as_one_line():
        study = study_of_one(settings, store, (depth, budget, seed), set_ or ())
        Orchestrator(study, patient_view(), forwarder).single(_executor(study, study.missing))
    typer.echo(study.cell_files(study.cells[0]).result)


def train_tokenizer(experiment: ExperimentName, set_: Overrides = None, runs_dir: RunsDir = RUNS) -> None:
    """Train and measure the tokenizer."""
    from sweeps.jobs.base import StudyPlace
    from sweeps.jobs.preparation import TokenizerJob
    from sweeps.study import Study

    study = Study.of(load(experiment, set_), open_store(runs_dir), ())
    _describe(study)
    _run([TokenizerJob(study.experiment, StudyPlace.of(study))], _executor(study))
    typer.echo(study.tokenizer.result)


def tokenize(experiment: ExperimentName, set_: Overrides = None, runs_dir: RunsDir = RUNS) -> None:
    """Encode the images into the token store."""
    from sweeps.jobs.base import StudyPlace
    from sweeps.jobs.preparation import TokenizerJob, TokensJob
    from sweeps.single import study_of_tokens

    study = study_of_tokens(load(experiment, set_), open_store(runs_dir))
    place = StudyPlace.of(study)
    jobs = [TokenizerJob(study.experiment, place), TokensJob(study.experiment, place, study.train_images)]
    _describe(study)
    _run(jobs, _executor(study))
    typer.echo(study.tokens.folder)


def run_job(file: Annotated[Path, typer.Argument(help="A run's job.json.")]) -> None:
    """Run one job of a study by itself, such as one that failed; it writes into the runs folder that its file is in."""
    from sweeps.executors.here import HereExecutor
    from sweeps.jobs.graph import read_job
    from varscale.numerics.machine import MachineShares

    job = read_job(file)
    if job.done():
        typer.echo(f"{job.title}: done already")
    else:
        job.place.store.check()
        _run([job], HereExecutor(MachineShares.of(job.experiment.runtime)))
    typer.echo(job.files.folder)


def import_official(
    checkpoint: Annotated[Path, typer.Argument(help="The reference's vae_*.pth, var_*.pth or ar-ckpt-*.pth.")],
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    patch_nums: Annotated[
        str | None,
        typer.Option(help="Sides of the token maps; default: as the file says, or 1,2,3,4,5,6,8,10,13,16."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A transformer's tokenizer, unless it is in the same file.")
    ] = None,
    entry: Annotated[str | None, typer.Option(help="Which model of a file that holds several.")] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="A transformer's blocks, if not as many as the reference has.")
    ] = None,
) -> None:
    """Turn a checkpoint of FoundationVision/VAR, or of its training, into ours; of both models into two files."""
    from varscale.official.files import import_checkpoint

    sides = None if patch_nums is None else whole_numbers("--patch-nums", patch_nums, least=1)
    if sides is not None and (sides != sorted({*sides}) or len(sides) > 64 or sides[-1] > 8192):
        raise ExperimentError(f"--patch-nums {patch_nums!s:.100}: expected sides that grow, to 8192 at most")
    _check_suffix(str(out), out, ".safetensors")
    with mistakes_as_one_line():
        for written in import_checkpoint(checkpoint, out, sides, tokenizer, entry=entry, depth=depth):
            typer.echo(written)


def export_official(
    model: Annotated[Path, typer.Argument(help="Our tokenizer or weights, .safetensors.")],
    out: Annotated[Path, typer.Argument(help="File to write, .pth.")],
) -> None:
    """Turn our model into a checkpoint of FoundationVision/VAR."""
    from varscale.official.files import export_checkpoint

    _check_suffix(str(out), out, ".pth")
    with mistakes_as_one_line():
        export_checkpoint(model, out)
    typer.echo(out)


def _check_suffix(place: str, path: Path, suffix: str) -> None:
    if path.is_dir():
        raise ExperimentError(f"{place}: a folder; name the {suffix} file to write")
    if path.suffix != suffix:
        raise ExperimentError(f"{place}: expected a name that ends in {suffix}")
    check_output(place, path)


def _describe(study: "Study") -> None:
    """Say what stored images there are."""
    for line in study.data.summary:
        typer.echo(line, err=True)


def _run(jobs: "list[Job]", executor: "HereExecutor") -> None:
    """Run jobs in this process; those that are done are left out."""
    with mistakes_as_one_line():
        executor.run([job for job in jobs if not job.done()], patient_view())


def _executor(study: "Study", missing: "Sequence[Cell]" = ()) -> "HereExecutor":
    """What makes a study's tokenizer and tokens here, and trains cells, once it is known that this machine can."""
    from sweeps.executors.here import HereExecutor
    from sweeps.feasible import check_machine
    from varscale.numerics.machine import MachineShares

    shares = MachineShares.of(study.experiment.runtime)
    check_machine(study, shares, missing)
    return HereExecutor(shares)
