"""The verb that draws images from a trained model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from varscale.cli.options import (
    ClassifierName,
    ClassifierWeights,
    Guidance,
    GuidanceSchedules,
    NoiseSeed,
    ShowScales,
    Smooth,
    Temperature,
    TopK,
    TopP,
    check_output,
    mistakes_as_one_line,
    patient_view,
)
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from torch import Tensor

    from varscale.families.base import SamplingOptions
    from varscale.generation.from_files import Drawable
    from varscale.generation.rejection import Rejection

Choice = tuple[int, str | None, Path | None]
"""Candidates of an image, and the classifier's name and weights."""
MOST_IMAGES = 2**24
MOST_IN_A_PICTURE = 10_000
MOST_SHOWN = 20


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
        if asked.labels in ("balanced", "as-training") and asked.labels not in drawable.class_names:
            raise ExperimentError(f"--labels {asked.labels}: for many images; name a folder, .npz or .parquet by --out")
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
    drawable, view = Drawable.load(*files), patient_view()
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
