"""The table of papers on image models: measured models, and on request the published ones of VAR's table 1.

Columns: model, FID, IS, precision, recall, parameters, steps (passes of the model that an image takes), and the time an
image takes relative to the first row's. What tells rows apart beside the model's name, such as the budget or the
guidance, becomes a column where it differs; what all rows have in common is said below the table.
"""

import csv
import io
import re
from dataclasses import dataclass
from importlib.resources import files

import pandas as pd

from analysis.report.drawing import si
from analysis.report.sentences import number
from analysis.tables.evaluations import setting_columns

SOURCE = "Tian et al. 2024, arXiv 2404.02905v2, table 1"
_PUBLISHED = (
    f"†: published, in {SOURCE} (ImageNet 256 × 256), by its authors' evaluators and reference; such values don't "
    "compare with measured ones of other images. Their time is relative to VAR-d30's, and compares among them alone."
)
_MEASURES = {
    "fid": ("FID ↓", ".2f"),
    "inception_score": ("IS ↑", ".1f"),
    "image_precision": ("precision ↑", ".2f"),
    "image_recall": ("recall ↑", ".2f"),
}
_SECONDS, _PASSES, _KEPT = "seconds_an_image", "sampling_passes", "images_kept"
_TELLING = {"experiment": "study", "variant": "variant", "budget_flops": "budget", "seed": "seed"}
_MACHINE = ("device", "threads")
_OWN_FORMATS = {
    "budget": number,
    "parameters": si,
    "steps": lambda value: f"{value:.0f}",
    "time": lambda value: f"{value:.3g}",
}
ALL_KEPT = "all"
_TEX = {
    **{sign: f"\\{sign}" for sign in "#$%&_{}"},
    **{"\\": r"\textbackslash{}", "~": r"$\sim$", "^": r"\^{}", "<": "$<$", ">": "$>$", "↓": r"$\downarrow$"},
    **{"|": r"\textbar{}", '"': "''", "−": "$-$", "≥": r"$\geq$", "≤": r"$\leq$", "α": r"$\alpha$"},
    **{"↑": r"$\uparrow$", "†": r"\dag{}", "×": r"$\times$", "·": r"$\cdot$", "–": "--", "…": r"\ldots{}"},
}


@dataclass(frozen=True)
class PaperTable:
    """Rows as numbers, each with a name.

    Attributes:
        frame: one row a model; the first column is its name, `published` says whose it is, and `source` where from.
        notes: what a reader must know to compare rows, a sentence each.
    """

    frame: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def headings(self) -> list[str]:
        """Of the columns that are shown."""
        return [str(name) for name in self.frame.columns if name not in ("published", "source")]

    def cells(self) -> list[list[str]]:
        """The rows as text, published models marked; a dash where there is no value."""
        return [
            [
                self._text(name, row[name]) + ("†" if name == "model" and row["published"] else "")
                for name in self.headings
            ]
            for _, row in self.frame.iterrows()
        ]

    @staticmethod
    def _text(name: str, value: object) -> str:
        if isinstance(value, str) or not isinstance(value, int | float):
            return str(value) or "–"
        if value != value:
            return "–"
        measure = next((form for heading, form in _MEASURES.values() if heading == name), None)
        return _OWN_FORMATS.get(name, lambda number: format(number, measure or "g"))(value)


def paper_table(measured: pd.DataFrame, *, published: bool = False) -> PaperTable:
    """The table of measured models.

    Args:
        measured: one row for each way in which a model's images were measured: `model`, `fid`, `inception_score`,
            `image_precision`, `image_recall`, `params_total`, `sampling_passes`, `seconds_an_image`, `device`,
            `threads`, `images_kept`, and what tells rows apart. Missing columns are missing values.
        published: whether the rows of VAR's table 1 follow.
    """
    shown, notes = _shown(measured) if len(measured) else (pd.DataFrame(), [])
    parts = [shown, _published()] if published else [shown]
    frame = pd.concat([part for part in parts if len(part)], ignore_index=True).astype(object)
    return PaperTable(frame.where(frame.notna(), float("nan")), (*notes, *([_PUBLISHED] if published else [])))


def as_csv(table: PaperTable) -> str:
    """Numbers as they are, headings without arrows, with the columns `published` and `source`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(re.sub(r" [↓↑]$", "", name) for name in table.frame.columns)
    for row in table.frame.itertuples(index=False):
        values = ("" if value != value else value for value in row)
        writer.writerow(int(each) if isinstance(each, float) and each.is_integer() else each for each in values)
    return file.getvalue()


def as_markdown(table: PaperTable) -> str:
    """A table of pipes, and the notes below it."""
    numeric = [":---" if place == 0 else "---:" for place in range(len(table.headings))]
    rows = [table.headings, numeric, *table.cells()]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", *table.notes, ""])


def as_latex(table: PaperTable) -> str:
    """A floating table that needs no package; the notes are its caption."""
    columns = "l" + "r" * (len(table.headings) - 1)
    lines = [r"\begin{table}", r"\centering", r"\small", r"\setlength{\tabcolsep}{4pt}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\hline"]
    lines.append(_tex_row(table.headings))
    lines.append(r"\hline")
    before = bool(table.frame["published"].iloc[0])
    for published, row in zip(table.frame["published"], table.cells(), strict=True):
        lines += [r"\hline"] if published != before else []
        lines.append(_tex_row(row))
        before = published
    lines += [r"\hline", r"\end{tabular}", rf"\caption{{{_tex(' '.join(table.notes))}}}", r"\end{table}", ""]
    return "\n".join(lines)


def _shown(measured: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The columns of measured rows, and what is to be said of them."""
    rows = measured.reset_index(drop=True)
    for name in (*_MEASURES, "params_total", _PASSES, _SECONDS, _KEPT, *_MACHINE):
        rows = rows if name in rows.columns else rows.assign(**{name: float("nan")})
    rejected = rows[_KEPT].notna() & (rows[_KEPT] != ALL_KEPT)
    kinds = rows.loc[rejected, _KEPT].unique()
    settings = [name for name in setting_columns(rows) if name != _KEPT or len(kinds) > 1]
    evaluated = rows[rows["fid"].notna()]
    varied = [name for name in settings if evaluated[name].astype(str).nunique() > 1]
    telling = [name for name in _TELLING if name in rows.columns and rows[name].astype(str).nunique() > 1]
    frame = pd.DataFrame({"model": rows["model"] + rejected.map({True: "-re", False: ""})})
    frame = frame.assign(**{_TELLING[name]: rows[name] for name in telling}, **{name: rows[name] for name in varied})
    frame = frame.assign(**{heading: rows[name] for name, (heading, _) in _MEASURES.items()})
    seconds = pd.to_numeric(rows[_SECONDS], errors="coerce")
    timed = seconds.dropna()
    frame = frame.assign(parameters=rows["params_total"], steps=rows[_PASSES])
    frame["time"] = seconds / timed.iloc[0] if len(timed) else seconds
    notes = _on_measures(evaluated, [name for name in settings if name not in varied], varied)
    if missing := len(rows) - len(evaluated):
        notes.append(f"{missing} of {len(rows)} rows are of images that are not measured (`varscale evaluate`).")
    notes += [f"-re: {kind} (rejection sampling)." for kind in kinds]
    if len(timed):
        notes += _on_time(rows.loc[timed.index], float(timed.iloc[0]), str(frame["model"][timed.index[0]]))
    return frame.assign(published=False, source="measured"), notes


def _on_measures(evaluated: pd.DataFrame, common: list[str], varied: list[str]) -> list[str]:
    if not len(evaluated):
        return []
    said = ", ".join(f"{name} {_plain(evaluated[name].iloc[0])}" for name in common if name != _KEPT)
    notes = [f"Measured with {said}."] if said else []
    if varied:
        notes.append(f"FID, IS, precision and recall compare only among rows alike in {' and '.join(varied)}.")
    return notes


def _on_time(timed: pd.DataFrame, first: float, model: str) -> list[str]:
    machines = [_machine(*row) for row in timed[list(_MACHINE)].drop_duplicates().itertuples(index=False)]
    text = f"Time: seconds an image relative to {model}'s {first:.3g} s ({machines[0]})."
    if len(machines) > 1:
        text += f" Times were measured on {len(machines)} machines ({'; '.join(machines)}), and don't compare."
    return [text]


def _machine(device: object, threads: object) -> str:
    return _plain(device) + (f", {_plain(threads)} thread{'s' if threads != 1 else ''}" if threads == threads else "")


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _published() -> pd.DataFrame:
    text = (files("analysis.report") / "published_images.csv").read_text(encoding="utf-8")
    rows = []
    for row in csv.DictReader(io.StringIO(text)):
        source = "; ".join(filter(None, (SOURCE, f"system: {row['system']}", row["remark"])))
        measures = {heading: _number(row[name.removeprefix("image_")]) for name, (heading, _) in _MEASURES.items()}
        others = {name: _number(row[name]) for name in ("parameters", "steps", "time")}
        rows.append({"model": row["model"], **measures, **others, "published": True, "source": source})
    return pd.DataFrame(rows).astype(object)


def _number(text: str) -> object:
    """A number; text where it is only a bound (>45) or about right (~45); NaN where nothing was published."""
    try:
        return float(text or "nan")
    except ValueError:
        return text


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


def _tex_row(cells: list[str]) -> str:
    return " & ".join(map(_tex, cells)) + r" \\"
