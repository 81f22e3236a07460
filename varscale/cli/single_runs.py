"""Verbs about one run, its images and its weights."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from varscale.cli.options import (
    RUNS,
    ClassifierName,
    ClassifierWeights,
    ExperimentName,
    Guidance,
    GuidanceSchedules,
    NoiseSeed,
    Overrides,
    RunsDir,
    ShowScales,
    Smooth,
    Temperature,
    TopK,
    TopP,
    TrackingUri,
    check_output,
    load,
    mistakes_as_one_line,
    open_store,
    tracking_store,
    whole_numbers,
)
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from torch import Tensor

    from sweeps.executors.here import HereExecutor
    from sweeps.jobs.base import Job
    from sweeps.study import Study
    from sweeps.view import SweepView
    from varscale.families.base import SamplingOptions
    from varscale.generation.from_files import Drawable
    from varscale.generation.rejection import Rejection
    from varscale.training.cells import Cell

Choice = tuple[int, str | None, Path | None]
"""Candidates of an image, and the classifier's name and weights."""
MOST_IMAGES = 2**24
MOST_IN_A_PICTURE = 10_000
MOST_SHOWN = 20


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
        Orchestrator(study, _view(), forwarder).single(_executor(study, study.missing))
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


def sample(
    run: Annotated[Path, typer.Argument(help="Folder of a finished cell, or a model's .safetensors file.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer's file, for a model's file.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes in turn, such as 0,1,2, or by name, such as cat,dog; none: no class; or for a folder, .npz "
            "or .parquet: balanced (all in turn; the default), or as-training (in the training images' proportions)."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="What to draw, in words, for a cell that is told captions; may be repeated; none: no caption."
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Images of each class or text in a picture (4); else images in all.")
    ] = None,
    guidance: Guidance = 1.5,
    guidance_schedule: GuidanceSchedules = "ramp",
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 0.0,
    smooth: Smooth = False,
    steps: Annotated[
        int, typer.Option(min=0, max=10**6, help="Passes (masked) or steps (diffusion); 0: the model's own.")
    ] = 0,
    show_scales: ShowScales = False,
    seed: NoiseSeed = 0,
    candidates: Annotated[
        int,
        typer.Option(min=1, max=256, help="Keep 1 of so many drawn images by a classifier (rejection sampling)."),
    ] = 1,
    classifier: ClassifierName = None,
    classifier_weights: ClassifierWeights = None,
    batch: Annotated[
        int, typer.Option(min=1, max=2**16, help="Images drawn at once, where not into one picture.")
    ] = 64,
    out: Annotated[
        str, typer.Option(help="One picture (.png), a folder of PNGs, an .npz (guided-diffusion's) or a .parquet.")
    ] = "samples.png",
) -> None:
    """Sample images of a trained model: one picture to look at, or as many as measures need.

    Into a folder, .npz or .parquet, an interrupted call is gone on with by the same call.
    """
    if count is not None and not 1 <= count <= MOST_IMAGES:
        raise ExperimentError(f"--count {count}: expected at least 1 and at most {MOST_IMAGES}")
    if candidates == 1 and (classifier or classifier_weights):
        raise ExperimentError("--classifier: has nothing to choose; say by --candidates 4, say, among how many images")
    from varscale.families.base import SamplingOptions
    from varscale.generation.collection import is_folder

    with mistakes_as_one_line():
        choice = candidates, classifier, classifier_weights
        options = SamplingOptions(guidance, top_k, top_p, seed, True, guidance_schedule, temperature, smooth, steps)
        if Path(out).suffix != ".png" or is_folder(out):
            if show_scales:
                raise ExperimentError("--show-scales: only for one picture, a .png")
            _sample_many((run, tokenizer), _Asked(labels, text), count, options, batch, out, choice)
        else:
            if smooth and show_scales:
                raise ExperimentError("--smooth: its mixed codes aren't kept, so --show-scales can't show them")
            rows, files = count or 4, (run, tokenizer)
            _sample_picture(files, _Asked(labels, text), rows, options, out, choice, show_scales=show_scales)
    typer.echo(out)


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


class _Asked(NamedTuple):
    """What is to be drawn."""

    labels: str | None
    texts: list[str] | None

    @property
    def parts(self) -> int:
        """How many classes or texts."""
        return max(len(self.texts or ()), (self.labels or "").count(",") + 1)

    def check(self, drawable: "Drawable") -> bool:
        """Whether the model is told captions; it is an error to ask it for the other."""
        told_captions = drawable.model.config.text_width is not None
        if told_captions and self.labels is not None:
            raise ExperimentError(
                f"--labels: {drawable.place} was told captions, not classes; say by --text what to draw"
            )
        if self.texts is not None and not told_captions:
            raise ExperimentError(f"--text: {drawable.place} was told classes, not captions; name classes by --labels")
        return told_captions


def _sample_picture(
    files: tuple[Path, Path | None],
    asked: _Asked,
    rows: int,
    options: "SamplingOptions",
    out: str,
    choice: Choice,
    *,
    show_scales: bool,
) -> None:
    from varscale.generation.from_files import Drawable, draw
    from varscale.generation.labels import NO_CLASS

    if asked.parts * rows * choice[0] > MOST_IN_A_PICTURE:
        raise ExperimentError(f"--count {rows}: one picture holds {MOST_IN_A_PICTURE} images; name a folder")
    check_output(f"--out {out}", Path(out))
    drawable = Drawable.load(*files)
    if asked.check(drawable):
        texts = asked.texts or (drawable.captions and drawable.captions.shown) or [NO_CLASS]
        _say_texts(texts)
        named: Sequence[int] | Tensor = drawable.embedded(texts)
    else:
        named = _labels(asked.labels or "0", drawable)
    rejection = _rejection(choice, drawable, named)
    draw(drawable, named, rows, options, Path(out), show_scales=show_scales, rejection=rejection)
    _say_what_was_kept(rejection)


def _labels(text: str, drawable: "Drawable", keywords: str = "") -> list[int]:
    """Labels of the classes that `--labels` names, which are said where they have names."""
    from varscale.generation.labels import in_words, labels_of

    names = drawable.class_names
    labels = labels_of("--labels", text, drawable.model.config.num_classes, names, keywords=keywords)
    if names:
        typer.echo(f"classes: {in_words(labels, names)}", err=True)
    return labels


def _say_texts(texts: Sequence[str]) -> None:
    typer.echo("\n".join(f"text: {text}" for text in texts[:MOST_SHOWN]), err=True)


def _sample_many(
    files: tuple[Path, Path | None],
    asked: _Asked,
    count: int | None,
    options: "SamplingOptions",
    batch: int,
    out: str,
    choice: Choice,
) -> None:
    from varscale.generation.bulk import draw_collection, labels_in_proportion, labels_in_turn
    from varscale.generation.collection import Collection, drawn_alone, is_folder
    from varscale.generation.from_files import Drawable

    Collection.at(out)  # what can't be is said before anything is done
    if count is None:
        raise ExperimentError(f"--out {out}: say by --count how many images to draw")
    check_output(f"--out {out}", Path(out) / "0.png" if is_folder(out) else Path(out))
    drawable, view = Drawable.load(*files), _view()
    labels, captions = asked.labels or "balanced", list[str]()
    if asked.check(drawable):
        if asked.texts:
            _say_texts(asked.texts)
            captions = [asked.texts[i % len(asked.texts)] for i in range(count)]
            labels_N = labels_in_turn(drawable.embedded(asked.texts), count)
        else:
            captions, labels_N = drawable.training_captions(count)
    elif labels == "as-training":
        labels_N = labels_in_proportion(drawable.training_labels(), count, options.seed)
    elif labels == "balanced":
        labels_N = labels_in_turn(range(drawable.model.config.num_classes), count)
    else:
        labels_N = labels_in_turn(_labels(labels, drawable, "balanced, as-training, "), count)
    rejection = _rejection(choice, drawable, labels_N)
    with drawn_alone(out):
        collection, progress = Collection.at(out), partial(view.stage, "drawing")
        draw_collection(
            drawable,
            labels_N,
            options,
            collection,
            progress,
            batch_size=batch,
            rejection=rejection,
            captions=captions,
        )
    view.stage_done("drawing")
    _say_what_was_kept(rejection)


def _rejection(choice: Choice, drawable: "Drawable", labels: "Sequence[int] | Tensor") -> "Rejection | None":
    """What chooses among candidates, by the classifier that is named or the experiment's own."""
    candidates, classifier, weights = choice
    if candidates == 1:
        return None
    if drawable.model.config.text_width is not None:
        raise ExperimentError(f"--candidates: classifiers choose by class, and {drawable.place} was told captions")
    import torch

    from sweeps.jobs.graph import read_job
    from varscale.generation.rejection import Rejection, open_classifier

    data = store = None
    if (drawable.place / "job.json").is_file():
        job = read_job(drawable.place / "job.json")
        data, store = job.experiment.data, job.place.store
    file = None if weights is None else str(weights)
    rejection = Rejection(open_classifier(classifier, file, data, store, place="--classifier"), candidates)
    rejection.check(drawable.model.config.num_classes, drawable.tokenizer.image_size, torch.as_tensor(labels).unique())
    return rejection


def _say_what_was_kept(rejection: "Rejection | None") -> None:
    if rejection is None or not rejection.chosen:  # all were there already
        return
    figures = rejection.figures
    typer.echo(
        f"kept 1 of {rejection.candidates} (keep rate {figures['keep_rate']:.3g}): the probability of an image's own "
        f"class, by {rejection.classifier.identity}, is {figures['class_probability']:.3f} on average, and "
        f"{figures['class_probability_of_all']:.3f} of all that were drawn now",
        err=True,
    )


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
        executor.run([job for job in jobs if not job.done()], _view())


def _executor(study: "Study", missing: "Sequence[Cell]" = ()) -> "HereExecutor":
    """What makes a study's tokenizer and tokens here, and trains cells, once it is known that this machine can."""
    from sweeps.executors.here import HereExecutor
    from sweeps.feasible import check_machine
    from varscale.numerics.machine import MachineShares

    shares = MachineShares.of(study.experiment.runtime)
    check_machine(study, shares, missing)
    return HereExecutor(shares)


def _view() -> "SweepView":
    """Shows on standard error how far a run is: on a terminal at once, in a log now and then."""
    from rich.console import Console

    from sweeps.view import SweepView

    return SweepView(Console(stderr=True), patient=True)
