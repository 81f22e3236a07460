"""How a study computes, where that is decided already: by itself, or by a study whose finished cells it takes."""

from collections.abc import Sequence

from varscale.cells import Cell, Numerics
from varscale.config import Experiment
from varscale.files import ExperimentFiles
from varscale.identity import stored_numerics


def decided_numerics(
    experiment: Experiment, files: ExperimentFiles, cells: Sequence[Cell], tokens: str
) -> Numerics | None:
    """The study's own numerics; a new study's, those with which others of the runs folder finished most of its cells.

    Measured anew they might come out otherwise, and the finished cells would be trained a second time.

    Args:
        experiment: The settings, which may rule numerics out.
        files: The study's files.
        cells: Its cells.
        tokens: Fingerprint of its token stores.

    Returns:
        The numerics, or None where they are to be measured.
    """
    if files.numerics.exists():
        return stored_numerics(experiment, files)
    finished: dict[Numerics, int] = {}
    for other in files.others():
        numerics = stored_numerics(experiment, other)
        if numerics is not None and numerics not in finished:
            finished[numerics] = sum(
                files.finished_cell(cell.fingerprint(tokens, numerics)) is not None for cell in cells
            )
    best = max(finished, key=lambda numerics: finished[numerics], default=None)
    return best if best is not None and finished[best] else None
