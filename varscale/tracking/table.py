"""The runs table as MLflow has it, for fits of runs whose files are elsewhere."""

import json
from typing import TYPE_CHECKING, Any

from varscale.errors import TrackingError
from varscale.tracking.delivery import LABELS_TAG, PARENT_TAG, REUSED_TAG
from varscale.tracking.store import Store, first_line

if TYPE_CHECKING:
    import pandas

_CURVES = ("train_loss", "train_error", "gradient_norm")
"""What metrics that are curves alone, no columns of the runs table, begin with."""
_COUNTS = {"unique_images", "validation_images", "threads", "images_at_once"}
"""Whole numbers among the metrics, which MLflow keeps as floats."""
_TEXT = {"run", "experiment", "family", "variant", "tokenizer", "fingerprint", "status", "precision"}


def runs_table(tracking_uri: str, experiment: str) -> "pandas.DataFrame":
    """One row a cell that ended, in the columns of runs.csv: of the latest sweep and of all others of its recipe.

    Cells that a sweep took from another belong to it, under its own budgets. Without a sweep, all cells. The frame's
    `attrs` have `missing`, names of the sweeps' cells that have no result, and `others`, how many other cells ended.

    Raises:
        TrackingError: The URI can't work, the store does not answer, or holds no such cell.
    """
    import pandas

    try:
        cells = _Cells(Store(tracking_uri), experiment)
    except Exception as error:
        raise TrackingError(f"MLflow at {tracking_uri}: {first_line(error)}") from error
    if not cells.rows:
        raise TrackingError(f"MLflow at {tracking_uri} holds no finished cell of an experiment {experiment!r}")
    table = pandas.DataFrame(cells.rows)
    whole = [column for column in table.columns.intersection(list(_COUNTS)) if table[column].notna().all()]
    table = table.astype(dict.fromkeys(whole, "int64"))
    table.attrs |= {"missing": tuple(cells.missing), "others": cells.others}
    return table


class _Cells:
    """An experiment's cells in a store, told apart."""

    def __init__(self, store: Store, experiment: str) -> None:
        sweeps = sorted(store.search(experiment, "tags.role = 'sweep'"), key=_time)
        alike = [sweep for sweep in sweeps if _recipe(sweep) == _recipe(sweeps[-1])]
        parents = {sweep.info.run_id for sweep in alike}
        own = {run.info.run_id: run for run in store.search(experiment, "tags.role = 'cell'")}
        chosen = {run_id: run for run_id, run in own.items() if not sweeps or run.data.tags.get(PARENT_TAG) in parents}
        labels: dict[str, dict[str, Any]] = {}
        for sweep in alike:
            labels |= {run_id: {} for run_id, run in own.items() if run.data.tags.get(PARENT_TAG) == sweep.info.run_id}
            for run_id in (each for ids in _parts(sweep, REUSED_TAG) for each in ids.split(",")):
                labels[run_id] = {}
                run = chosen.get(run_id) or own.get(run_id) or store.get(run_id)
                if run is not None and run.data.tags.get("role") == "cell":
                    chosen[run_id] = run
            for part in _parts(sweep, LABELS_TAG):
                labels |= json.loads(part)
        found = {run_id: row for run_id, run in chosen.items() if (row := _row(run, experiment))}
        self.rows = [{**row, **labels.get(run_id, {})} for run_id, row in found.items()]
        prints = {row["fingerprint"] for row in found.values()}
        # begun here, a cell may have been finished by another study
        without = [run for run in chosen.values() if run.data.tags.get("fingerprint") not in prints]
        self.missing = [run.info.run_name for run in without]
        self.others = sum(bool(_row(run, experiment)) for run_id, run in own.items() if run_id not in chosen)


def _parts(sweep: Any, tag: str) -> list[str]:
    """The parts of a tag that is too long for one."""
    return [text for key, text in sweep.data.tags.items() if key.split(".")[0] == tag]


def _time(sweep: Any) -> int:
    return int(sweep.info.end_time or sweep.info.start_time)


def _recipe(sweep: Any) -> tuple[str | None, str | None]:
    return sweep.data.params.get("tokenizer"), sweep.data.params.get("recipe")


def _row(run: Any, experiment: str) -> dict[str, Any]:
    tags = run.data.tags
    if "status" not in tags or run.info.lifecycle_stage == "deleted":
        return {}
    params = {key: _value(key, text) for key, text in run.data.params.items()}
    metrics = {key: value for key, value in run.data.metrics.items() if not key.startswith(_CURVES)}
    names = {"run": run.info.run_name, "fingerprint": tags.get("fingerprint", "")}
    # a curve may have a parameter's name: lr
    return {**names, **metrics, **params, "experiment": experiment, "status": tags["status"]}


def _value(column: str, text: str) -> Any:
    """A parameter as Python had it: text, truth value or number."""
    if column in _TEXT:
        return text
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
