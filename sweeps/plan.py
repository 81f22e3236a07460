"""What a sweep has to do: its cells, their trunks, and what is done already. Pure but for reading result files."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from varscale.cells import Cell, Numerics, Trunk, grid_cells
from varscale.config import Experiment
from varscale.files import ExperimentFiles, RunFiles
from varscale.identity import DataIdentity


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

    def cell_files(self, cell: Cell) -> RunFiles:
        """A cell's files: where it finished (perhaps in another study), or where it will run."""
        print_ = self.cell_fingerprint(cell)
        return self.files.finished_cell(cell.name, print_) or self.files.cell(cell.name, print_)

    def trunk_files(self, trunk: Trunk) -> RunFiles:
        """A trunk's files."""
        return self.files.trunk(trunk.name, trunk.fingerprint(self.tokens, self.numerics))

    def finished(self, cell: Cell) -> bool:
        """Whether a cell has its result, diverged ones included."""
        return self.cell_files(cell).finished(self.cell_fingerprint(cell))

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


def selected_cells(experiment: Experiment) -> tuple[Cell, ...]:
    """The cells of the experiment's grid and variants, each once; raises `ExperimentError` for too short ones."""
    unique: dict[tuple[str, float], Cell] = {}
    for cell in grid_cells(experiment):
        unique.setdefault((cell.trunk.name, cell.budget_flops), cell)
    return tuple(unique.values())


def bytes_of_runs(cells: Iterable[Cell]) -> int:
    """About what cells leave on the disk at most: a checkpoint where each branches off, and weights."""
    return sum(2 * cell.trunk.shape.training_state_bytes() for cell in cells)


def bytes_of_tokens(experiment: Experiment, images: int) -> int:
    """What the token stores of so many training images take: a label and the tokens of each view."""
    tokenizer, data = experiment.tokenizer, experiment.data
    token_bytes = 2 if tokenizer.vocab_size <= 2**16 else 4
    encoded = images * data.views + (data.validation_images or 0)
    return encoded * (tokenizer.tokens_per_image + 1) * token_bytes
