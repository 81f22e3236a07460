"""Evaluations as jobs: adding one trains nothing again, and a cell's starts when its branch has ended."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sweeps.jobs.base import Job, Resources, StudyPlace, set_threads, trunk_fields
from sweeps.study import Study
from varscale.config import Experiment
from varscale.evaluation.plan import FEW_IMAGES, FidelityPlan, Subject, number_of
from varscale.numerics.machine import Share
from varscale.store.layout import RunFiles
from varscale.store.records import read_result
from varscale.training.cells import Cell
from varscale.training.interruption import Report

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceJob(Job):
    """Make the features of the reference's images, which all evaluations need."""

    plan: FidelityPlan

    kind = "reference"
    title = "images · reference"
    resources = Resources(whole_machine=True)

    @cached_property
    def files(self) -> RunFiles:
        """The features'."""
        return self.place.store.run(self.plan.reference_key())

    def done(self) -> bool:
        """Whether they are there; damaged ones are made anew by the first evaluation."""
        return self.files.weights.exists()

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.evaluation.extractors import open_extractor
        from varscale.evaluation.subjects import reference_features
        from varscale.training.interruption import STOP

        set_threads(share)
        data, store = self.experiment.data, self.place.store
        extractor = open_extractor(self.plan, data, store)
        reference_features(self.plan, extractor, data, store, STOP.checked(report))


@dataclass(frozen=True)
class EvaluationJob(Job):
    """Measure images of a cell, real ones, or the tokenizer's reconstructions of these."""

    plan: FidelityPlan
    subject: Subject
    cell: Cell | None = None
    """Whose images; None where they are no cell's."""

    kind = "evaluation"

    @property
    def key(self) -> str:
        """Begins with "evaluation", which its cell's key doesn't."""
        kept = f" 1of{self.plan.candidates}" if self.plan.candidates > 1 else ""
        return f"evaluation {f'{self.cell.label} g{self.plan.guidance:.12g}{kept}' if self.cell else self.subject}"

    @property
    def title(self) -> str:
        """For people."""
        of = f"{self.cell.title} · {self.plan.how}" if self.cell else self.subject
        return f"images · {of}"

    @cached_property
    def files(self) -> RunFiles:
        """The evaluation's."""
        return self.place.store.run(self.plan.key(self.subject, self._measured))

    @property
    def needs(self) -> tuple[str, ...]:
        """The reference, and the cell; or of reconstructions the tokenizer."""
        measured = (self.cell.label,) if self.cell else ("tokenizer",) if self.subject == "reconstructed" else ()
        return (ReferenceJob.kind, *measured)

    def done(self) -> bool:
        """Whether its result is there, or its cell diverged and has no images."""
        if self.cell is not None:
            cell = read_result(self.place.cell(self.cell))
            if cell is not None and cell.status == "diverged":
                return True
        return read_result(self.files) is not None

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.evaluation.subjects import Evaluated, evaluate
        from varscale.training.interruption import STOP

        set_threads(share)
        cell = self.place.cell(self.cell) if self.cell else None
        latents = self.place.tokens if self.experiment.model.description.reads == "latents" else None
        captions = self.place.tokens if self.experiment.model.condition == "text" else None
        data, tokenizer = self.experiment.data, self.place.tokenizer
        what = Evaluated(self.subject, self.title, data, tokenizer, cell, latents, captions)
        evaluate(self.plan, what, self.files, self.place.store, STOP.checked(report))

    def described(self) -> dict[str, Any]:
        """What is measured."""
        cell = {"budget": self.cell.budget_flops, **trunk_fields(self.cell.trunk)} if self.cell else {}
        return {"subject": self.subject, **cell}

    @property
    def _measured(self) -> RunFiles | None:
        if self.cell is not None:
            return self.place.cell(self.cell)
        if self.subject == "real":
            return None
        return self.place.tokens if self.experiment.model.description.reads == "latents" else self.place.tokenizer


def cell_evaluations(place: StudyPlace, plan: FidelityPlan, cells: Sequence[Cell]) -> list[EvaluationJob]:
    """One job for each way of drawing and cell; all cells drawn in the plan's first way come first."""
    return [
        EvaluationJob(_measured_by(each, cell.trunk.experiment), place, each, "cell", cell)
        for each in plan.one_by_one()
        for cell in cells
    ]


def evaluation_jobs(study: Study, *, all_of_them: bool = False) -> list[EvaluationJob]:
    """What a study's `evaluation.fidelity` asks for and is not done, or all: the floors first, then the cells."""
    plan, experiment, place = study.fidelity, study.experiment, StudyPlace.of(study)
    if plan is None:
        return []
    jobs = cell_evaluations(place, plan, study.cells)
    if plan.has_floors:
        floors: tuple[Subject, ...] = ("real", "reconstructed")
        jobs = [*(EvaluationJob(experiment, place, plan, subject) for subject in floors), *jobs]
    missing = [job for job in jobs if not job.done()]
    if missing and plan.settings.samples < FEW_IMAGES:
        _log.warning(
            "evaluation.fidelity.samples: %d are few: FID is biased upwards the fewer there are; expected %d or more, "
            "and MIND or fid_extrapolated instead",
            plan.settings.samples,
            FEW_IMAGES,
        )
    if missing and not plan.has_floors:
        _log.warning(
            "evaluation.fidelity.samples: no floor is measured: that takes %d real images beside the reference, and "
            "there are %d",
            plan.settings.samples,
            number_of(plan.floor),
        )
    return jobs if all_of_them else missing


def reference_jobs(evaluations: Sequence[EvaluationJob]) -> list[ReferenceJob]:
    """What must come before the evaluations of a study that are not done."""
    jobs = [ReferenceJob(each.experiment, each.place, each.plan) for each in evaluations[:1]]
    return [job for job in jobs if not job.done()]


def _measured_by(plan: FidelityPlan, experiment: Experiment) -> Experiment:
    """The experiment with the plan's settings: what a job's file says is what the job does."""
    evaluation = experiment.evaluation.model_copy(update={"fidelity": plan.settings})
    return experiment.model_copy(update={"evaluation": evaluation})
