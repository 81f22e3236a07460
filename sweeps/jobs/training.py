"""The jobs that train models: a trunk, and the branches that leave it and end as cells."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sweeps.jobs.base import Job, Resources, StudyPlace, trunk_fields
from varscale.numerics.machine import Share
from varscale.store.layout import RunFiles
from varscale.store.records import read_result
from varscale.training.cells import Cell, Execution, Trunk
from varscale.training.interruption import Report

if TYPE_CHECKING:
    from varscale.training.runs import Inputs


@dataclass(frozen=True)
class TrunkJob(Job):
    """Train a trunk up to its last milestone."""

    trunk: Trunk
    milestones: tuple[int, ...]

    kind = "trunk"
    needs = ("tokenizer", "tokens", "execution")

    @property
    def key(self) -> str:
        """The trunk's label."""
        return f"trunk {self.trunk.label}"

    @cached_property
    def files(self) -> RunFiles:
        """The trunk's."""
        return self.place.trunk(self.trunk)

    @property
    def resources(self) -> Resources:
        """What the experiment says for models of this size."""
        return Resources(run=self.trunk.resources)

    @property
    def flops(self) -> float:
        """Of the trunk and its longest branch, a quarter of it at the usual share of 20%."""
        return self.trunk.flops_per_image * self.milestones[-1] * 1.25

    @property
    def flops_per_image(self) -> int:
        """Of the trunk's model."""
        return self.trunk.flops_per_image

    @property
    def images(self) -> tuple[int, int]:
        """From the start to the last milestone."""
        return 0, self.milestones[-1]

    def done(self) -> bool:
        """Whether all milestones are there."""
        return all(self.files.milestone(images).exists() for images in self.milestones)

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.training.runs import train_trunk

        train_trunk(self.trunk, self.milestones, self.files, _inputs(self.place, share), report)

    def described(self) -> dict[str, Any]:
        """The trunk, and where branches leave it."""
        return {"milestones": list(self.milestones), **trunk_fields(self.trunk)}


@dataclass(frozen=True)
class BranchJob(Job):
    """Train a branch and measure the cell; without a trunk the whole run."""

    cell: Cell
    from_trunk: bool = True

    kind = "branch"

    @property
    def key(self) -> str:
        """The cell's label."""
        return self.cell.label

    @property
    def title(self) -> str:
        """The cell's."""
        return self.cell.title

    @cached_property
    def files(self) -> RunFiles:
        """The cell's."""
        return self.place.cell(self.cell)

    @cached_property
    def trunk_files(self) -> RunFiles | None:
        """The trunk's."""
        return self.place.trunk(self.cell.trunk) if self.from_trunk else None

    @property
    def needs(self) -> tuple[str, ...]:
        """What trunks need, and its trunk."""
        return (*TrunkJob.needs, *self.starts_within)

    @property
    def starts_within(self) -> tuple[str, ...]:
        """It leaves its trunk while that goes on."""
        return (f"trunk {self.cell.trunk.label}",) if self.from_trunk else ()

    @property
    def resources(self) -> Resources:
        """What the experiment says for models of this size."""
        return Resources(run=self.cell.trunk.resources)

    @property
    def flops(self) -> float:
        """Of the branch."""
        return self.cell.trunk.flops_per_image * self.cell.decay_images

    @property
    def flops_per_image(self) -> int:
        """Of the cell's model."""
        return self.cell.trunk.flops_per_image

    @property
    def images(self) -> tuple[int, int]:
        """From where it leaves the trunk to its end."""
        return (self.cell.branch_images if self.from_trunk else 0), self.cell.images

    def done(self) -> bool:
        """Whether the cell has its result."""
        return read_result(self.files) is not None

    def ready(self) -> bool:
        """Whether the trunk got as far as the branch leaves it, or the branch was begun."""
        if self.trunk_files is None:
            return True
        return self.files.last_checkpoint.exists() or self.trunk_files.milestone(self.cell.branch_images).exists()

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.training.runs import train_cell

        train_cell(self.cell, self.trunk_files, self.files, _inputs(self.place, share), report)

    def diverged(self, reason: str) -> None:
        """Write down that the cell diverged, in its trunk or its branch."""
        from varscale.training.runs import record_divergence

        record_divergence(self.cell, self.files, _inputs(self.place, Share()), reason)

    def described(self) -> dict[str, Any]:
        """The cell."""
        return {"budget": self.cell.budget_flops, "from_trunk": self.from_trunk, **trunk_fields(self.cell.trunk)}


def _inputs(place: StudyPlace, share: Share) -> "Inputs":
    """Tokenizer, tokens, and what was decided for the study on this machine; eager where nothing was."""
    from varscale.training.execution import ExecutionRecord
    from varscale.training.runs import Inputs

    record = ExecutionRecord.read(place.study.execution)
    undecided = Execution(threads=share.threads, memory_bytes=share.memory_bytes(), peers=share.peers)
    return Inputs(place.tokenizer, place.tokens, undecided if record is None else record.execution(share))
