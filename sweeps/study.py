"""A study: an experiment's cells in a runs folder. What is done is read off its files, which other studies share."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from filelock import FileLock

from sweeps.costs import size_costs, stored_bytes
from varscale.config import Experiment
from varscale.data.sources.of_experiment import data_identity
from varscale.evaluation.plan import FidelityPlan
from varscale.evaluation.stored import StoredEvaluations
from varscale.store.fingerprint import DataIdentity, fingerprint, tokenizer_fingerprint, tokens_fingerprint
from varscale.store.layout import RunFiles, RunKey, Store, StudyFiles, TokenFiles
from varscale.store.records import Result, StudyCell, StudyRecord, encoded_images, read_result
from varscale.training.cells import Cell, Trunk


@dataclass(frozen=True)
class Study:
    """An experiment's cells, identified."""

    experiment: Experiment
    store: Store
    cells: tuple[Cell, ...]
    data: DataIdentity

    @classmethod
    def of(cls, experiment: Experiment, store: Store, cells: Sequence[Cell]) -> "Study":
        """Open the experiment's data, whose content is a part of every fingerprint.

        Raises:
            DataError: Missing or malformed data.
            ExperimentError: A file that the settings name cannot be read.
        """
        return cls(experiment, store, tuple(cells), data_identity(experiment.data))

    @property
    def files(self) -> StudyFiles:
        """What belongs to the study alone."""
        return self.store.study(self.experiment.name)

    @cached_property
    def tokenizer(self) -> RunFiles:
        """Files of its tokenizer."""
        settings = self.experiment.tokenizer
        name = f"{self._data_name}-v{settings.vocab_size}-l{settings.tokens_per_image}"
        return self.store.run(RunKey("tokenizers", name, tokenizer_fingerprint(self.experiment, self.data)))

    @cached_property
    def tokens(self) -> TokenFiles:
        """Files of its token stores."""
        latents = self.experiment.model.description.reads == "latents"
        name = f"{self._data_name}-{'latents' if latents else f'l{self.experiment.tokenizer.tokens_per_image}'}"
        identity = tokens_fingerprint(self.data, self.tokenizer.fingerprint, latents=latents)
        return self.store.tokens(RunKey("tokens", name, identity))

    def cell_files(self, cell: Cell) -> RunFiles:
        """A cell's files."""
        return self.store.run(cell.key(self.tokens.fingerprint))

    def trunk_files(self, trunk: Trunk) -> RunFiles:
        """A trunk's files."""
        return self.store.run(trunk.key(self.tokens.fingerprint))

    def checkpoints(self, trunk: Trunk) -> tuple[int, ...]:
        """Images after which a trunk has checkpoints, from which it can go on."""
        return tuple(sorted(int(path.stem.removeprefix("images-")) for path in self.trunk_files(trunk).milestones))

    def result(self, cell: Cell) -> Result | None:
        """A cell's result, of a diverged one too; None where it has none that can be used."""
        return read_result(self.cell_files(cell))

    @cached_property
    def fidelity(self) -> FidelityPlan | None:
        """How its cells' images are measured; None: not at all.

        Raises:
            ExperimentError: The extractor or the reference don't fit the images.
            CheckpointError: The extractor's weights are missing.
        """
        return FidelityPlan.of(self.experiment)

    @property
    def missing(self) -> tuple[Cell, ...]:
        """Cells without result now."""
        return tuple(cell for cell in self.cells if self.result(cell) is None)

    def has_branch_point(self, cell: Cell) -> bool:
        """Whether its trunk got as far as the cell branches off."""
        return self.trunk_files(cell.trunk).milestone(cell.branch_images).exists()

    @property
    def train_images(self) -> int:
        """Training images to encode: all that are stored, or of a procedural source as many as the longest run sees."""
        return self.data.stored_images or max(cell.images for cell in self.cells)

    def bytes_to_write(self, missing: Sequence[Cell]) -> int:
        """What the missing cells and their tokens write at most, those of all sizes at once."""
        needed = self._bytes_of_tokens()
        for size in size_costs(missing):
            milestones = {cell.branch_images for cell in size.cells if not self.has_branch_point(cell)}
            checkpoints = len(milestones) + 2  # in flight, the last and the next
            needed += checkpoints * size.trunk.model.checkpoint_bytes()
            needed += len(size.cells) * size.trunk.model.weights_bytes()
        return needed

    def rows(self) -> list[dict[str, Any]]:
        """The runs table, under the study's own name and budgets; see `_rows`."""
        described = (self._described(cell, self._evaluations(self.cell_files(cell))) for cell in self.cells)
        return _rows(self.store, _with_results(self.store, described))

    def best_cells(self) -> tuple[Cell, ...]:
        """The finished cell of the lowest validation loss at each budget; variants of the recipe are left out."""
        best: dict[float, tuple[float, Cell]] = {}
        for cell in self.cells:
            result = self.result(cell)
            if result is not None and result.status == "finished" and not cell.trunk.variant:
                scored = (result.metrics["loss"], cell)
                best[cell.budget_flops] = min(best.get(cell.budget_flops, scored), scored, key=lambda each: each[0])
        return tuple(cell for _, cell in best.values())

    @cached_property
    def recipe(self) -> str:
        """Identity of what all cells of a law have in common: the smallest budget, too, which sets the warm-up."""
        experiment = self.experiment
        return fingerprint(
            kind="recipe",
            tokens=self.tokens.fingerprint,
            model=experiment.model.model_dump(mode="json"),
            optim=experiment.optim.model_dump(mode="json", exclude={"epochs"}),
            smallest_budget=min(experiment.grid.budgets),
        )

    def record(self, status: str | None) -> StudyRecord:
        """Write down the study, its earlier cells included; all are evaluated alike. None: its status stays."""
        self.files.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.files.record_lock):
            earlier = StudyRecord.read(self.files.record)
            cells = {cell.folder: cell for cell in (earlier.cells if earlier else ())}
            cells |= {cell.folder: cell for cell in map(self._described, self.cells)}
            for folder, cell in cells.items():
                evaluations = self._evaluations(RunFiles(self.store.runs / "cells" / folder))
                cells[folder] = cell.model_copy(update={"evaluations": evaluations})
            if status is None:
                status, ended = (earlier.status, earlier.ended) if earlier else ("RUNNING", None)
            else:
                ended = None if status == "RUNNING" else time.time()
            record = StudyRecord(
                study=self.experiment.name,
                created=earlier.created if earlier else time.time(),
                settings=self.experiment.model_dump(mode="json"),
                tokenizer=self.tokenizer.folder.name,
                tokens=self.tokens.folder.name,
                recipe=self.recipe,
                cells=tuple(cells.values()),
                status=status,  # type: ignore[arg-type]  # validated
                ended=ended,
            )
            record.write(self.files.record)
            return record

    def _described(self, cell: Cell, evaluations: tuple[str, ...] = ()) -> StudyCell:
        return StudyCell(
            folder=self.cell_files(cell).folder.name,
            trunk=self.trunk_files(cell.trunk).folder.name,
            title=cell.title,
            labels=cell.labels(),
            recipe=self.recipe,
            evaluations=evaluations,
        )

    def _evaluations(self, cell: RunFiles) -> tuple[str, ...]:
        """Folders of the evaluations of a cell that the study's settings ask for."""
        plans = self.fidelity.one_by_one() if self.fidelity is not None else ()
        return tuple(plan.key("cell", cell).folder for plan in plans)

    @property
    def _data_name(self) -> str:
        return f"{self.experiment.data.kind}{self.experiment.data.image_size}"

    def _bytes_of_tokens(self) -> int:
        data = self.experiment.data
        images = max(self.train_images, encoded_images(self.tokens)) * data.views + (data.validation_images or 0)
        return max(0, images * stored_bytes(self.experiment) - self.tokens.bytes)


@dataclass(frozen=True)
class StudyTable:
    """A study's runs table, read off its files alone."""

    rows: list[dict[str, Any]]
    missing: list[str]
    """Titles of its cells that have no result."""
    others: int
    """Cells of other recipes that ended."""


def study_table(store: Store, name: str, recipe: str = "") -> StudyTable | None:
    """The results of all cells of a recipe, the study's latest unless it is given; None where there is no such study.

    Losses of different tokenizers or validation images don't compare, and a law of two recipes is a law of neither.
    """
    record = StudyRecord.read(store.study(name).record)
    if record is None:
        return None
    recipe = recipe or record.recipe
    results = _with_results(store, record.cells)
    ours = [(cell, result) for cell, result in results if cell.recipe == recipe]
    missing = [cell.title for cell, result in ours if result is None]
    others = sum(result is not None for cell, result in results if cell.recipe != recipe)
    return StudyTable(_rows(store, ours), missing, others)


def _with_results(store: Store, cells: Iterable[StudyCell]) -> list[tuple[StudyCell, Result | None]]:
    return [(cell, read_result(RunFiles(store.runs / "cells" / cell.folder))) for cell in cells]


def _rows(store: Store, cells: Iterable[tuple[StudyCell, Result | None]]) -> list[dict[str, Any]]:
    """Rows of the runs table: a cell's result, how it was carried out, what the study calls it, and its images.

    There is one row for each way in which the store has measured a cell's images, first that of the study's own
    settings; they differ in nothing else.
    """
    stored, rows = StoredEvaluations(store), []
    for cell, result in cells:
        if result is not None:
            row = {"run": result.row.get("run"), **cell.labels, **result.row, **result.provenance, **cell.labels}
            rows += [{**row, **images} for images in stored.rows(result, cell.evaluations) or [{}]]
    return rows
