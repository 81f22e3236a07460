"""The verb that looks into a trained model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from varscale.cli.options import NoiseSeed, check_output, mistakes_as_one_line
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from varscale.generation.from_files import Drawable

UNCHANGED = 1e-3
"""Largest change of a logit that is rounding."""


def inspect(
    what: Annotated[Literal["attention", "parallel"], typer.Argument(help="What to look at.")],
    run: Annotated[Path, typer.Argument(help="Folder of a finished cell; for attention a .safetensors file, too.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer's file, for a model's file.")] = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="Attention: images that the model draws.")] = 8,
    steps: Annotated[
        int, typer.Option(min=10, max=10**6, help="Parallel: steps of 64 images that corrections are trained for.")
    ] = 3000,
    seed: NoiseSeed = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Attention: the heat map, .png or .svg, with a .csv; parallel: a .csv of the table."),
    ] = None,
) -> None:
    """Show what a model attends to, or what it loses by predicting all tokens of a scale at once.

    attention: which share of its attention each scale pays to each scale, and a check that no scale sees a later one.
    parallel: in nats a token, what half of a scale's tokens would tell a second pass about the other half.
    """
    from varscale.families.var.transformer import VAR
    from varscale.generation.from_files import Drawable

    suffixes = (".png", ".svg") if what == "attention" else (".csv",)
    out = out or Path(f"{what}{suffixes[0]}")
    if out.suffix not in suffixes:
        raise ExperimentError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    check_output(f"--out {out}", out)
    with mistakes_as_one_line():
        drawable = Drawable.load(run, tokenizer)
        if not isinstance(drawable.model, VAR):
            raise ExperimentError(
                f"{run}: a model of family {drawable.model.config.family}; only VAR's are looked into"
            )
        if what == "parallel":
            if drawable.model.config.draws != "tokens":
                raise ExperimentError(f"{run}: its classifier chooses bits; parallel compares chances of whole tokens")
            _parallel(drawable, steps, seed, out)
        elif _attention(drawable, count, seed, out):
            raise typer.Exit(1)


def _attention(drawable: "Drawable", count: int, seed: int, out: Path) -> bool:
    """Write the heat map and print the check; gives whether it failed."""
    from analysis.report.attention import attention_map
    from varscale.evaluation.attention import attention_shares, dependence
    from varscale.generation.bulk import labels_in_turn
    from varscale.generation.sampling import sample
    from varscale.store.atomic import write_atomically

    model: Any = drawable.model
    device = next(model.parameters()).device
    if model.config.text_width is None:
        labels_B = labels_in_turn(range(model.config.num_classes), count).to(device)
    else:
        labels_B = drawable.training_captions(count)[1].to(device)
    drawn = sample(model, drawable.tokenizer, labels_B, seed=seed)
    shares = _table(attention_shares(model, drawable.tokenizer, drawn.tokens, labels_B))
    changes_KK = dependence(model, drawable.tokenizer, drawn.tokens, labels_B, seed)
    drawing = attention_map(shares)
    write_atomically(out.with_suffix(".csv"), shares.to_csv(index=False).encode())
    write_atomically(out, drawing.png if out.suffix == ".png" else drawing.svg.encode())
    failed = _say_who_sees_whom(changes_KK)
    typer.echo(out)
    return failed


def _parallel(drawable: "Drawable", steps: int, seed: int, out: Path) -> None:
    """Train the corrections, print and write what sight of half a scale is worth."""
    import pandas as pd
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from varscale.data.loading import EvaluationBatches, StepBatches
    from varscale.data.tokens.store import TokenStore
    from varscale.evaluation.halves import predictions, second_halves
    from varscale.store.atomic import write_atomically

    model: Any = drawable.model
    tokens = drawable.tokens()
    training, validation = (TokenStore.open(folder) for folder in (tokens.train, tokens.validation))
    batches = StepBatches(store=training, seed=seed, batch_size=64, start_step=0, num_steps=steps)
    halves = second_halves(
        predictions(model, drawable.tokenizer),
        batches,
        EvaluationBatches(validation, batch_size=256),
        model.config,
        seed,
        model.level_KC.device,
    )
    title = "loss of each scale's second half, nats a token: the model, corrected without and with sight of the first"
    table = Table("scale", "tokens", "model", "without", "with", "worth", box=SIMPLE, title=title)
    for half in halves:
        numbers = (f"{each:.4f}" for each in (half.model, half.without, half.seen))
        table.add_row(
            f"{half.side} × {half.side}", str(half.tokens), *numbers, f"{half.gain:.4f} ± {half.half_width:.4f}"
        )
    Console().print(table)
    worth = sum(half.gain * half.tokens for half in halves)
    typer.echo(f"{worth:.3f} nats an image that a second pass in each scale could use")
    rows = pd.DataFrame([asdict(half) | {"gain": half.gain} for half in halves])
    write_atomically(out, rows.to_csv(index=False).encode())
    typer.echo(out)


def _table(shares_DHKK: "Tensor") -> "pd.DataFrame":
    import numpy as np
    import pandas as pd

    places = np.indices(shares_DHKK.shape).reshape(4, -1) + 1
    columns = dict(zip(("layer", "head", "scale", "to_scale"), places, strict=True))
    return pd.DataFrame({**columns, "share": shares_DHKK.flatten().numpy()})


def _say_who_sees_whom(changes_KK: "Tensor") -> bool:
    """Print the proof; gives whether it failed."""
    earlier, later = float(changes_KK.tril().max()), changes_KK[changes_KK.new_ones(changes_KK.shape).triu(1).bool()]
    seen = not earlier <= UNCHANGED  # also where it is no number
    typer.echo(
        f"with a scale's tokens replaced, logits of that scale and of earlier ones change by at most {earlier:.1g}"
        + (f", those of later ones by up to {float(later.max()):.2g}" if len(later) else "")
    )
    typer.echo(
        "a scale SEES itself or later ones: this is no next-scale prediction"
        if seen
        else f"no scale sees a later one, nor its own tokens: each of the {len(changes_KK)} is predicted in one pass"
    )
    return seen
