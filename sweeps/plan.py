"""What a sweep has to do: its cells, their trunks, and what is done already. Pure but for reading result files."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from varscale.config import Experiment
from varscale.store.fingerprint import DataIdentity
from varscale.store.layout import ExperimentFiles, RunFiles, fingerprint
from varscale.training.cells import Cell, Numerics, Trunk


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep, identified: precision and inputs are known."""

    experiment: Experiment
    files: ExperimentFiles
    cells: tuple[Cell, ...]
    tokens: str
    """Fingerprint of the token stores."""
    numerics: Numerics

    def cell_fingerprint(self, cell: Cell) -> str:
        """Identity of a cell."""
        return cell.fingerprint(self.tokens, self.numerics)

    @property
    def recipe(self) -> str:
        """Identity of what all cells of a grid have in common: their smallest budget, too, which sets the warm-up."""
        experiment = self.experiment
        return fingerprint(
            kind="recipe",
            tokens=self.tokens,
            numerics=self.numerics.identity,
            model=experiment.model.model_dump(mode="json"),
            optim=experiment.optim.model_dump(mode="json", exclude={"epochs"}),
            smallest_budget=min(experiment.grid.budgets),
            evaluation_batch_size=experiment.evaluation.batch_size,
        )

    def cell_files(self, cell: Cell) -> RunFiles:
        """A cell's files: where it finished (perhaps in another study), or where it will run."""
        print_ = self.cell_fingerprint(cell)
        return self.files.finished_cell(print_) or self.files.cell(cell.name, print_)

    def trunk_files(self, trunk: Trunk) -> RunFiles:
        """A trunk's files."""
        return self.files.trunk(trunk.name, trunk.fingerprint(self.tokens, self.numerics))

    def finished(self, cell: Cell) -> bool:
        """Whether a cell has its result, diverged ones included."""
        return self.cell_files(cell).finished(self.cell_fingerprint(cell))

    def labels(self, cell: Cell) -> dict[str, Any]:
        """What a cell's result, perhaps planned by another sweep, says otherwise than this plan: its nominal budget."""
        row = (self.cell_files(cell).read_result() or {}).get("row", {})
        names = row.keys() - {"experiment"}
        return {name: value for name, value in cell.parameters().items() if name in names and row[name] != value}

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's row of the runs table, or None without result."""
        result = self.cell_files(cell).read_result()
        if result is None or result.get("fingerprint") != self.cell_fingerprint(cell):
            return None
        # a reused cell may have been planned under another nominal budget
        return {**result["row"], **cell.parameters()}

    @cached_property
    def missing(self) -> tuple[Cell, ...]:
        """Cells without result when the plan was made."""
        return tuple(cell for cell in self.cells if not self.finished(cell))

    def has_checkpoint(self, cell: Cell) -> bool:
        """Whether its trunk got as far as a cell branches off."""
        return self.trunk_files(cell.trunk).milestone(cell.branch_images).exists()

    def trunks(self) -> dict[str, tuple[Trunk, tuple[int, ...]]]:
        """Trunks that missing cells need, by name: each with the milestones at which these branch."""
        found: dict[str, tuple[Trunk, tuple[int, ...]]] = {}
        for cell in self.missing:
            name = self.trunk_files(cell.trunk).folder.name
            _, milestones = found.get(name, (cell.trunk, ()))
            found[name] = (cell.trunk, tuple(sorted({*milestones, cell.branch_images})))
        return found


def train_images(cells: Iterable[Cell], data: DataIdentity) -> int:
    """Training images to encode: all that are stored, or of a procedural source as many as the longest run sees."""
    return data.stored_images or max(cell.images for cell in cells)


def images_by_trunk(cells: Iterable[Cell]) -> list[tuple[Trunk, int]]:
    """Each trunk of the cells with the images that it and its branches take together."""
    trunks: dict[str, Trunk] = {}
    longest: Counter[str] = Counter()
    branches: Counter[str] = Counter()
    for cell in cells:
        name = cell.trunk.name
        trunks.setdefault(name, cell.trunk)
        longest[name] = max(longest[name], cell.branch_images)
        branches[name] += cell.decay_images
    return [(trunk, longest[name] + branches[name]) for name, trunk in trunks.items()]


def bytes_of_runs(missing: Sequence[Cell], without_checkpoint: Sequence[Cell]) -> int:
    """What runs write at most, those of all sizes at once.

    Args:
        missing: Cells that will be trained: each leaves its weights.
        without_checkpoint: Those of them whose trunk has not got as far as they branch off: each needs a checkpoint.
    """
    in_flight = {cell.trunk.name: 2 * cell.trunk.shape.checkpoint_bytes() for cell in missing}  # the last, and the next
    milestones = {(cell.trunk.name, cell.branch_images): cell.trunk.shape for cell in without_checkpoint}
    return (
        sum(cell.trunk.shape.weights_bytes() for cell in missing)
        + sum(shape.checkpoint_bytes() for shape in milestones.values())
        + sum(in_flight.values())
    )


def bytes_of_tokens(experiment: Experiment, images: int) -> int:
    """What the token stores of so many training images take: a label and the tokens of each view."""
    tokenizer, data = experiment.tokenizer, experiment.data
    token_bytes = 2 if tokenizer.vocab_size <= 2**16 else 4
    encoded = images * data.views + (data.validation_images or 0)
    return encoded * (tokenizer.tokens_per_image + 1) * token_bytes
