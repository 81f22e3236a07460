"""Verbs that come before a study: a first experiment for one's pictures, and a tokenizer chosen by its arithmetic."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from varscale.cli.options import RUNS, RunsDir, check_new_output, mistakes_as_one_line, open_store
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from varscale.config.tokenizer import TokenizerArchitecture
    from varscale.families.shared.description import TransformerDescription

ADVICE = (
    "► proposed. More scales cost tokens, and each one a pass; whether fewer are worse was not measured. The last "
    "scale of latents twice as fine has four times the tokens. Codes beyond what the images fill stay unused. "
    "Likelihoods compare only on equal tokens: one choice for a whole study. What was measured: docs/tokenizers.md."
)


def init(
    data: Annotated[Path, typer.Argument(help="Folder of images, folder of Parquet files, or Parquet file.")],
    out: Annotated[Path | None, typer.Option(help="The YAML file to write; default: named after the data.")] = None,
    hours: Annotated[float, typer.Option(help="What the sweep may take on this machine.")] = 1.0,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Look at pictures and at this machine, and write an experiment for `varscale sweep` that says why."""
    if not 0 < hours <= 10_000:
        raise ExperimentError(f"--hours {hours:g}: expected a number above 0 and up to 10,000, such as 1 or 0.2")
    named = re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem if out else data.absolute().stem)
    name = named[:100].strip("-._") or "images"
    out = out or Path(f"{name}.yaml")
    if out.suffix not in (".yaml", ".yml"):
        raise ExperimentError(f"--out {out}: expected a name that ends in .yaml")
    check_new_output(out)
    from rich.console import Console

    from sweeps.calibration import calibrate
    from sweeps.devices import Paces
    from sweeps.draft import Drafter
    from sweeps.grid import grid_cells
    from varscale.config import Experiment, RuntimeConfig
    from varscale.data.sources.finding import find_data
    from varscale.numerics.machine import MachineShares
    from varscale.store.atomic import write_atomically
    from varscale.training.execution import measure_matmul_peak

    with mistakes_as_one_line():
        store, console = open_store(runs_dir, writing=False), Console(stderr=True)
        found = find_data(data)
        gpu = MachineShares.of(RuntimeConfig()).gpus > 0

        def measure(experiment: Experiment) -> Paces:
            return calibrate(experiment, grid_cells(experiment), store, console)

        draft = Drafter(found, name, hours, measure, gpu=gpu).draft(
            measure_matmul_peak("bfloat16" if gpu else "float32")
        )
    write_atomically(out, draft.text.encode())
    not_used = [f"  not used: {remark}" for remark in found.remarks]
    typer.echo("\n".join([*found.summary(draft.choices.image_size), *not_used, draft.summary(), str(out)]))


def design_tokenizer(
    image_size: Annotated[int, typer.Option(min=8, max=8192, help="Side of the images, pixels.")],
    tokens: Annotated[
        int | None, typer.Option(min=5, help="Tokens an image, about; default: a usual schedule.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Training images that there are to fill a codebook.")
    ] = None,
    blocks: Annotated[int, typer.Option("--depth", min=1, max=1024, help="Of the transformer that is counted.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Write the proposed section there, instead of printing it.")] = None,
) -> None:
    """Compare schedules of scales, codebooks and networks by what they cost, and write the section `tokenizer`."""
    if out is not None:
        check_new_output(out)
    from rich.console import Console

    from varscale.store.atomic import write_atomically
    from varscale.tokenizer.design import architecture, nearest_in_tokens, schedules, section_lines, variations

    if tokens is None:
        proposed = architecture(image_size, images=images)
    else:
        proposed = nearest_in_tokens(image_size, tokens, images)
    others = [each for each in schedules(image_size, images) if each != proposed]
    listed = sorted([proposed, *others], key=lambda each: (each.downsampling, each.tokens_per_image))
    rows = [("► " * (each == proposed) + " ".join(map(str, each.patch_nums)), each) for each in listed]
    console = Console()
    for table in (_costs("scales", rows, blocks), _costs("► with", list(variations(proposed)), blocks)):
        console.width = max(console.width, console.measure(table, options=console.options.update_width(1000)).maximum)
        console.print(table)
    typer.echo(
        "FLOPs and memory are of one image: encode and decode of the tokenizer, MiB that its training step keeps "
        f"beside the weights, about; model: the paper's transformer of {blocks} blocks, pairs: share of attention in "
        "its FLOPs.\n"
        f"{ADVICE}\n"
    )
    text = "\n".join(section_lines(proposed, images)) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    write_atomically(out, text.encode())
    typer.echo(out)


def _costs(title: str, rows: "Sequence[tuple[str, TokenizerArchitecture]]", blocks: int) -> "Table":
    """What each tokenizer costs, and a transformer over its tokens; FLOPs and memory of one image."""
    from rich.box import SIMPLE
    from rich.table import Table

    from varscale.tokenizer.shape import TokenizerShape

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    columns = ("px a token", "passes", "growth", "tokens", "codes", "φ", "params", "encode", "decode", "MiB")
    for column in (title, *columns, "model", "forward", "pairs", "MiB"):
        table.add_column(column, justify="left" if column == title else "right", no_wrap=True)
    for name, made in rows:
        shape, model, scales = TokenizerShape(made), _model(made, blocks), len(made.patch_nums)
        table.add_row(
            name,
            f"{made.downsampling}",
            f"{scales}",
            f"{made.latent_size ** (1 / max(1, scales - 1)):.2f}",
            f"{made.tokens_per_image:,}",
            f"{made.vocab_size:,}",
            f"{made.phi_count}",
            f"{shape.parameters():.3g}",
            f"{shape.encode_flops():.3g}",
            f"{shape.decode_flops():.3g}",
            f"{shape.activation_bytes(1) / 2**20:,.0f}",
            f"{model.parameters():.3g}",
            f"{model.forward_flops():.3g}",
            f"{model.attention_flops() / model.forward_flops():.0%}",
            f"{model.activation_bytes(1) / 2**20:,.0f}",
        )
    return table


def _model(made: "TokenizerArchitecture", blocks: int) -> "TransformerDescription":
    """The paper's transformer of so many blocks, for 1,000 classes."""
    from varscale.families.base import TokenSpace
    from varscale.families.var.config import VARSection

    sizes = {name: getattr(made, name) for name in ("patch_nums", "vocab_size", "latent_channels")}
    section = VARSection(drop_path_at_depth_24=0.0)  # costs nothing, and would end at 240 blocks
    return section.describe(TokenSpace(**sizes, num_classes=1000), blocks)
