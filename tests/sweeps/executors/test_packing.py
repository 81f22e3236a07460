"""Which jobs share a job of Slurm: all of them once, none before what it needs, no more at a time than allowed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_sweep import toy_experiment

from sweeps.executors.slurm.packing import Pack, packed
from sweeps.grid import grid_cells
from sweeps.jobs.base import Job
from sweeps.jobs.graph import study_jobs
from sweeps.study import Study
from varscale.store.layout import Store

FIDELITY = {"samples_per_class": 0, "fidelity": {"samples": 100, "reference_images": 100}}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    experiment = toy_experiment(grid={"depths": [1, 2, 3], "budgets": [2e7, 4e7, 8e7], "min_steps": 2})
    fidelity = toy_experiment(evaluation=FIDELITY).evaluation.fidelity
    assert fidelity is not None
    evaluation = experiment.evaluation.model_copy(update={"fidelity": fidelity})
    experiment = experiment.model_copy(update={"evaluation": evaluation})
    cells = grid_cells(experiment)
    study = Study.of(experiment, Store(tmp_path_factory.mktemp("packing") / "runs"), cells)
    return study_jobs(study, cells)


def check_order(packs: list[Pack]) -> None:
    """Within a pack, and between packs: what a job needs comes before it, and no two packs wait for each other."""
    of = {job.key: number for number, pack in enumerate(packs) for job in pack.jobs}
    waits = {number: {of[key] for key in pack.needs() if key in of} for number, pack in enumerate(packs)}
    ended: set[int] = set()
    while len(ended) < len(packs):
        ready = {number for number, needed in waits.items() if needed <= ended} - ended
        assert ready, "packs that wait for each other"
        ended |= ready


@given(
    seconds=st.one_of(st.none(), st.floats(0, 1e4)),
    pack_seconds=st.floats(0, 1e5),
    at_once=st.one_of(st.none(), st.integers(1, 12)),
)
def test_every_job_is_in_one_pack(
    graph: list[Job], seconds: float | None, pack_seconds: float, at_once: int | None
) -> None:
    packs = packed(graph, lambda job: seconds, pack_seconds, at_once)
    assert sorted(job.key for pack in packs for job in pack.jobs) == sorted(job.key for job in graph)
    check_order(packs)
    first = next(pack for pack in packs if pack.name == "preparation")
    assert [job.key for job in first.jobs] == ["tokenizer", "tokens", "execution", "reference"]
    if at_once is not None:
        after = [pack for pack in packs if pack is not first]
        waiting = {key for pack in after for key in pack.needs() if key.startswith("trunk")}
        lanes = [pack for pack in after if not any(key.startswith("trunk") for key in pack.needs())]
        branches = [
            sum(key in pack.needs() for pack in after) for key in waiting
        ]  # of each trunk: they follow on it, and take its place
        assert sum(branches) + len(lanes) - len(waiting) <= max(at_once, len(lanes))


def test_short_runs_share_a_job_and_long_ones_have_their_own(graph: list[Job]) -> None:
    names = [pack.name for pack in packed(graph, lambda job: 1.0, 1e6, None)]
    assert names == ["preparation", "floors", "d1-s0 +2"]  # whole sizes, all of them
    alone = packed(graph, lambda job: 100.0, 0.0, None)
    assert len(alone) == 2 + 3 + 9  # trunks, and cells with their evaluations
    assert all(len(pack.jobs) == 2 for pack in alone if "-c" in pack.name)


def test_a_pack_knows_what_it_waits_for(graph: list[Job]) -> None:
    trunk = next(job for job in graph if job.key == "trunk d1-s0")
    cell = next(job for job in graph if job.key.startswith("d1-s0-c"))
    assert Pack("cell", (cell,)).needs() == {"tokenizer", "tokens", "execution", "trunk d1-s0"}
    assert Pack("both", (trunk, cell)).needs() == {"tokenizer", "tokens", "execution"}
