"""The verb that looks into a trained model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from varscale.cli.options import NoiseSeed, check_output, mistakes_as_one_line
from varscale.errors import ExperimentError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

UNCHANGED = 1e-3
"""Largest change of a logit that is rounding."""


def inspect(
    what: Annotated[Literal["attention"], typer.Argument(help="What to look at.")],
    run: Annotated[Path, typer.Argument(help="Folder of a finished cell, or a model's .safetensors file.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer's file, for a model's file.")] = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="Images that the model draws and looks at.")] = 8,
    seed: NoiseSeed = 0,
    out: Annotated[Path, typer.Option(help="The heat map, .png or .svg; a .csv beside it has the numbers.")] = Path(
        "attention.png"
    ),
) -> None:
    """Show which share of its attention each scale pays to each scale, and check that no scale sees a later one."""
    if out.suffix not in (".png", ".svg"):
        raise ExperimentError(f"--out {out}: expected a name that ends in .png or .svg")
    check_output(f"--out {out}", out)
    from analysis.report.attention import attention_map
    from varscale.evaluation.attention import attention_shares, dependence
    from varscale.families.var.transformer import VAR
    from varscale.generation.bulk import labels_in_turn
    from varscale.generation.from_files import Drawable
    from varscale.generation.sampling import sample
    from varscale.store.atomic import write_atomically

    with mistakes_as_one_line():
        drawable = Drawable.load(run, tokenizer)
        model, device = drawable.model, next(drawable.model.parameters()).device
        if not isinstance(model, VAR):
            raise ExperimentError(f"{run}: a model of family {model.config.family}; only VAR's attention is known")
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
    seen = _say_who_sees_whom(changes_KK)
    typer.echo(out)
    if seen:
        raise typer.Exit(1)


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
