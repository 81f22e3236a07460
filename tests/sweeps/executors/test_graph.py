"""Which jobs of a graph may start, against its definition, and that a graph of many jobs doesn't take its square."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toy_sweep import toy_experiment

from sweeps.executors.base import Graph
from sweeps.jobs.base import Job, StudyPlace
from varscale.store.layout import RunFiles, Store, TokenFiles

LOOKS: list[str] = []


@dataclass(frozen=True)
class Step(Job):
    """Does nothing; notes when it is asked whether it is ready."""

    number: int
    needs: tuple[str, ...] = ()
    starts_within: tuple[str, ...] = ()
    flops: float = 0.0
    is_ready: bool = True

    @property
    def key(self) -> str:
        return f"step {self.number}"

    title = key

    @property
    def files(self) -> RunFiles:
        return RunFiles(Path("nowhere"))

    def done(self) -> bool:
        return False

    def ready(self) -> bool:
        LOOKS.append(self.key)
        return self.is_ready

    def run(self, share: Any, report: Any) -> None: ...

    def described(self) -> dict[str, Any]:
        return {}


class Silent:
    """A listener that needs to know nothing."""

    def started(self, job: Job) -> None: ...

    def progress(self, job: Job, done: int, total: int) -> None: ...

    def ended(self, job: Job, state: str) -> None: ...

    def note(self, text: str) -> None: ...

    def refresh(self) -> None: ...


def step(number: int, **fields: Any) -> Step:
    files = Path("nowhere")
    place = StudyPlace(Store(files), Store(files).study("toy"), RunFiles(files), TokenFiles(files))
    return Step(EXPERIMENT, place, number, **fields)


EXPERIMENT = toy_experiment()


@pytest.mark.parametrize("seed", range(20))
def test_what_may_start_is_what_the_definition_says(seed: int) -> None:
    """Jobs whose needs have ended (but for those that it starts within), that are ready, the longest way first."""
    chance = random.Random(seed)
    jobs = []
    for number in range(30):
        needs = tuple(f"step {each}" for each in sorted(chance.sample(range(number), min(number, chance.randrange(3)))))
        within = tuple(key for key in needs if chance.random() < 0.3)
        flops, is_ready = float(chance.randrange(5)), chance.random() < 0.9
        jobs.append(step(number, needs=needs, starts_within=within, flops=flops, is_ready=is_ready))
    graph, running, ended = Graph(jobs, Silent(), 2), list[Step](), set[str]()
    while True:
        waiting = [job for job in jobs if job.key not in ended and job not in running]
        wanted = [job for job in waiting if job.is_ready and set(job.needs) <= ended | set(job.starts_within)]
        assert list(graph.candidates()) == sorted(wanted, key=lambda job: -job.flops)
        assert {job.key for job in graph.left} == {job.key for job in (*waiting, *running)}
        assert graph.over == (not running and not wanted)
        if wanted and (not running or chance.random() < 0.6):
            running.append(chance.choice(wanted))
            graph.start(running[-1])
        elif running:
            job = running.pop(chance.randrange(len(running)))
            graph.succeed(job)
            ended.add(job.key)
        else:
            break


def test_a_thousand_jobs_are_not_looked_at_again_for_each_that_ends() -> None:
    graph = Graph([step(number, flops=float(number)) for number in range(1000)], Silent(), 2)
    LOOKS.clear()
    while (job := next(graph.candidates(), None)) is not None:
        graph.start(job)
        graph.succeed(job)
        assert not graph.left or not graph.over
    assert graph.left == ()
    assert len(LOOKS) <= 2 * 1000
