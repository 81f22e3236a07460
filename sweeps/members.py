"""Experiments that are compared: the members of one file, each a study of its own."""

from collections.abc import Mapping, Sequence

from sweeps.study import StudyTable, study_table
from varscale.config import Experiment
from varscale.errors import ExperimentError
from varscale.store.layout import Store
from varscale.training.cells import Trunk

MEMBER = "member"
"""Column of the joint runs table with the member that a row is of."""


def check_comparable(members: Sequence[Experiment]) -> None:
    """Raise `ExperimentError` where nothing that members measure compares: before they are trained, not after.

    Losses compare on the same tokens and in the same unit alone, measures of images whatever drew them.
    """
    without = [each.name for each in members if each.evaluation.fidelity is None]
    if without and len(set(map(_loss_of, members))) > 1:
        raise ExperimentError(
            f"evaluation.fidelity: missing in {', '.join(without)}; losses of different tokens don't compare, so "
            "members are compared by measures of their images, such as fidelity: {samples: 2048}"
        )


def members_table(store: Store, studies: Mapping[str, str]) -> StudyTable:
    """The runs tables of several studies (by their members) as one, with a column that names the member.

    It is read off files alone.
    """
    tables = {member: study_table(store, name) or StudyTable([], [name], 0) for member, name in studies.items()}
    return StudyTable(
        rows=[row | {MEMBER: member} for member, table in tables.items() for row in table.rows],
        missing=[f"{member}: {title}" for member, table in tables.items() for title in table.missing],
        others=sum(table.others for table in tables.values()),
    )


def _loss_of(experiment: Experiment) -> tuple[str, ...]:
    """What a loss is of, and in."""
    model = Trunk(experiment, experiment.grid.depths[0], 0, min(experiment.grid.budgets)).model
    return experiment.data.model_dump_json(), experiment.tokenizer.model_dump_json(), model.reads, model.loss_unit
