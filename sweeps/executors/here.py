"""Jobs in this process, one after the other: single runs, and a job by itself."""

from collections.abc import Sequence
from functools import partial

from sweeps.executors.base import Executor, Graph, Listener
from sweeps.executors.local import LocalExecutor
from sweeps.jobs.base import Job
from varscale.errors import Diverged, SweepError
from varscale.numerics.machine import MachineShares
from varscale.store.records import read_result


class HereExecutor(Executor):
    """Runs jobs in this process; where one of them takes several devices, in as many others."""

    def __init__(self, shares: MachineShares) -> None:
        self._shares = shares

    def run(self, jobs: Sequence[Job], listener: Listener, retries: int = 0) -> Graph:
        """Run the graph; an error of a job ends it, and is raised."""
        if any(job.resources.run.processes > 1 for job in jobs):
            return self._run_by_workers(jobs, listener, retries)
        graph = Graph(jobs, listener, retries)
        while job := next(graph.candidates(), None):
            graph.start(job)
            job.write()
            share = self._shares.whole if job.resources.whole_machine else self._shares.worker
            job.run(share, partial(listener.progress, job))
            graph.succeed(job)
        return graph

    def stop(self) -> None:
        """Nothing runs between calls of `run`."""

    def _run_by_workers(self, jobs: Sequence[Job], listener: Listener, retries: int) -> Graph:
        with LocalExecutor(self._shares) as executor:
            graph = executor.run(jobs, listener, retries)
        for job, reason in graph.failed:
            raise SweepError(f"{job.title}: {reason}")
        for result in (read_result(job.files) for job in jobs):
            if result is not None and result.status == "diverged":
                raise Diverged(result.reason)
        return graph
