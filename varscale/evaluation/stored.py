"""The evaluations that a store has and whose they are, read off their files alone."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varscale.config.section import FidelityConfig
from varscale.evaluation.plan import ALL_KEPT, USUAL, Subject
from varscale.store.layout import RunFiles, Store
from varscale.store.records import Result, Row, RunIdentity, read_result

SETTINGS = (
    *("evaluator", "extractor", "reference_set", "samples", "guidance", "top_k", "top_p", "sampling_seed"),
    *USUAL,
)
"""Columns of the runs table that say how images were drawn and measured."""
_OF_FLOORS = ("evaluator", "extractor", "reference_set", "samples", "floor")
"""What a floor has in common with the evaluations that it is a floor of."""

_log = logging.getLogger(__name__)
_Stamp = tuple[int, int]
"""Size and modification time of a file."""


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation that is done."""

    folder: str
    subject: str
    """A `Subject`."""
    of: str
    """Fingerprint of the cell, the tokenizer or the latents; "" of real images."""
    how: dict[str, Any]
    """`SETTINGS`, and `floor`: which real images the floor is of."""
    result: Result

    @property
    def columns(self) -> Row:
        """What it says in the runs table."""
        settings = {name: self.how[name] for name in SETTINGS} if self.subject == "cell" else {}
        return {**self.result.row, **settings}


class StoredEvaluations:
    """Those of a runs folder; each is read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[Path, tuple[_Stamp, StoredEvaluation | None]] = {}
        self._by_run: dict[tuple[str, str], list[tuple[_Stamp, StoredEvaluation]]] = {}
        self._of_floors: list[_Stamp] = []
        self.refresh()

    def refresh(self) -> None:
        """Read what is new, and forget what is gone."""
        read = {}
        for path in sorted((self._store.runs / "evaluations").glob("*/result.json")):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            stamp, known = (stat.st_size, stat.st_mtime_ns), self._read.get(path)
            read[path] = known if known and known[0] == stamp else (stamp, _read(RunFiles(path.parent)))
        self._read = read
        self._by_run = {}
        for stamp, each in read.values():
            if each is not None:
                self._by_run.setdefault((each.subject, each.of), []).append((stamp, each))
        self._of_floors = [stamp for stamp, each in read.values() if each is not None and each.subject != "cell"]

    def rows(self, cell: Result, own: Sequence[str]) -> list[Row]:
        """The columns of `measured` alone."""
        return [row for row, _ in self.measured(cell, own)]

    def measured(self, cell: Result, own: Sequence[str]) -> list[tuple[Row, Result]]:
        """Columns of the runs table, one row for each way in which a cell's images were measured; none: not at all.

        Each has the floors that were measured in its way. Evaluations that differ in nothing but the number of
        bootstrap draws are one.

        Args:
            cell: The cell's result.
            own: Folders of the evaluations that come first; then come those of all images, at the default guidance, and
                with most images.

        Returns:
            The row of each, and the evaluation's result.
        """
        usual = FidelityConfig().guidance[0]
        read = str(cell.row.get("latents_fingerprint") or cell.row.get("tokenizer_fingerprint"))
        places = {folder: place for place, folder in enumerate(own)}

        def order(each: StoredEvaluation) -> tuple[Any, ...]:
            how = each.how
            first = how["images_kept"] != ALL_KEPT, how["guidance"] != usual, -how["samples"]
            return places.get(each.folder, len(own)), first, *(how[name] for name in SETTINGS), each.folder

        rows: dict[tuple[Any, ...], tuple[Row, Result]] = {}
        for each in sorted(self._of("cell", cell.fingerprint), key=order):
            floors = [
                *self._floors("real", "", each),
                *self._floors("reconstructed", read, each),
            ]
            merged = {name: value for one in (*floors, each) for name, value in one.columns.items()}
            rows.setdefault(tuple(each.how[name] for name in SETTINGS), (merged, each.result))
        return list(rows.values())

    def stamps(self, cell: str) -> list[_Stamp]:
        """Sizes and times of the files that `rows` are made of: they change when these do."""
        return [*self._of_floors, *(stamp for stamp, _ in self._by_run.get(("cell", cell), ()))]

    def ended(self, cell: str) -> float:
        """When the last evaluation of a cell ended, Unix seconds; 0: there is none."""
        return max((each.result.time for each in self._of("cell", cell)), default=0.0)

    def _of(self, subject: Subject, of: str) -> Iterator[StoredEvaluation]:
        return (each for _, each in self._by_run.get((subject, of), ()))

    def _floors(self, subject: Subject, of: str, cell: StoredEvaluation) -> list[StoredEvaluation]:
        alike = (each for each in self._of(subject, of) if all(each.how[name] == cell.how[name] for name in _OF_FLOORS))
        return list(alike)[:1]


def _read(files: RunFiles) -> StoredEvaluation | None:
    """The evaluation in a folder; None, with a warning, where its files don't say what it is."""
    identity, result = RunIdentity.read(files.identity), read_result(files)
    if identity is None or result is None:
        return None
    how: Any = identity.params
    try:
        how = {**USUAL, **how}  # earlier versions drew no other way, and don't say so
        wanted = {name: how[name] for name in (*SETTINGS, "floor")}
        return StoredEvaluation(files.folder.name, str(how["subject"]), str(how["of"]), wanted, result)
    except (LookupError, TypeError, ValueError) as error:
        _log.warning("%s: whose evaluation this is can't be told (%s); no table has it", files.folder, error)
        return None
