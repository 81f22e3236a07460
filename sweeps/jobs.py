"""The jobs that a study is a graph of: tokenizer, tokens, execution, trunks, branches.

A job knows what it needs, what it takes of the machine, how to run and, from files alone, whether it is done. Each can
be written to a file and run by itself: `varscale run-job FILE`. Worker processes import this module; torch is imported
when a job runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat, JsonValue

from sweeps.study import Study, trunks_of
from varscale.config import Experiment
from varscale.config.yaml import validate
from varscale.errors import ExperimentError, TokenizerRejected
from varscale.numerics.machine import Share
from varscale.store.layout import RunFiles, Store, StudyFiles, TokenFiles
from varscale.store.records import PlainName, Record, encoded_images, read_result
from varscale.training.cells import Cell, Execution, Trunk

Report = Callable[[int, int], None]
"""Called with the images done and in all."""


@dataclass(frozen=True)
class Resources:
    """What a job takes."""

    whole_machine: bool = False
    """Whether it uses all processors (or the GPU) alone; otherwise a worker's share."""


class JobRecord(Record):
    """A job as a file (job.json)."""

    job: Literal["tokenizer", "tokens", "execution", "trunk", "branch", "evaluation"]
    experiment: dict[str, JsonValue]
    """Settings, a variant's changes made."""
    runs: str
    """The runs folder."""
    tokenizer: PlainName
    tokens: PlainName
    train_images: int = Field(default=1, ge=1)
    sizes: list[tuple[int, int, FiniteFloat, int]] = Field(default_factory=list)
    """Depth, seed, smallest budget and images of each trunk, to decide how to execute them."""
    depth: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    smallest_budget: FiniteFloat = 1.0
    variant: str = ""
    milestones: list[int] = Field(default_factory=list)
    budget: FiniteFloat = 1.0
    from_trunk: bool = False
    subject: Literal["cell", "real", "reconstructed"] = "cell"
    """What an evaluation measures."""


@dataclass(frozen=True)
class StudyPlace:
    """Where a study's jobs find their inputs and leave their outputs."""

    store: Store
    study: StudyFiles
    tokenizer: RunFiles
    tokens: TokenFiles

    @classmethod
    def of(cls, study: Study) -> "StudyPlace":
        """Of a study."""
        return cls(study.store, study.files, study.tokenizer, study.tokens)

    def trunk(self, trunk: Trunk) -> RunFiles:
        """A trunk's files."""
        return self.store.run(trunk.key(self.tokens.fingerprint))

    def cell(self, cell: Cell) -> RunFiles:
        """A cell's files."""
        return self.store.run(cell.key(self.tokens.fingerprint))


@dataclass(frozen=True)
class Job(ABC):
    """One piece of a study's work; it can be sent to another process."""

    experiment: Experiment
    place: StudyPlace

    @property
    @abstractmethod
    def key(self) -> str:
        """What tells it from the other jobs of its study; what `needs` names."""

    @property
    @abstractmethod
    def title(self) -> str:
        """For people."""

    @property
    @abstractmethod
    def files(self) -> RunFiles:
        """Where it writes."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of the jobs whose work it starts from."""
        return ()

    @property
    def starts_within(self) -> tuple[str, ...]:
        """Which of these need not have ended: it starts as soon as it is `ready`."""
        return ()

    @property
    def resources(self) -> Resources:
        """What it takes of the machine."""
        return Resources()

    @property
    def flops(self) -> float:
        """Of itself and the longest of what waits for it; the longest way to go begins first."""
        return 0.0

    @property
    def images(self) -> tuple[int, int]:
        """The first and the last image of its run."""
        return 0, 0

    @property
    def flops_per_image(self) -> int:
        """Training FLOPs of an image; 0: it trains no model of the grid."""
        return 0

    @abstractmethod
    def done(self) -> bool:
        """Whether its work is there, from files alone."""

    def ready(self) -> bool:
        """Whether what it starts from is there, from files alone."""
        return True

    @abstractmethod
    def run(self, share: Share, report: Report) -> None:
        """Do it, in this process."""

    def outcome(self) -> str:
        """What it came to, for people, from files alone; "" where there is nothing to say."""
        return ""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Its own fields of a `JobRecord`."""

    def write(self) -> Path:
        """Write it down where it writes its files."""
        place = self.place
        JobRecord(
            experiment=self.experiment.model_dump(mode="json"),
            runs=str(place.store.runs.absolute()),
            tokenizer=place.tokenizer.folder.name,
            tokens=place.tokens.folder.name,
            **self.described(),
        ).write(self.files.job)
        return self.files.job


@dataclass(frozen=True)
class TokenizerJob(Job):
    """Train and measure the tokenizer; while its figures speak against it, it fails (unless `tokenizer.accept`)."""

    key = "tokenizer"
    title = "tokenizer"
    resources = Resources(whole_machine=True)

    @property
    def files(self) -> RunFiles:
        """The tokenizer's."""
        return self.place.tokenizer

    def done(self) -> bool:
        """Whether its result is there, its weights are intact, and it is fit for use."""
        from varscale.evaluation.verdict import check_tokenizer
        from varscale.tokenizer.training import tokenizer_ready

        try:
            check_tokenizer(self.files, self.experiment.tokenizer)
        except TokenizerRejected:
            return False
        return self.files.weights.exists() and tokenizer_ready(self.files)

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.evaluation.verdict import check_tokenizer
        from varscale.tokenizer.training import train_tokenizer

        _set_threads(share)
        train_tokenizer(self.experiment, self.files, report)
        check_tokenizer(self.files, self.experiment.tokenizer)

    def outcome(self) -> str:
        """Its figures."""
        from varscale.evaluation.verdict import described

        return described(self.files, self.experiment.tokenizer)

    def described(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {"job": "tokenizer"}


@dataclass(frozen=True)
class TokensJob(Job):
    """Encode the training and validation images."""

    train_images: int

    key = "tokens"
    title = "tokens"
    needs = ("tokenizer",)
    resources = Resources(whole_machine=True)

    @property
    def files(self) -> RunFiles:
        """The token stores'."""
        return self.place.tokens

    def done(self) -> bool:
        """Whether intact stores of so many training images are there."""
        from varscale.tokenizer.training import tokens_ready

        return encoded_images(self.place.tokens) >= self.train_images and tokens_ready(
            self.place.tokens, self.train_images
        )

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.tokenizer.training import encode_tokens

        _set_threads(share)
        encode_tokens(self.experiment, self.place.tokenizer, self.place.tokens, self.train_images, report)

    def described(self) -> dict[str, Any]:
        """How many images."""
        return {"job": "tokens", "train_images": self.train_images}


@dataclass(frozen=True)
class ExecutionJob(Job):
    """Decide how this machine carries out the study's runs, and refuse sizes that don't fit into its memory."""

    sizes: tuple[tuple[Trunk, int], ...]
    """Each trunk, with the images that all of its runs take together."""

    key = "execution"
    title = "execution"
    needs = ("tokenizer",)

    @property
    def files(self) -> RunFiles:
        """The study's own folder."""
        return RunFiles(self.place.study.folder)

    def done(self) -> bool:
        """Whether it was decided on this machine, as the settings allow."""
        from varscale.training.execution import ExecutionRecord

        record = ExecutionRecord.read(self.place.study.execution)
        return record is not None and record.allowed(self.experiment.runtime)

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.tokenizer.storage import load_tokenizer
        from varscale.training.execution import decide_execution

        _set_threads(share)
        for trunk, _ in self.sizes:
            trunk.check_memory(share.memory_bytes())
        if not self.done():
            tokenizer = load_tokenizer(self.place.tokenizer.weights, self.place.tokenizer.fingerprint)
            decided = decide_execution(self.sizes, self.experiment.runtime, share, tokenizer)
            decided.write(self.place.study.execution)

    def described(self) -> dict[str, Any]:
        """The sizes."""
        sizes = [(trunk.depth, trunk.seed, trunk.smallest_budget, images) for trunk, images in self.sizes]
        return {"job": "execution", "sizes": sizes}


@dataclass(frozen=True)
class TrunkJob(Job):
    """Train a trunk up to its last milestone."""

    trunk: Trunk
    milestones: tuple[int, ...]

    needs = ("tokenizer", "tokens", "execution")

    @property
    def key(self) -> str:
        """The trunk's label."""
        return f"trunk {self.trunk.label}"

    @property
    def title(self) -> str:
        """The trunk's."""
        return f"trunk {self.trunk.label}"

    @cached_property
    def files(self) -> RunFiles:
        """The trunk's."""
        return self.place.trunk(self.trunk)

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
        from varscale.training.runs import Inputs, train_trunk

        inputs = Inputs(self.place.tokenizer, self.place.tokens, execution_here(self.place.study, share))
        train_trunk(self.trunk, self.milestones, self.files, inputs, report)

    def described(self) -> dict[str, Any]:
        """The trunk, and where branches leave it."""
        return {"job": "trunk", "milestones": list(self.milestones), **trunk_fields(self.trunk)}


@dataclass(frozen=True)
class BranchJob(Job):
    """Train a branch and measure the cell; without a trunk the whole run."""

    cell: Cell
    from_trunk: bool = True

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
        from varscale.training.runs import Inputs, train_cell

        inputs = Inputs(self.place.tokenizer, self.place.tokens, execution_here(self.place.study, share))
        train_cell(self.cell, self.trunk_files, self.files, inputs, report)

    def diverged(self, reason: str) -> None:
        """Write down that the cell diverged, in its trunk or its branch."""
        from varscale.training.runs import Inputs, record_divergence

        inputs = Inputs(self.place.tokenizer, self.place.tokens, execution_here(self.place.study, Share()))
        record_divergence(self.cell, self.files, inputs, reason)

    def described(self) -> dict[str, Any]:
        """The cell."""
        return {
            "job": "branch",
            "budget": self.cell.budget_flops,
            "from_trunk": self.from_trunk,
            **trunk_fields(self.cell.trunk),
        }


def study_jobs(study: Study, missing: Sequence[Cell]) -> list[Job]:
    """The graph of what a study's missing cells and evaluations need; jobs that are done are left out."""
    from sweeps.evaluation_job import evaluation_jobs
    from sweeps.grid import images_by_trunk

    experiment, place = study.experiment, StudyPlace.of(study)
    evaluations = evaluation_jobs(study)
    if not missing:
        needed: list[Job] = [TokenizerJob(experiment, place), *evaluations] if evaluations else []
        return [job for job in needed if not job.done()]
    trunks = [TrunkJob(trunk.experiment, place, trunk, milestones) for trunk, milestones in trunks_of(missing).values()]
    jobs: list[Job] = [
        TokenizerJob(experiment, place),
        TokensJob(experiment, place, study.train_images),
        ExecutionJob(experiment, place, tuple(images_by_trunk(study.cells))),
        *trunks,
        *(BranchJob(cell.trunk.experiment, place, cell) for cell in missing),
        *evaluations,
    ]
    return [job for job in jobs if not job.done()]


def single_jobs(study: Study) -> list[Job]:
    """The graph of a study's one cell, trained from start to end without trunk and branch."""
    (cell,) = study.cells
    experiment, place = study.experiment, StudyPlace.of(study)
    jobs: list[Job] = [
        TokenizerJob(experiment, place),
        TokensJob(experiment, place, study.train_images),
        ExecutionJob(experiment, place, ((cell.trunk, cell.images),)),
        BranchJob(cell.trunk.experiment, place, cell, from_trunk=False),
    ]
    return [job for job in jobs if not job.done()]


def read_job(path: Path) -> Job:
    """The job in a file.

    Raises:
        ExperimentError: There is no such file, or it is none that this version of varscale can run.
    """
    record = JobRecord.read(path)
    if record is None:
        raise ExperimentError(f"{path}: no job that can be read; a run's folder has its job.json")
    experiment = validate(record.experiment, str(path))
    store = Store(Path(record.runs))
    place = StudyPlace(
        store,
        store.study(experiment.name),
        RunFiles(store.runs / "tokenizers" / record.tokenizer),
        TokenFiles(store.runs / "tokens" / record.tokens),
    )
    trunk = Trunk(experiment, record.depth, record.seed, record.smallest_budget, record.variant)
    match record.job:
        case "tokenizer":
            return TokenizerJob(experiment, place)
        case "tokens":
            return TokensJob(experiment, place, record.train_images)
        case "execution":
            sizes = ((Trunk(experiment, depth, seed, least), images) for depth, seed, least, images in record.sizes)
            return ExecutionJob(experiment, place, tuple(sizes))
        case "trunk":
            return TrunkJob(experiment, place, trunk, tuple(record.milestones))
        case "branch":
            return BranchJob(experiment, place, trunk.cell(record.budget), record.from_trunk)
        case "evaluation":
            from sweeps.evaluation_job import EvaluationJob
            from varscale.evaluation.plan import FidelityPlan

            plan = FidelityPlan.of(experiment)
            if plan is None:
                raise ExperimentError(f"{path}: experiment.evaluation.fidelity: missing; expected what is measured")
            cell = trunk.cell(record.budget) if record.subject == "cell" else None
            return EvaluationJob(experiment, place, plan, record.subject, cell)


def execution_here(study: StudyFiles, share: Share) -> Execution:
    """What was decided for the study on this machine; eager where nothing was."""
    from varscale.training.execution import ExecutionRecord

    record = ExecutionRecord.read(study.execution)
    if record is None:
        return Execution(threads=share.threads, memory_bytes=share.memory_bytes())
    return record.execution(share)


def trunk_fields(trunk: Trunk) -> dict[str, Any]:
    """A trunk's fields of a `JobRecord`."""
    return {
        "depth": trunk.depth,
        "seed": trunk.seed,
        "smallest_budget": trunk.smallest_budget,
        "variant": trunk.variant,
    }


def _set_threads(share: Share) -> None:
    import torch

    torch.set_num_threads(share.threads)
