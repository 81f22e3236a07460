"""Where Optuna keeps a search: opened, checked and gone on with."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna

from sweeps.searches.plan import SearchPlan
from sweeps.searches.transfer import TransferPlan
from varscale.errors import ExperimentError
from varscale.store.layout import SearchFiles
from varscale.store.locks import held_alone
from varscale.tracking.uris import masked, without_secrets

PLAN_ATTRIBUTE = "varscale.search"
FEW_TRIALS = 5
"""A trial is compared with the median of so many finished ones at least."""


@contextmanager
def open_search(plan: SearchPlan | TransferPlan, files: SearchFiles, storage: str | None) -> Iterator[optuna.Study]:
    """Optuna's study of a search, new or as an earlier call left it; the lock of the search's files is held meanwhile.

    It lies in a database (`storage`, a URI) or, with None, in a journal beside the search's other files.

    Raises:
        ExperimentError: Another call runs this search, the storage can't be used, or it holds a search of other
            settings under this name.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    files.folder.mkdir(parents=True, exist_ok=True)
    with held_alone(files.lock, ExperimentError(f"{files.folder}: another `varscale tune` of this search is running")):
        place = masked(storage) if storage else str(files.journal)
        try:
            study = _study(plan, storage or _journal(files.journal))
        except Exception as error:  # of SQLAlchemy, of JSON, or Optuna's own: whatever lies there is no search
            reason = without_secrets(str(error), storage) if storage else str(error)
            lines = reason.strip().splitlines() or [type(error).__name__]
            raise ExperimentError(f"{place}: Optuna {optuna.__version__} can't use this storage ({lines[0]})") from None
        begun = study.user_attrs.get(PLAN_ATTRIBUTE)
        if begun is None and not study.trials:
            study.set_user_attr(PLAN_ATTRIBUTE, plan.fingerprint)
            study.set_metric_names(list(plan.metrics))
        elif begun != plan.fingerprint:
            raise ExperimentError(
                f"{place}: the search {plan.name!r} was begun with other settings, and its trials don't compare; "
                f"give this one another name: --set name={plan.experiment.name}-2"
            )
        yield study


def _study(plan: SearchPlan | TransferPlan, storage: Any) -> optuna.Study:
    return optuna.create_study(
        storage=storage,
        sampler=optuna.samplers.RandomSampler(),  # decides nothing: all trials come with their settings
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FEW_TRIALS),
        study_name=plan.name,
        directions=["minimize"] * len(plan.metrics),
        load_if_exists=True,
    )


def _journal(path: Path) -> optuna.storages.JournalStorage:
    """The journal, without the half line that a full disk or a failing power left at its end."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    path = path.absolute()  # Optuna's lock is a link to it
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
