"""Submits a graph of jobs to Slurm, and follows it there. What is done is read off files, what is queued off Slurm.

The orchestrator may be killed at any moment, and called again from any login node: nothing that it knows is lost with
it. Slurm's word decides only whether a job is still to be waited for.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeps.devices import Device
from sweeps.executors.base import Executor, Graph, JobCrashed, Listener
from sweeps.executors.slurm.on_node import CallAgain, RunUnit
from sweeps.executors.slurm.packing import Pack, job_seconds, packed, together
from sweeps.executors.slurm.queue import Submission, queue_of, script, submit
from sweeps.executors.slurm.records import (
    ArrayRecord,
    SubmittedRecord,
    UnitFiles,
    UnitRecord,
    UnitState,
    array_file,
    arrays,
    submitted_file,
)
from sweeps.executors.slurm.site import Site
from sweeps.executors.slurm.tasks import slurm_id
from sweeps.jobs.base import Job
from varscale.config.section import RunResources
from varscale.errors import ExperimentError, SweepError

DEFAULT_HOURS = 4.0
"""Time limit where nothing is known of how long a run takes."""
_LAST = "-last"
_SILENCE_SECONDS = 600.0
"""How long Slurm may not answer before a line says so again."""


@dataclass
class _Unit:
    """An element that is queued, runs, or just left the queue."""

    files: UnitFiles
    jobs: dict[str, Job]
    slurm_job: str
    gone_since: float | None = None
    told: set[str] = field(default_factory=set)
    """Keys of jobs whose end was dealt with."""


class SlurmExecutor(Executor):
    """Slurm, as one user's site says."""

    def __init__(self, slurm: Path, site: Site, device: Device, *, campaign: str = "", detach: bool = False) -> None:
        """Submit nothing yet.

        Args:
            slurm: The study's folder for it.
            site: How jobs are submitted.
            device: What times are estimated for.
            campaign: The call that this one goes on for; "": a new one.
            detach: Return as soon as everything is submitted.
        """
        self._slurm, self._site, self._device, self._detach = slurm, site, device, detach
        self.campaign = campaign or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._units: dict[str, _Unit] = {}
        self._stopped = False
        self._silent_since: float | None = None

    def run(self, jobs: Sequence[Job], listener: Listener, retries: int = 2) -> Graph:
        """Submit what is not queued yet, and follow it until all is done; with `detach`, only submit."""
        graph = Graph(jobs, listener, retries)
        self._count_earlier_failures(graph)
        self._adopt(graph.left, listener)
        while graph.left and not self._stopped:
            if (queue := self._queue(listener)) is not None:
                self._follow(graph, listener, queue)
                self._submit(graph, listener)
            listener.refresh()
            if self._detach or not graph.left:
                break
            if graph.over and not self._units:
                break
            time.sleep(self._site.poll_seconds)
        return graph

    def stop(self) -> None:
        """Stop following. What Slurm has goes on; `varscale sweep` follows it again, `scancel` ends it."""
        self._stopped = True

    def call_again(self, command: Sequence[str]) -> str | None:
        """Let a last job call the command again when all that is queued has ended, however it ended.

        That call submits what was lost, and another last job; or, with nothing left, it fits the laws.

        Returns:
            Slurm's id of the last job; None: there is one in the queue already, or nothing that it would wait for.
        """
        queue = queue_of(self._slurm)
        others = [each for (array, _), each in queue.items() if array.endswith(_LAST) and each != slurm_id()]
        if others or not self._units:
            return None
        ids = ":".join(unit.slurm_job for unit in self._units.values())
        folder = (self._slurm / f"{self.campaign}{_LAST}").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        name, minutes = f"{self._slurm.parent.name} laws", 60
        submission = Submission(folder, name, minutes, f"afterany:{ids}", light=True)
        (slurm_job,) = submit([CallAgain(tuple(command), str(Path.cwd()))], submission, self._site)
        return slurm_job

    def write_scripts(self, jobs: Sequence[Job], folder: Path) -> list[Path]:
        """Write the scripts that a sweep would submit; dependencies on jobs that have no number yet are left out."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, (packs, _, minutes) in enumerate(self._arrays(jobs)):
            submission = Submission(folder, self._array_name(packs), minutes, run=packs[0].run)
            paths.append(folder / f"{number}-{'-'.join(submission.name.split())}.sh")
            paths[-1].write_text(script(len(packs), submission, self._site) + "\n")
        return paths

    def check_times(self, jobs: Sequence[Job]) -> None:
        """Raise `ExperimentError` where a stated time limit doesn't hold one step between start and signal."""
        for job in jobs:
            first, last = job.images
            seconds = self._seconds(job)
            hours = job.resources.run.hours or self._site.hours
            if hours is None or seconds is None or last <= first:
                continue
            step = seconds / (last - first) * job.experiment.optim.batch_size
            if 3600 * hours < self._site.signal_seconds + step:
                where = "site: hours" if job.resources.run.hours is None else "resources.hours"
                raise ExperimentError(
                    f"{where}: {hours:g} is too short for {job.title}: a step takes about "
                    f"{step:.0f} seconds there, and the last {self._site.signal_seconds} are for saving"
                )

    def _adopt(self, jobs: Sequence[Job], listener: Listener) -> None:
        """Follow those that Slurm has from an earlier call."""
        wanted = {job.key: job for job in jobs}
        for (array, index), slurm_job in queue_of(self._slurm).items():
            files = UnitFiles(self._slurm / array, index)
            record = files.record()
            own = {key: wanted[key] for key in (record.keys if record else ()) if key in wanted}
            if own:
                self._units[files.name] = _Unit(files, own, slurm_job)
                for job in own.values():
                    listener.note(f"{job.title}: in Slurm's queue already, job {slurm_job}")

    def _count_earlier_failures(self, graph: Graph) -> None:
        """What crashed in earlier calls of the campaign counts."""
        attempts: Counter[str] = Counter()
        final: dict[str, Exception] = {}
        for folder, array in arrays(self._slurm):
            if array.campaign != self.campaign or not submitted_file(folder).exists():
                continue
            for index, unit in enumerate(array.units):
                state = UnitState.read(UnitFiles(folder, index).state)
                failed = state.failures if state is not None else {}
                for key, failure in failed.items():
                    attempts[key] += 1
                    if failure.final:
                        final[key] = failure.error()
                if state is not None and not state.over and not state.stopped and state.running:
                    attempts[state.running] += 1  # killed without a warning
                elif state is None and not unit.needs:
                    attempts.update(unit.keys)  # it never began, and waited for nothing
        for job in graph.left:
            if job in graph.left and (job.key in final or attempts[job.key]):  # others may be lost with one before
                graph.resume(job, attempts[job.key], final.get(job.key))

    def _queue(self, listener: Listener) -> dict[tuple[str, int], str] | None:
        """What Slurm has; None while it doesn't answer."""
        try:
            queue = queue_of(self._slurm)
        except SweepError as error:
            now = time.monotonic()
            if self._silent_since is None or now - self._silent_since > _SILENCE_SECONDS:
                self._silent_since = now
                listener.note(f"Slurm doesn't answer ({error}); what it has goes on, and is asked for again")
            return None
        self._silent_since = None
        return queue

    def _follow(self, graph: Graph, listener: Listener, queue: dict[tuple[str, int], str]) -> None:
        """Tell the graph what became of the units."""
        for name, unit in list(self._units.items()):
            queued, state = queue.get((unit.files.folder.name, unit.files.index)), UnitState.read(unit.files.state)
            if state is not None:
                self._tell(graph, listener, unit, state)
            if queued is not None:
                unit.gone_since = None
                continue
            unit.gone_since = unit.gone_since or time.monotonic()
            waited = time.monotonic() - unit.gone_since
            if (state is not None and state.over) or waited >= self._site.grace_seconds:
                self._settle(graph, unit, state)
                del self._units[name]

    def _tell(self, graph: Graph, listener: Listener, unit: _Unit, state: UnitState) -> None:
        for key in (*state.ended, *state.failures):
            job = unit.jobs.get(key)
            if job is None or key in unit.told:
                continue
            unit.told.add(key)
            if job not in graph.left:
                continue
            if key not in state.failures and not job.done():
                # of an earlier call that asked for less, such as a trunk up to fewer milestones: it is submitted anew
                if graph.is_running(job):
                    graph.postpone(job)
                continue
            if not graph.is_running(job):
                graph.start(job)
            if key in state.failures:
                graph.fail(job, state.failures[key].error())
            else:
                graph.succeed(job)
        running = unit.jobs.get(state.running)
        if running is not None and running in graph.left and state.running not in unit.told:
            if not graph.is_running(running):
                graph.start(running)
            if state.total:
                listener.progress(running, state.done, state.total)

    def _settle(self, graph: Graph, unit: _Unit, state: UnitState | None) -> None:
        """A unit is gone from the queue: what it leaves undone is tried again, or lost."""
        where = f"Slurm job {unit.slurm_job}, log {unit.files.folder}"
        record = unit.files.record()
        held_back = state is None and record is not None and bool(record.needs)
        for key, job in unit.jobs.items():
            if key in unit.told or job not in graph.left:
                continue
            began = graph.is_running(job)
            if job.done():
                if not began:
                    graph.start(job)
                graph.succeed(job)
            elif state is not None and state.stopped:
                if began:
                    graph.postpone(job)
            elif began or (state is None and not held_back):
                if not began:
                    graph.start(job)
                what = "ended without a result" if began else "left the queue before it began"
                graph.fail(job, JobCrashed(f"it {what}; {where}"))

    def _submit(self, graph: Graph, listener: Listener) -> None:
        """Submit what waits and is not queued."""
        queued = {key for unit in self._units.values() for key in unit.jobs if key not in unit.told}
        waiting = [job for job in graph.left if job.key not in queued and not graph.is_running(job)]
        lost = {job.key for job, _ in graph.failed}
        waiting = [job for job in waiting if not (set(job.needs) & lost) or job.ready()]
        for packs, needs, minutes in self._arrays(waiting):
            self._submit_array(packs, needs, minutes, listener)

    def _arrays(self, jobs: Sequence[Job]) -> list[tuple[list[Pack], frozenset[str], int]]:
        """Packs that are submitted together: those that wait for the same, and take as long; inputs come first."""
        packs = packed(jobs, self._seconds, 60 * self._site.pack_minutes, self._site.at_once)
        grouped: dict[tuple[frozenset[str], int, RunResources], list[Pack]] = {}
        for pack in packs:
            grouped.setdefault((frozenset(pack.needs()), self._minutes(pack), pack.run), []).append(pack)
        unmade = {job.key for job in jobs}
        ordered: list[tuple[list[Pack], frozenset[str], int]] = []
        while grouped:
            key = next(key for key in grouped if key[0].isdisjoint(unmade))  # there is one in a graph without circles
            needs, minutes, _ = key
            ordered.append((group := grouped.pop(key), needs, minutes))
            unmade -= {job.key for pack in group for job in pack.jobs}
        return ordered

    def _submit_array(self, packs: list[Pack], needs: frozenset[str], minutes: int, listener: Listener) -> None:
        waits_for = [unit for unit in self._units.values() if needs & (set(unit.jobs) - unit.told)]
        folder = self._slurm / f"{self.campaign}-{sum(1 for _ in self._slurm.glob(f'{self.campaign}-*'))}"
        name = self._array_name(packs)
        array = ArrayRecord(
            campaign=self.campaign,
            name=name,
            units=[
                UnitRecord(
                    keys=[job.key for job in pack.jobs],
                    jobs=[job.record for job in pack.jobs],
                    needs=[unit.files.name for unit in waits_for],
                )
                for pack in packs
            ],
        )
        array.write(array_file(folder))
        ids = ":".join(unit.slurm_job for unit in waits_for)
        submission = Submission(folder.absolute(), name, minutes, f"afterok:{ids}" if ids else "", packs[0].run)
        calls: list[Any] = [
            RunUnit(str(folder.absolute()), index, minutes, self._site.signal_seconds) for index in range(len(packs))
        ]
        slurm_jobs = submit(calls, submission, self._site)
        SubmittedRecord(ids=slurm_jobs).write(submitted_file(folder))
        for index, (pack, slurm_job) in enumerate(zip(packs, slurm_jobs, strict=True)):
            unit = _Unit(UnitFiles(folder, index), {job.key: job for job in pack.jobs}, slurm_job)
            self._units[unit.files.name] = unit
        jobs = f"{len(packs)} jobs" if len(packs) > 1 else "1 job"
        listener.note(f"submitted {jobs} to Slurm, {slurm_jobs[0].partition('_')[0]}: {name}")

    def _seconds(self, job: Job) -> float | None:
        return job_seconds(job, self._device)

    def _minutes(self, pack: Pack) -> int:
        """The time limit."""
        if (hours := pack.run.hours or self._site.hours) is not None:
            return max(1, math.ceil(60 * hours))
        known = [seconds for job in pack.jobs if (seconds := self._seconds(job)) is not None]
        if not known:
            return round(60 * DEFAULT_HOURS)
        minutes = 10 + 2 * sum(known) / 60
        return 10 * math.ceil(minutes / 10)  # few different ones: equal ones share an array

    def _array_name(self, packs: Sequence[Pack]) -> str:
        study = self._slurm.parent.name
        return f"{study} {together([pack.name for pack in packs])}"
