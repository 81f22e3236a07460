"""The runs table as MLflow has it, for fits of runs whose files are elsewhere."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from varscale.tracking.delivery import PARENT_TAG, REUSED_TAG
from varscale.tracking.store import Store, TrackingError, first_line

if TYPE_CHECKING:
    import pandas

_CURVES = ("train_loss", "train_error", "gradient_norm")
"""What metrics that are curves alone, no columns of the runs table, begin with."""
_COUNTS = {"unique_images", "validation_images", "threads", "images_at_once"}
"""Whole numbers among the metrics, which MLflow keeps as floats."""
_TEXT = {"run", "experiment", "family", "variant", "tokenizer", "fingerprint", "status", "precision"}


def runs_table(tracking_uri: str, experiment: str) -> "pandas.DataFrame":
    """One row a cell that ended, in the columns of runs.csv: of the latest sweep and of all others of its recipe.

    Cells that a sweep took from another experiment belong to it. Without a sweep, all cells.

    Raises:
        TrackingError: The URI can't work, the store does not answer, or holds no such cell.
    """
    import pandas

    try:
        rows = [row for run in _cells(Store(tracking_uri), experiment) if (row := _row(run, experiment))]
    except Exception as error:
        raise TrackingError(f"MLflow at {tracking_uri}: {first_line(error)}") from error
    if not rows:
        raise TrackingError(f"MLflow at {tracking_uri} holds no finished cell of an experiment {experiment!r}")
    table = pandas.DataFrame(rows)
    whole = [column for column in table.columns.intersection(list(_COUNTS)) if table[column].notna().all()]
    return table.astype(dict.fromkeys(whole, "int64"))


def _cells(store: Store, experiment: str) -> Iterator[Any]:
    sweeps = list(store.search(experiment, "tags.role = 'sweep'"))
    latest = max(sweeps, key=lambda sweep: sweep.info.end_time or sweep.info.start_time, default=None)
    alike = [sweep for sweep in sweeps if latest is not None and _recipe(sweep) == _recipe(latest)]
    parents = {sweep.info.run_id for sweep in alike}
    seen = set()
    for run in store.search(experiment, "tags.role = 'cell'"):
        if latest is None or run.data.tags.get(PARENT_TAG) in parents:
            seen.add(run.info.run_id)
            yield run
    for sweep in alike:
        for key, ids in sweep.data.tags.items():
            for run_id in ids.split(",") if key.split(".")[0] == REUSED_TAG else ():
                run = None if run_id in seen else store.get(run_id)
                seen.add(run_id)
                if run is not None and run.data.tags.get("role") == "cell":
                    yield run


def _recipe(sweep: Any) -> tuple[str | None, str | None]:
    return sweep.data.params.get("tokenizer"), sweep.data.params.get("recipe")


def _row(run: Any, experiment: str) -> dict[str, Any]:
    tags = run.data.tags
    if "status" not in tags or run.info.lifecycle_stage == "deleted":
        return {}
    params = {key: _value(key, text) for key, text in run.data.params.items()}
    metrics = {key: value for key, value in run.data.metrics.items() if not key.startswith(_CURVES)}
    names = {"run": run.info.run_name, "experiment": experiment, "fingerprint": tags.get("fingerprint", "")}
    return {**names, **metrics, **params, "status": tags["status"]}  # a curve may have a parameter's name: lr


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
