"""The runs table as MLflow has it, for fits of runs whose files are elsewhere."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from varscale.tracking.delivery import REUSED_TAG
from varscale.tracking.store import Store, TrackingError

if TYPE_CHECKING:
    import pandas

_SCALES = re.compile(r"(loss|error)_scale_(\d+)")
_COLUMNS = (
    *("run", "experiment", "family", "depth", "width", "heads", "seed", "variant", "budget_flops", "train_flops"),
    *("flops_per_image", "params_total", "params_active", "images_seen", "tokens_seen", "steps", "batch_size", "lr"),
    *("unique_images", "epochs", "loss", "loss_last_scale", "loss_scale_", "loss_per_image", "loss_standard_error"),
    *("error", "error_last_scale", "error_scale_", "unigram_entropy", "validation_images", "warmup_images"),
    *("tokenizer", "fingerprint", "status", "wall_seconds", "precision", "compiled", "threads"),
)
_WHOLE = {
    *("depth", "width", "heads", "seed", "params_total", "params_active", "images_seen", "tokens_seen", "steps"),
    *("batch_size", "unique_images", "validation_images", "warmup_images", "threads"),
}
_TEXT = {"run", "experiment", "family", "variant", "tokenizer", "fingerprint", "status", "precision"}


def runs_table(tracking_uri: str, experiment: str) -> "pandas.DataFrame":
    """One row a cell that ended, reused cells of other experiments included, in the columns of runs.csv.

    Raises:
        TrackingError: The URI can't work, or the store holds no such cell.
        Exception: The store does not answer.
    """
    import pandas

    store = Store(tracking_uri)
    rows = [row for run in _cells(store, experiment) if (row := _row(run, experiment))]
    if not rows:
        raise TrackingError(f"MLflow at {tracking_uri} holds no finished cell of an experiment {experiment!r}")
    present = {column for row in rows for column in row}
    table = pandas.DataFrame(rows, columns=sorted(present, key=_place))
    for column in present & _WHOLE:
        if table[column].notna().all():
            table[column] = table[column].astype("int64")
    return table


def _cells(store: Store, experiment: str) -> Iterator[Any]:
    seen = set()
    for run in store.search(experiment, "tags.role = 'cell'"):
        seen.add(run.info.run_id)
        yield run
    for sweep in store.search(experiment, "tags.role = 'sweep'"):
        for key, ids in sweep.data.tags.items():
            for run_id in ids.split(",") if key.split(".")[0] == REUSED_TAG else ():
                run = None if run_id in seen else store.get(run_id)
                seen.add(run_id)
                if run is not None and run.data.tags.get("role") == "cell":
                    yield run


def _row(run: Any, experiment: str) -> dict[str, Any]:
    tags = run.data.tags
    if "status" not in tags or run.info.lifecycle_stage == "deleted":
        return {}
    params = {key: _value(key, text) for key, text in run.data.params.items() if _known(key)}
    metrics = {key: value for key, value in run.data.metrics.items() if _known(key)}
    names = {"run": run.info.run_name, "experiment": experiment, "fingerprint": tags.get("fingerprint", "")}
    return {**metrics, **names, **params, "status": tags["status"]}  # a curve may have a parameter's name: lr


def _known(column: str) -> bool:
    return column in _COLUMNS or _SCALES.fullmatch(column) is not None


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


def _place(column: str) -> tuple[int, int]:
    match = _SCALES.fullmatch(column)
    return (_COLUMNS.index(f"{match[1]}_scale_"), int(match[2])) if match else (_COLUMNS.index(column), 0)
