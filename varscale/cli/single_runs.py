"""Verbs about one run, its images and its weights."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from varscale.cli.errors import mistakes_as_one_line
from varscale.cli.options import (
    DEFAULT_RUNS,
    ExperimentName,
    Overrides,
    RunsDir,
    TrackingUri,
    load,
    tracking_store,
    whole_numbers,
)
from varscale.errors import ExperimentError
from varscale.store.layout import ExperimentFiles


def train(
    experiment: ExperimentName,
    depth: Annotated[int, typer.Option(min=1, help="Transformer blocks.")],
    budget: Annotated[float | None, typer.Option(help="Training FLOPs; default: optim.epochs passes.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed.")] = 0,
    set_: Overrides = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train one model in a single run, without trunk and branch; with `by_depth`'s recipe where no budget is given."""
    from sweeps.single import train_single
    from varscale.tracking import Forwarder

    if budget is not None and not 0 < budget < float("inf"):
        raise ExperimentError(f"--budget {budget:g}: expected training FLOPs, such as 1e15")
    settings = load(experiment, set_)
    files = ExperimentFiles(runs_dir, settings.name)
    forwarder = Forwarder(tracking_store(tracking_uri, files), files, notify=partial(typer.echo, err=True))
    with mistakes_as_one_line(of_training=True):
        result = train_single(settings, depth, budget, seed, runs_dir, forwarder, set_ or ())
    typer.echo(result)


def train_tokenizer(experiment: ExperimentName, set_: Overrides = None, runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """Train and measure the tokenizer."""
    from sweeps.single import make_tokenizer

    with mistakes_as_one_line(of_training=True):
        typer.echo(make_tokenizer(load(experiment, set_), runs_dir).result)


def tokenize(experiment: ExperimentName, set_: Overrides = None, runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """Encode the images into the token store."""
    from sweeps.single import make_tokens

    with mistakes_as_one_line(of_training=True):
        typer.echo(make_tokens(load(experiment, set_), runs_dir).folder)


def sample(
    run: Annotated[Path, typer.Argument(help="Folder of a finished cell.")],
    labels: Annotated[str, typer.Option(help="Classes, such as 0,1,2.")] = "0",
    count: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 4,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance at the last scale.")] = 1.5,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among tokens of this probability; 0: all.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
) -> None:
    """Sample images of a finished cell."""
    from varscale.generation.from_files import draw

    _check_suffix(f"--out {out}", out, ".png")
    with mistakes_as_one_line():
        draw(run, whole_numbers("--labels", labels), count, guidance, top_k, top_p, seed, out)
    typer.echo(out)


def import_official(
    checkpoint: Annotated[Path, typer.Argument(help="The reference's vae_*.pth or var_*.pth.")],
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    patch_nums: Annotated[str, typer.Option(help="Sides of the token maps.")] = "1,2,3,4,5,6,8,10,13,16",
    tokenizer: Annotated[Path | None, typer.Option(help="Imported tokenizer, for a var_*.pth.")] = None,
) -> None:
    """Turn a checkpoint of FoundationVision/VAR into ours."""
    from varscale.official.files import import_checkpoint

    _check_suffix(str(out), out, ".safetensors")
    with mistakes_as_one_line():
        import_checkpoint(checkpoint, out, whole_numbers("--patch-nums", patch_nums), tokenizer)
    typer.echo(out)


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
