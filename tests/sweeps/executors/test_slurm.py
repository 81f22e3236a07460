"""Sweeps on a real Slurm: what users see, and that no event of a cluster's life costs or changes a cell."""

import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from one_box import NODES, ON_SLURM, OneBox, running, write_site
from toy_sweep import (
    Finished,
    command,
    delivered,
    environment,
    numbers_of,
    results,
    start,
    toy_experiment,
    varscale,
    wait_for,
    write_toy,
)

from sweeps.devices import named_device
from sweeps.executors.slurm.executor import SlurmExecutor
from sweeps.executors.slurm.records import UnitState, arrays
from sweeps.executors.slurm.site import Site
from sweeps.grid import grid_cells
from sweeps.jobs.graph import study_jobs
from sweeps.study import Study
from varscale.errors import ExperimentError
from varscale.store.curves import read_curve
from varscale.store.layout import Store
from varscale.store.records import StudyRecord

GRID = {
    "grid": {"depths": [2, 3], "budgets": [1.5e9, 3e9, 4.5e9], "min_steps": 5},
    "evaluation": {"samples_per_class": 0},
}
INTERACTIVE_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0"}
INTERACTIVE_SHELL |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n[1-4]"}
"""What it leaves in the environment; a local sweep must neither hang nor change for it."""


@pytest.mark.timeout(900)
def test_events_of_a_cluster_cost_nothing(one_box: OneBox, tmp_path: Path) -> None:
    quiet, runtime = tmp_path / "quiet", {"checkpoint_seconds": 1.0, "compile": "off", "threads": 1}
    runtime |= {"tokenizer_threads": 1, "log_every_steps": 50, "workers": 2}
    write_toy(quiet, **GRID, runtime=runtime)
    undisturbed = subprocess.run(
        command("sweep", "toy.yaml"),
        cwd=quiet,
        env=environment() | INTERACTIVE_SHELL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert undisturbed.returncode in (0, 1), undisturbed.stderr

    folder, study = tmp_path / "slurm", tmp_path / "slurm" / "runs" / "studies" / "toy"
    write_toy(folder, **GRID, runtime=runtime)
    write_site(folder, signal_seconds=55, at_once=2)  # the branches of a size share a job
    sweep = start("sweep", "toy.yaml", *ON_SLURM, cwd=folder)

    def strike(what: str, act: Callable[[str], object]) -> None:
        """Do something to the first running job whose key begins like this and that has done some steps."""
        hit: list[UnitState] = []

        def found() -> bool:
            hit[:] = [state for key, state in running(study).items() if key.startswith(what) and state.done > 0]
            return bool(hit) and bool(one_box.node_of(hit[0].slurm_job))

        wait_for(found, 240, interval=0.2)
        act(hit[0].slurm_job)

    limited: list[str] = []
    strike("trunk", lambda slurm_job: (limited.append(slurm_job), one_box.hold_until_the_time_limit(slurm_job)))
    wait_for(lambda: "SIGUSR2" in stops(study), 90, interval=0.2)
    one_box.run("scontrol", "update", f"JobId={limited[0]}", "TimeLimit=60")
    strike("", lambda slurm_job: one_box.preempt(one_box.node_of(slurm_job)))
    wait_for(
        lambda: any(each["name"] == "urgent" and each["state"] == "RUNNING" for each in one_box.queue()),
        60,
        interval=0.2,
    )
    strike("", lambda slurm_job: one_box.run("scontrol", "requeue", slurm_job))
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    held: list[tuple[str, int]] = []
    strike("", lambda slurm_job: held.append((one_box.node_of(slurm_job), one_box.hold(slurm_job))))
    ((busy, process),) = held
    (killed,) = set(NODES) - {busy}
    one_box.kill_node(killed)
    sweep = start("sweep", "toy.yaml", *ON_SLURM, cwd=folder)
    wait_for(lambda: is_locked(study / ".sweep.lock"), 60, sweep, interval=0.1)
    second = varscale("sweep", "toy.yaml", *ON_SLURM, cwd=folder)
    assert sweep.stdout is not None
    begun = ""
    while "in Slurm's queue already" not in begun:
        line = sweep.stdout.readline()
        assert line, begun
        begun += line
    os.kill(process, signal.SIGCONT)
    strike("d", lambda slurm_job: one_box.run("scancel", slurm_job))
    one_box.revive_node(killed)
    output, _ = sweep.communicate(timeout=500)
    assert "another sweep of this study is running" in second.stderr
    assert "Traceback" not in begun + output

    record = StudyRecord.read(study / "study.json")
    assert record is not None
    assert record.status == "FINISHED", output
    assert sweep.returncode == undisturbed.returncode
    ours, theirs = results(folder / "runs"), results(quiet / "runs")
    assert len(ours) == 6
    assert {name: numbers_of(row) for name, row in ours.items()} == {
        name: numbers_of(row) for name, row in theirs.items()
    }
    curves = {
        path.relative_to(runs): [(point.images, point.metrics["train_loss"]) for point in read_curve(path)]
        for runs in (folder / "runs", quiet / "runs")
        for path in sorted(runs.glob("*/*/metrics.jsonl"))
        if path.parts[-3] in ("trunks", "cells")
    }
    for path, points in curves.items():
        other = [(point.images, point.metrics["train_loss"]) for point in read_curve(quiet / "runs" / path)]
        assert sorted(set(points)) == other, path
    assert delivered(folder) == delivered(quiet)
    assert not one_box.queue()


def stops(study: Path) -> set[str]:
    """Signals that stopped what runs no more."""
    states = [UnitState.read(path) for path in study.glob("slurm/*/state-*.json")]
    return {state.stopped for state in states if state is not None}


def is_locked(path: Path) -> bool:
    try:
        FileLock(path).acquire(timeout=0).lock.release()
    except Timeout:
        return True
    return False


def copy_with_missing_cells(finished: Finished, folder: Path, count: int = 1) -> list[Path]:
    """The finished sweep without laws and without some of its cells."""
    shutil.copytree(finished.runs, folder / "runs", ignore=shutil.ignore_patterns("mlflow*", "laws"))
    write_toy(folder)
    removed = [folder / "runs" / "cells" / name for name in sorted(results(finished.runs))[:count]]
    for path in removed:
        shutil.rmtree(path)
    return removed


def test_detached_the_last_job_fits_the_laws(one_box: OneBox, finished: Finished, tmp_path: Path) -> None:
    removed = copy_with_missing_cells(finished, tmp_path)
    write_site(tmp_path)
    said = varscale("sweep", "toy.yaml", *ON_SLURM, "--detach", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "will fit the laws when they have ended" in said.stdout
    laws, slurm = (tmp_path / "runs" / "studies" / "toy" / name for name in ("laws/laws.json", "slurm"))
    names = {each["name"] for each in one_box.queue()}
    assert "toy laws" in names or laws.exists()  # a quick machine has done it
    assert all(name.startswith("toy ") for name in names)
    again = varscale("sweep", "toy.yaml", *ON_SLURM, "--detach", cwd=tmp_path)  # adopts, and submits nothing twice
    assert again.returncode == 0, again.stderr
    before = delivered(tmp_path)
    wait_for(laws.exists, 240, interval=0.2)
    wait_for(lambda: not one_box.queue(), 120, interval=0.2)
    assert all((path / "result.json").exists() for path in removed)
    assert {name: numbers_of(row) for name, row in results(tmp_path / "runs").items()} == {
        name: numbers_of(row) for name, row in results(finished.runs).items()
    }
    submitted = Counter(
        key
        for path in slurm.glob("*/units.json")
        for unit in json.loads(path.read_text())["units"]
        for key in unit["keys"]
    )
    assert max(submitted.values()) == 1
    fingerprints = {path.name.rpartition("-")[2] for path in removed}
    assert delivered(tmp_path) == before  # compute nodes never open SQLite
    assert varscale("sync", cwd=tmp_path).returncode == 0
    assert fingerprints <= set(delivered(tmp_path))


@pytest.mark.slow
def test_what_slurm_cancels_for_an_urgent_job_is_submitted_again(one_box: OneBox, tmp_path: Path) -> None:
    """Under PreemptMode=CANCEL a requeue does nothing: the job is gone, and the sweep goes on from its checkpoint."""
    runtime = {"checkpoint_seconds": 1.0, "compile": "off", "threads": 1, "tokenizer_threads": 1}
    quiet, folder = tmp_path / "quiet", tmp_path / "slurm"
    for each in (quiet, folder):
        write_toy(each, grid={**GRID["grid"], "depths": [2], "budgets": [1.5e9]}, runtime=runtime)
    undisturbed = varscale("sweep", "toy.yaml", cwd=quiet)
    write_site(folder, signal_seconds=55)
    one_box.run("scontrol", "update", "PartitionName=main", "PreemptMode=CANCEL", "GraceTime=0")
    try:
        sweep = start("sweep", "toy.yaml", *ON_SLURM, cwd=folder)
        study = folder / "runs" / "studies" / "toy"
        hit: list[str] = []

        def found() -> bool:
            hit[:] = [each.slurm_job for key, each in running(study).items() if "trunk" in key and each.done > 0]
            return bool(hit) and bool(one_box.node_of(hit[0]))

        wait_for(found, 240, sweep, interval=0.2)
        one_box.preempt(one_box.node_of(hit[0]))
        output, _ = sweep.communicate(timeout=400)
    finally:
        one_box.run("scontrol", "update", "PartitionName=main", "PreemptMode=REQUEUE", "GraceTime=20")
    assert sweep.returncode == undisturbed.returncode, output
    submitted = Counter(key for _, array in arrays(study / "slurm") for unit in array.units for key in unit.keys)
    assert [count for key, count in submitted.items() if "trunk" in key] == [2], output
    assert [numbers_of(row) for row in results(folder / "runs").values()] == [
        numbers_of(row) for row in results(quiet / "runs").values()
    ]


@pytest.mark.slow
def test_a_grid_that_grows_while_its_jobs_are_queued(one_box: OneBox, finished: Finished, tmp_path: Path) -> None:
    """The trunk that is adopted ends before the new budget's milestone; the rest of it is submitted then."""
    for part in ("tokenizers", "tokens"):
        shutil.copytree(finished.runs / part, tmp_path / "runs" / part)
    write_toy(tmp_path, grid={"depths": [2], "budgets": [2e7]})
    write_site(tmp_path)
    first = start("sweep", "toy.yaml", *ON_SLURM, cwd=tmp_path)
    wait_for(lambda: any("trunk" in each["name"] for each in one_box.queue()), 120, first, interval=0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    write_toy(tmp_path, grid={"depths": [2], "budgets": [2e7, 4e7]})
    grown = varscale("sweep", "toy.yaml", *ON_SLURM, cwd=tmp_path)
    assert "in Slurm's queue already" in grown.stdout, grown.stdout + grown.stderr
    ours, theirs = results(tmp_path / "runs"), results(finished.runs)
    assert len(ours) == 2
    assert {name: numbers_of(row) for name, row in ours.items()} == {name: numbers_of(theirs[name]) for name in ours}


@pytest.mark.slow
def test_members_of_a_file_are_swept_one_after_the_other_and_compared(
    one_box: OneBox, finished: Finished, tmp_path: Path
) -> None:
    removed = copy_with_missing_cells(finished, tmp_path, count=100)
    members = {f"d{depth}": {"grid": {"depths": [depth]}} for depth in (3, 2)}
    (tmp_path / "pair.yaml").write_text(json.dumps({"name": "pair", "extends": "toy.yaml", "members": members}))
    write_site(tmp_path)
    said = varscale("sweep", "pair.yaml", *ON_SLURM, cwd=tmp_path)
    studies = tmp_path / "runs" / "studies"
    assert said.stdout.strip().splitlines()[-1].endswith("report.html"), said.stdout + said.stderr
    assert (studies / "pair" / "laws" / "report.html").exists()
    assert all((path / "result.json").exists() for path in removed)
    assert {name: numbers_of(row) for name, row in results(tmp_path / "runs").items()} == {
        name: numbers_of(row) for name, row in results(finished.runs).items()
    }
    for member in ("pair-d2", "pair-d3"):
        assert any(array.units for _, array in arrays(studies / member / "slurm"))


@pytest.mark.slow
def test_a_run_has_a_task_for_each_device(one_box: OneBox, finished: Finished, tmp_path: Path) -> None:
    """Two of one node for the small size and of two nodes for the other; trunk and branch one after the other."""
    shutil.copytree(finished.runs, tmp_path / "runs", ignore=shutil.ignore_patterns("mlflow*", "laws", "trunks"))
    rows = results(finished.runs)
    shortest = {row["depth"]: name for name, row in sorted(rows.items(), key=lambda item: -item[1]["images_seen"])}
    removed = list(shortest.values())
    for name in removed:
        shutil.rmtree(tmp_path / "runs" / "cells" / name)
    sizes = sorted({row["params_total"] for row in rows.values()})
    by_parameters = {sizes[1]: {"nodes": 2, "sharded": True}}
    write_toy(tmp_path, resources={"devices": 2, "by_parameters": by_parameters})
    write_site(tmp_path, pack_minutes=30, device="a100")  # by whose speed all is short
    said = varscale("sweep", "toy.yaml", *ON_SLURM, cwd=tmp_path)
    assert said.returncode == 0, said.stderr + said.stdout
    assert "trying again" not in said.stdout
    again = results(tmp_path / "runs")
    for name in removed:
        assert again[name]["loss"] == pytest.approx(rows[name]["loss"], rel=1e-4)
        result = json.loads((tmp_path / "runs" / "cells" / name / "result.json").read_text())
        assert result["provenance"]["devices"] == 2
    folder = tmp_path / "runs" / "studies" / "toy" / "slurm"
    units = [unit for path in folder.glob("*/units.json") for unit in json.loads(path.read_text())["units"]]
    assert [len(unit["keys"]) for unit in units] == [2, 2]


def test_a_job_that_can_only_fail_is_tried_and_then_named(
    one_box: OneBox,
    finished: Finished,
    tmp_path: Path,
) -> None:
    copy_with_missing_cells(finished, tmp_path)
    write_site(tmp_path, setup=["exit 3"])
    said = varscale("sweep", "toy.yaml", *ON_SLURM, "--set", "runtime.retries=1", cwd=tmp_path)
    assert said.returncode == 1
    assert said.stdout.count("left the queue before it began") >= 2  # tried again, and failed
    assert "trying again" in said.stdout
    status = varscale("status", "toy.yaml", cwd=tmp_path).stdout
    assert status.count("finished") == 7
    assert "Slurm job" in status


@pytest.mark.parametrize(
    ("settings", "arguments", "expected"),
    [
        ({"partition": "gpus"}, ON_SLURM, "its partitions are main, urgent"),
        ({}, ("--launcher", "slurm", "--site", "sites.yaml:other"), "sites.yaml has no site 'other'; it has onebox"),
        ({}, ("--launcher", "slurm", "--site", "none.yaml"), "no file none.yaml"),
        ({"patition": "main"}, ON_SLURM, "sites.yaml: onebox: patition: unknown key; did you mean partition?"),
        ({"cpus": 0}, ON_SLURM, "sites.yaml: onebox: cpus: input should be greater than or equal to 1, got 0"),
        ({"device": "h300"}, ON_SLURM, "sites.yaml: onebox: device: h300: unknown; expected one of h100"),
        ({"cpus": 64}, ON_SLURM, "Slurm would not take a job"),
        ({"sbatch": {"no-such-option": 1}}, ON_SLURM, "Slurm would not take a job"),
        ({}, ("--site", "sites.yaml"), "--site: only for a cluster; add --launcher slurm"),
        ({}, ("--detach",), "--detach: only for a cluster; add --launcher slurm"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_queued(
    one_box: OneBox,
    tmp_path: Path,
    settings: dict[str, object],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    write_toy(tmp_path)
    write_site(tmp_path, **settings)
    said = varscale("sweep", "toy.yaml", *arguments, cwd=tmp_path)
    assert said.returncode == 1
    (line,) = said.stderr.splitlines()
    assert expected in line
    assert not (tmp_path / "runs").exists()


def test_a_time_limit_that_holds_no_step_is_refused(tmp_path: Path) -> None:
    experiment = toy_experiment()
    study = Study.of(experiment, Store(tmp_path / "runs"), grid_cells(experiment))
    jobs, device = study_jobs(study, study.cells), named_device("h100", 0.3, experiment.runtime)
    SlurmExecutor(tmp_path, Site(hours=0.03), device).check_times(jobs)  # 108 seconds, the last 90 for saving
    with pytest.raises(ExperimentError, match=r"hours: 0.02 is too short for trunk d2-s0"):
        SlurmExecutor(tmp_path, Site(hours=0.02), device).check_times(jobs)


def test_without_slurm_one_line_says_so(tmp_path: Path) -> None:
    write_toy(tmp_path)
    write_site(tmp_path)
    said = subprocess.run(
        command("sweep", "toy.yaml", *ON_SLURM),
        cwd=tmp_path,
        env={**environment(), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 1
    assert said.stderr.splitlines() == [
        "varscale: --launcher slurm: sbatch is not installed here; call it on a login node"
    ]


def test_dry_run_writes_scripts_that_slurm_would_take(one_box: OneBox, finished: Finished, tmp_path: Path) -> None:
    copy_with_missing_cells(finished, tmp_path, 2)
    write_site(
        tmp_path,
        account="abc",
        memory_gb=2,
        setup=["module load cuda"],
        prefix="apptainer exec image.sif",
        device="h100",
    )
    said = varscale("sweep", "toy.yaml", *ON_SLURM, "--dry-run", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "toy on H100 SXM 80 GB" in said.stdout  # the plan is of the site's device
    paths = [Path(line) for line in said.stdout.splitlines() if line.endswith(".sh")]
    (script,) = [(tmp_path / path).read_text() for path in paths]  # two branches of the same size
    for part in ("--array=0-1", "--account=abc", "--mem=2048M", "\nmodule load cuda\n", "apptainer exec image.sif"):
        assert part in script
    assert not one_box.queue()
