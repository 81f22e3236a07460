"""The runs table as MLflow has it, for fits of runs whose files are elsewhere."""

from typing import TYPE_CHECKING, Any

from varscale.errors import TrackingError
from varscale.tracking.client import MLflowStore, answering
from varscale.tracking.delivery import EVALUATIONS_TAG, LABELS_TAG, MISSING_TAG, ROW_TAG, joined
from varscale.tracking.uris import masked

if TYPE_CHECKING:
    import pandas


def runs_table(tracking_uri: str, study: str) -> "pandas.DataFrame":
    """The rows of each cell of the study's latest recipe that ended, in the columns and types of runs.csv.

    The frame's `attrs` have `missing`, titles of the study's cells that have no result, and `others`, how many cells of
    other recipes ended.

    Raises:
        TrackingError: The URI can't work, the store does not answer, or holds no such cell.
    """
    import pandas

    with answering(tracking_uri):
        store = MLflowStore(tracking_uri)
        studies = [run.data.tags for run in store.search(study, "tags.role = 'study'")]
        cells = [run for run in store.search(study, "tags.role = 'cell'") if run.data.tags.get("status")]
    latest = studies[-1] if studies else {}  # none where its run was deleted in MLflow
    ours = [run for run in cells if latest.get("recipe") in (None, run.data.tags.get("recipe"))]
    if not ours:
        raise TrackingError(f"MLflow at {masked(tracking_uri)} holds no finished cell of a study {study!r}")
    table = pandas.DataFrame([row for run in ours for row in _rows(run)])
    missing = tuple(latest.get(MISSING_TAG, "").splitlines())
    table.attrs |= {"missing": missing, "others": len(cells) - len(ours)}
    return table


def _rows(run: Any) -> list[dict[str, Any]]:
    """One for each way in which the cell's images were measured, or one without."""
    tags = run.data.tags
    names = {"run": run.info.run_name, "fingerprint": tags.get("fingerprint", "")}
    row = {**names, **joined(tags, ROW_TAG), **joined(tags, LABELS_TAG), "status": tags["status"]}
    return [{**row, **images} for images in joined(tags, EVALUATIONS_TAG).get("rows") or [{}]]
