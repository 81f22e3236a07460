"""Verbs about pictures that the user brings: edited by a model, or reconstructed by its tokenizer."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from varscale.cli.options import (
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
    whole_numbers,
)
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from varscale.generation.editing import DistanceBand


def edit(
    run: Annotated[Path, typer.Argument(help="Folder of a finished cell, or a model's .safetensors file.")],
    image: Annotated[Path, typer.Argument(help="The picture to edit, of the model's size.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer's file, for a model's file.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture of the same size; its white is drawn anew.")] = None,
    box: Annotated[
        str | None, typer.Option(help="left,top,right,bottom in pixels, drawn anew, in place of a mask.")
    ] = None,
    outside: Annotated[bool, typer.Option("--outside", help="Draw all but that anew: out-painting.")] = False,
    label: Annotated[
        str | None, typer.Option(help="The class that is drawn, by its number or name; none is the default.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="What is drawn, in words, by a cell that is told captions; none is the default.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="How many edits, each with its own noise.")] = 4,
    source_scales: Annotated[
        int, typer.Option(min=0, help="First scales that are all the source's; 1: as in the reference.")
    ] = 0,
    composite: Annotated[
        bool, typer.Option("--composite", help="Paste the source's pixels over what is not masked.")
    ] = False,
    guidance: Guidance = 1.5,
    guidance_schedule: GuidanceSchedules = "ramp",
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 0.0,
    smooth: Smooth = False,
    show_scales: ShowScales = False,
    seed: NoiseSeed = 0,
    out: Annotated[Path, typer.Option(help="Picture of source, mask, reconstruction and edits, .png.")] = Path(
        "edit.png"
    ),
) -> None:
    """Draw a part of a picture anew, as none or another class or text: in- and out-painting, conditional editing.

    Beside the picture, each edit has a file of its own, and a .csv says how alike source and edits are by distance.
    """
    if (mask is None) == (box is None):
        raise ExperimentError("say by --mask FILE or by --box left,top,right,bottom what is drawn anew (one of both)")
    corners = whole_numbers("--box", box) if box is not None else []
    if corners and len(corners) != 4:
        raise ExperimentError(f"--box {box!s:.100}: expected left,top,right,bottom in pixels, such as 8,8,24,24")
    if smooth and show_scales:
        raise ExperimentError("--smooth: its mixed codes aren't kept, so --show-scales can't show them")
    _check_picture(out)
    from varscale.families.base import SamplingOptions
    from varscale.generation.edited_files import EditRegion, EditRequest, edit_files
    from varscale.generation.from_files import DrawableFiles

    with mistakes_as_one_line():
        options = SamplingOptions(guidance, top_k, top_p, seed, True, guidance_schedule, temperature, smooth)
        region = EditRegion(mask, (corners[0], corners[1], corners[2], corners[3]) if corners else None, outside)
        request = EditRequest(image, region, label, text, count, source_scales, composite, show_scales)
        bands = edit_files(DrawableFiles.find(run, tokenizer), request, options, out)
    _print_bands(bands)
    typer.echo(out)


def reconstruct(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer's .safetensors file or folder, or a cell's folder.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures of the tokenizer's size.")],
    show_scales: ShowScales = False,
    out: Annotated[Path, typer.Option(help="The picture to write, .png.")] = Path("reconstructions.png"),
) -> None:
    """Show pictures beside what the tokenizer makes of them, a row a picture, and print each one's PSNR."""
    _check_picture(out)
    from varscale.generation.edited_files import reconstruct_files

    with mistakes_as_one_line():
        ratios = reconstruct_files(tokenizer, images, out, show_scales=show_scales)
    for image, ratio in zip(images, ratios, strict=True):
        typer.echo(f"{image}: PSNR {_decibels(ratio)}")
    typer.echo(out)


def _check_picture(out: Path) -> None:
    if out.suffix != ".png":
        raise ExperimentError(f"--out {out}: expected a name that ends in .png")
    check_output(f"--out {out}", out)


def _print_bands(bands: "list[DistanceBand]") -> None:
    from varscale.generation.edited_files import PAIRS

    typer.echo(f"{'from the mask':>16}  {'pixels':>7}  " + "  ".join(PAIRS) + "  (PSNR)")
    for band in bands:
        place = "in the mask" if band.farthest == 0 else f"{band.nearest} … {band.farthest} px"
        values = (f"{_decibels(value):>{len(pair)}}" for value, pair in zip(band.psnr, PAIRS, strict=True))
        typer.echo(f"{place:>16}  {band.pixels:>7}  " + "  ".join(values))


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f} dB"
