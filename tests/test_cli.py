"""The `varscale` command: every verb on a finished little sweep, and one clear line for everything that is wrong."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock
from PIL import Image
from toy_sweep import Finished, environment, numbers_of, results, varscale, write_toy

from varscale import cli
from varscale.models.autoencoder import MultiScaleTokenizer
from varscale.models.storage import load_model, save_model
from varscale.tracking import deliver_all, runs_table

HEAVY = ("torch", "pandas", "scipy", "matplotlib", "mlflow", "lightning")
VERBS = (
    *("sweep", "plan", "status", "train", "train-tokenizer", "tokenize", "sample", "fit-laws", "dashboard"),
    *("import-official", "export-official"),
)
ONE_QUICK_LAW = ("--law", "power", "--target", "loss", "--bootstrap-draws", "50")
NOWHERE = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Result:
    code: int
    output: str
    error: str


Call = Callable[..., Result]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["varscale", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output, error = capsys.readouterr()
        code = ended.value.code
        return (
            Result(code, output, error)
            if isinstance(code, int)
            else Result(1 if code else 0, output, error + str(code))
        )

    return run


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished sweep's runs folder."""
    return Path(shutil.copytree(finished.runs, tmp_path / "runs"))


def modification_times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != "mlflow.json"}


# ------------------------------------------------------------------------------------------------------- the main job


def test_sweep_from_nothing(finished: Finished) -> None:
    *_, laws_json, report_html = finished.process.stdout.splitlines()
    assert laws_json == "runs/toy/laws/laws.json"
    assert report_html == "runs/toy/laws/report.html"
    assert json.loads((finished.folder / laws_json).read_text())["fits"]
    assert "<html" in (finished.folder / report_html).read_text()
    table = pd.read_csv(finished.root / "laws" / "runs.csv")
    assert sorted(table["fingerprint"]) == sorted(row["fingerprint"] for row in results(finished.runs).values())
    assert len(table) == 8
    assert finished.process.stderr == ""
    assert not list(finished.root.glob("*/*/last.ckpt"))
    assert not list(finished.root.glob("*/*/.*"))


def test_mlflow_has_what_the_files_have(finished: Finished) -> None:
    tracked = runs_table(f"sqlite:///{finished.runs / 'mlflow.db'}", "toy").set_index("fingerprint")
    for row in results(finished.runs).values():
        for name in ("loss", "error", "train_flops", "params_total", "depth", "images_seen", "loss_scale_2"):
            assert tracked.loc[row["fingerprint"], name] == row[name]


def test_second_call_trains_nothing(finished: Finished) -> None:
    before, seconds = modification_times(finished.root / "cells"), _child_seconds()
    process = varscale("sweep", finished.yaml, cwd=finished.folder)
    assert process.returncode == 0
    assert process.stdout.splitlines()[-2:] == finished.process.stdout.splitlines()[-2:]
    assert modification_times(finished.root / "cells") == before
    assert "training" not in process.stdout
    assert _child_seconds() - seconds < 20


def test_fewer_cells_than_a_law_needs(call: Call, copy: Path, finished: Finished) -> None:
    """The sweep's results are there all the same, and the message is short."""
    shutil.rmtree(copy / "toy" / "laws")
    result = call("sweep", finished.yaml, "--depths", "3", "--set", "grid.budgets=[2e7, 3e7]")
    assert result.code == 1
    (line,) = result.error.splitlines()
    assert line.startswith("varscale: 2 cells are in runs/toy/laws/runs.csv, but no law could be fitted: ")
    assert len(line) < 400
    table = pd.read_csv(copy / "toy" / "laws" / "runs.csv")
    assert list(table["steps"]) == [5, 8]


def test_training_goes_on_without_mlflow(copy: Path, tmp_path: Path, finished: Finished) -> None:
    """What could not be delivered is delivered later, from the files."""
    shutil.rmtree(copy / "toy" / "cells")
    for path in (*copy.glob("mlflow.db*"), *copy.rglob("*mlflow.json")):
        path.unlink()
    arguments = ("--set", "grid.budgets=[2e7, 4e7]", "--tracking-uri", NOWHERE)
    process = varscale("sweep", finished.yaml, *arguments, cwd=tmp_path)
    assert "Traceback" not in process.stderr + process.stdout
    assert f"not delivered to MLflow at {NOWHERE}" in process.stdout.replace("\n", " ")
    rows = results(copy)
    assert len(rows) == 4
    for name, row in rows.items():
        assert numbers_of(row) == numbers_of(results(finished.runs)[name])
    uri = f"sqlite:///{tmp_path / 'later.db'}"
    assert deliver_all(copy, uri).pending == 0
    tracked = runs_table(uri, "toy").set_index("fingerprint")
    assert {print_: tracked.loc[print_, "loss"] for print_ in tracked.index} == {
        row["fingerprint"]: row["loss"] for row in rows.values()
    }


def test_no_space_on_disk(copy: Path, tmp_path: Path, finished: Finished) -> None:
    """Files may not grow beyond a limit: one clear line a failure, and the next call goes on."""
    for part in ("trunks", "cells", "laws"):
        shutil.rmtree(copy / "toy" / part)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    arguments = (
        "sweep",
        finished.yaml,
        "--depths",
        "2",
        "--set",
        "grid.budgets=[2e7, 4e7]",
        "--set",
        "runtime.retries=0",
    )
    process = varscale(*arguments, cwd=tmp_path, before=limit)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr + process.stdout
    failed = [line for line in process.stdout.splitlines() if line.startswith("failed: depth 2")]
    assert len(failed) == 2
    assert all("File too large" in line or "no space" in line for line in failed), failed
    again = varscale(*arguments, cwd=tmp_path)
    assert "failed" not in again.stdout
    rows = results(copy)
    assert len(rows) == 2
    for name, row in rows.items():
        assert numbers_of(row) == numbers_of(results(finished.runs)[name])


# --------------------------------------------------------------------------------------------------------- other verbs


def test_depths_restrict_variants_too(call: Call, tmp_path: Path) -> None:
    variant = {"name": "twice", "depths": [2, 3], "budgets": [2e7], "settings": {"optim.lr": 1e-2}}
    path = write_toy(tmp_path, grid={"budgets": [2e7, 3e7], "variants": [variant]})
    output = call("plan", path, "--depths", "3").output
    assert output.count("d3-s0") == 3
    assert "d2-s0" not in output


@pytest.mark.parametrize("arguments", [("plan",), ("sweep", "--dry-run")])
def test_plan_writes_nothing(call: Call, tmp_path: Path, finished: Finished, arguments: tuple[str, ...]) -> None:
    result = call(*arguments, finished.yaml, "--depths", "3,4", "--set", "optim.batch_size=2")
    assert result.code == 0
    assert result.output.count("d3-s0") == result.output.count("d4-s0") == 4
    assert "d2-s0" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_plan_knows_the_hours_of_sizes_that_ran(call: Call, finished: Finished) -> None:
    (row,) = [
        line for line in call("plan", finished.yaml, "--runs-dir", finished.runs).output.splitlines() if "196" in line
    ]
    assert 0 < float(row.split()[-1]) < 1


def test_status(call: Call, copy: Path, finished: Finished) -> None:
    cell = next((copy / "toy" / "cells").glob("d2-c2e07-*"))
    shutil.rmtree(cell)
    for path in (copy / "toy" / "trunks").glob("d3-*"):
        shutil.rmtree(path)
    for path in (copy / "toy" / "cells").glob("d3-c4e07-*"):
        shutil.rmtree(path)
    result = call("status", finished.yaml)
    assert result.code == 0
    text = result.output
    assert text.count("finished") == 6
    assert text.count("ready to branch") == 1
    assert text.count("not begun") == 1
    for row in results(copy).values():
        assert f"{row['loss']:.4f}" in text


def test_status_before_anything_ran(call: Call, finished: Finished) -> None:
    assert call("status", finished.yaml).output.count("not begun") == 8


def test_train_equals_the_cell_of_the_grid(call: Call, copy: Path, finished: Finished) -> None:
    """Without trunk and branch, in this process."""
    (cell,) = (copy / "toy" / "cells").glob("d2-c2e07-*")
    shutil.rmtree(cell)
    result = call("train", finished.yaml, "--depth", "2", "--budget", "2e7")
    assert result.code == 0
    assert result.output.splitlines()[-1] == f"runs/toy/cells/{cell.name}/result.json"
    assert numbers_of(results(copy)[cell.name]) == numbers_of(results(finished.runs)[cell.name])


def test_tokenizer_and_tokens_alone(call: Call, finished: Finished, tmp_path: Path) -> None:
    """Equal to those of the sweep."""
    result = call("tokenize", finished.yaml)
    assert result.code == 0
    (folder,) = tmp_path.glob("runs/toy/tokens/*")
    assert result.output.splitlines() == [str(folder.relative_to(tmp_path))]
    theirs = finished.root / "tokens" / folder.name
    shards = [path.relative_to(folder) for path in folder.rglob("*.npy")]
    assert len(shards) == 2
    assert all((folder / shard).read_bytes() == (theirs / shard).read_bytes() for shard in shards)
    again = call("train-tokenizer", finished.yaml)
    (result_file,) = tmp_path.glob("runs/toy/tokenizers/*/result.json")
    assert again.output.splitlines() == [str(result_file.relative_to(tmp_path))]


def test_sample(call: Call, copy: Path) -> None:
    (cell,) = (copy / "toy" / "cells").glob("d2-c6e07-*")
    arguments = ("sample", cell, "--labels", "0,1", "--count", "3", "--top-k", "8", "--top-p", "0.9")
    assert call(*arguments, "--out", "new/a.png", "--seed", "1").output == "new/a.png\n"
    call(*arguments, "--out", "b.png", "--seed", "1")
    call(*arguments, "--out", "c.png", "--seed", "2")
    width, height = Image.open("new/a.png").size  # a row a class
    assert width > height > 2 * 8
    assert Path("new/a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_laws_are_the_same_from_files_mlflow_and_tables(
    call: Call, copy: Path, finished: Finished, tmp_path: Path
) -> None:
    csv = finished.root / "laws" / "runs.csv"
    uri = f"sqlite:///{finished.runs / 'mlflow.db'}"
    columns = ("--params", "params_total", "--flops", "train_flops")
    sources = {
        "files": (finished.yaml,),
        "mlflow": (finished.yaml, "--from-mlflow", "--tracking-uri", uri),
        "table": ("--runs", csv, "--budget-column", "budget_flops", *columns),
    }
    exponents = {}
    for name, arguments in sources.items():
        result = call("fit-laws", *arguments, *ONE_QUICK_LAW, "--x", "flops", "--out", tmp_path / name)
        assert result.code == 0, result
        assert result.output.splitlines()[-2:] == [str(tmp_path / name / file) for file in ("laws.json", "report.html")]
        (fit,) = json.loads((tmp_path / name / "laws.json").read_text())["fits"]
        exponents[name] = fit["parameters"]
    assert exponents["files"] == exponents["mlflow"] == exponents["table"]


def test_laws_are_fitted_again_where_they_are_missing_or_others(call: Call, copy: Path, finished: Finished) -> None:
    laws = copy / "toy" / "laws"
    assert "nothing is new" in call("sweep", finished.yaml).output
    whole = (laws / "runs.csv").read_text()
    for spoil in (lambda: (laws / "report.html").unlink(), lambda: call("fit-laws", finished.yaml, *ONE_QUICK_LAW)):
        spoil()
        result = call("sweep", finished.yaml)
        assert result.code == 0
        assert "nothing is new" not in result.output
        assert (laws / "report.html").exists()
        assert (laws / "runs.csv").read_text() == whole


def test_laws_leave_out_cells_of_another_tokenizer(call: Call, copy: Path, finished: Finished) -> None:
    (source,) = (copy / "toy" / "cells").glob("d2-c2e07-*")
    foreign = Path(shutil.copytree(source, source.with_name("d2-c2e07-s0-foreign")))
    result = json.loads((foreign / "result.json").read_text())
    result["row"] |= {"tokenizer": "another", "fingerprint": "foreign", "run": "foreign"}
    (foreign / "result.json").write_text(json.dumps(result))
    fitted = call("fit-laws", finished.yaml, *ONE_QUICK_LAW)
    assert fitted.code == 0
    assert "left out: 1 cells" in fitted.error
    assert "foreign" not in (copy / "toy" / "laws" / "runs.csv").read_text()


def test_official_checkpoints_there_and_back(call: Call, copy: Path) -> None:
    """The toy's transformer, and a tokenizer that has the reference's fixed settings."""
    tokenizer = Path("tokenizer.safetensors")
    save_model(tokenizer, MultiScaleTokenizer((1, 2, 4), 16, 4, 32, channel_multipliers=(1, 1)), "fingerprint")
    (weights,) = (copy / "toy" / "cells").glob("d3-c6e07-*/weights.safetensors")
    for ours, theirs, back in ((tokenizer, "vae.pth", "vae.safetensors"), (weights, "var.pth", "var.safetensors")):
        assert call("export-official", ours, theirs).output == f"{theirs}\n"
        needed = () if back.startswith("vae") else ("--tokenizer", "vae.safetensors")
        assert call("import-official", theirs, back, "--patch-nums", "1,2,4", *needed).output == f"{back}\n"
        first, second = load_model(ours).state_dict(), load_model(Path(back)).state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------------- help


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom varscale import cli\nsys.argv = ['varscale', '--help']\n"
        f"try:\n    cli.main()\nfinally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):  # of processor time: other processes' work is not counted
        before = _child_seconds()
        process = subprocess.run(
            [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
        )
        seconds.append(_child_seconds() - before)
    assert process.stdout.splitlines()[-1] == "[]"
    for verb in VERBS:
        assert f" {verb} " in process.stdout
    assert min(seconds) < 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(call: Call, verb: str) -> None:
    result = call(verb, "--help")
    assert result.code == 0
    assert f"varscale {verb}" in result.output


# ----------------------------------------------------------------------------------------------------------- bad input

MISTAKES = {
    "unknown key": (
        ["--set", "optim.learning_rate=1"],
        "--set optim.learning_rate=1: optim.learning_rate: unknown key",
    ),
    "misspelt key": (["--set", "grid.dephts=[1]"], "grid.dephts: unknown key; did you mean depths?"),
    "wrong type": (["--set", "optim.lr=fast"], "optim.lr: input should be a valid number, got 'fast'"),
    "no equals sign": (["--set", "optim.lr"], "--set optim.lr: expected section.key=value, such as optim.lr=3e-4"),
    "scales that don't grow": (["--set", "tokenizer.patch_nums=[1,2,2,4]"], "tokenizer.patch_nums: must grow strictly"),
    "scales that end elsewhere": (["--set", "tokenizer.patch_nums=[1,2]"], "tokenizer.patch_nums: ends at 2, but 8 px"),
    "depth 0": (["--depths", "0"], "--depths 0: expected whole numbers from 1 up"),
    "depths in words": (["--depths", "a,b"], "--depths a,b: expected whole numbers from 1 up"),
    "no depths": (["--depths", ""], "--depths : expected whole numbers from 1 up"),
    "a depth twice": (["--depths", "12,12"], "depths: repeated values in [12, 12]"),
    "too small budgets": (
        ["--set", "grid.budgets=[1e6]"],
        "grid.budgets: 2 of the cells have fewer than grid.min_steps = 5",
    ),
    "a branching schedule": (
        ["--set", "optim.schedule=linear"],
        "optim.schedule: a grid branches its cells off trunks",
    ),
    "a branching schedule of a variant": (
        ["--set", "grid.variants=[{name: a, depths: [2], budgets: [2e7], settings: {optim.schedule: linear}}]"],
        "grid.variants: a: optim.schedule: a grid branches its cells off trunks",
    ),
    "two variants of a name": (
        ["--set", "grid.variants=[{name: a, depths: [2], budgets: [2e7]}, {name: a, depths: [3], budgets: [2e7]}]"],
        "variants: repeated names in ['a', 'a']",
    ),
    "two budgets of one run": (["--set", "grid.budgets=[2e7,2.0001e7]"], "are the same run of"),
    "a rate of one": (["--set", "optim.betas=[0.9,1.0]"], "optim.betas.1: input should be less than 1"),
    "text for a number": (
        ["--set", "tokenizer.vocab_size='16'"],
        "tokenizer.vocab_size: input should be a valid integer",
    ),
    "text for a truth": (["--set", "model.shared_adaln='no'"], "model.shared_adaln: input should be a valid boolean"),
    "a radius from large to small": (["--set", "data.radius=[0.3,0.1]"], "data.radius: expected the smallest"),
    "a warm-up beyond the training": (
        ["--set", "tokenizer.training.warmup_images=1000"],
        "tokenizer.training.warmup_images: 1000, but the training has 160 images",
    ),
    "images too small for the discriminator": (
        ["--set", "tokenizer.training.adversarial_weight=1"],
        "the discriminator needs images of at least 24 px, not 8",
    ),
    "every branch dropped": (["--set", "model.drop_path_at_depth_24=1", "--depths", "24"], "it must stay below 1"),
    "no hidden channel": (["--set", "model.mlp_ratio=0.01"], "leaves depth 2 of width 8 no hidden channel"),
    "negative workers": (["--workers", "-1"], "runtime.workers: input should be greater than or equal to 0, got -1"),
    "missing data": (
        ["--set", "data={kind: folder, image_size: 8, num_classes: 2, train_path: gone, validation_path: gone}"],
        "gone",
    ),
    "missing tokenizer": (["--set", "tokenizer.checkpoint=gone.pth"], "gone.pth"),
    "runs folder of no store": (["--runs-dir", "runs?"], "--runs-dir runs?: SQLite can't lie below a folder with ?"),
    "tracking store of no kind": (["--tracking-uri", "mlruns"], "mlruns"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_line(call: Call, tmp_path: Path, finished: Finished, mistake: str) -> None:
    arguments, expected = MISTAKES[mistake]
    result = call("sweep", finished.yaml, *arguments)
    assert result.code != 0
    (line,) = result.error.splitlines()
    assert line.startswith("varscale: ")
    assert expected in line
    assert len(line) < 300
    assert [path for path in tmp_path.rglob("*.*") if path.name != ".sweep.lock"] == []  # nothing of MLflow's either


def test_mistakes_in_a_file_name_the_file(call: Call, tmp_path: Path) -> None:
    path = write_toy(tmp_path, optim={"lrr": 1.0})
    assert call("sweep", path).error.startswith(f"varscale: {path}: optim.lrr: unknown key; did you mean lr?")
    path.write_text("name: [")
    assert call("plan", path).error.startswith(f"varscale: {path}: not a YAML file: ")
    assert call("plan", "gone.yaml").error == "varscale: gone.yaml: no such experiment file"


def test_unknown_experiments_get_the_nearest_name(call: Call) -> None:
    assert call("sweep", "ring").error.startswith("varscale: no experiment 'ring'; did you mean rings?; shipped are ")


def test_folder_that_cannot_be_written(call: Call, tmp_path: Path, finished: Finished) -> None:
    (tmp_path / "file").touch()
    result = call("sweep", finished.yaml, "--runs-dir", "file/runs")
    assert result.code == 1
    assert result.error.splitlines()[-1].startswith("varscale: ")
    assert "file/runs" in result.error
    assert "Traceback" not in result.error


def test_a_second_sweep_of_an_experiment(call: Call, copy: Path, finished: Finished) -> None:
    with FileLock(copy / "toy" / ".sweep.lock"):
        result = call("sweep", finished.yaml)
    assert result.code == 1
    assert result.error == "varscale: runs/toy: another sweep of this experiment is running; wait for it or stop it"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sample", "CELL", "--labels", "x"], "--labels x: expected whole numbers from 0 up"),
        (["sample", "CELL", "--labels", "7"], "7"),
        (["sample", "gone"], "gone: no finished cell"),
        (["train", "YAML", "--depth", "2", "--budget", "1e3"], "fewer than grid.min_steps"),
        (["train", "YAML", "--depth", "2"], "name a --budget in FLOPs"),
        (["train", "YAML", "--depth", "2", "--budget", "inf"], "--budget inf: expected training FLOPs"),
        (["train", "YAML", "--depth", "2", "--budget", "nan"], "--budget nan: expected training FLOPs"),
        (["train", "YAML", "--depth", "2", "--budget", "1", "--set", "optim.schedule=linear"], "less than one step"),
        (["train", "YAML", "--depth", "2", "--budget", "4e7", "--set", "optim.lr=1e30"], "the training loss is"),
        (["train-tokenizer", "YAML", "--set", "tokenizer.training.lr=1e30"], "the training loss is"),
        (["sample", "CELL", "--guidance", "nan"], "cfg nan"),
        (["sample", "CELL", "--out", "."], "--out .: a folder"),
        (["fit-laws", "--runs", "gone.csv"], "gone.csv"),
        (["fit-laws", "YAML", "--runs-dir", "empty"], "no finished cells; run `varscale sweep toy` first"),
        (["fit-laws", "YAML", "--law", "cubic"], "unknown law 'cubic'; the laws are power"),
        (["fit-laws", "YAML", "--from-mlflow", "--tracking-uri", "sqlite:///empty.db"], "holds no finished cell"),
        (["import-official", "YAML", "out.safetensors"], ""),
        (["import-official", "gone.pth", "out.safetensors"], "gone.pth"),
        (["export-official", "YAML", "out.pth"], ""),
        (["dashboard", "--tracking-uri", "nonsense"], "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_other_verbs(
    call: Call, copy: Path, finished: Finished, arguments: list[str], expected: str
) -> None:
    (cell,) = (copy / "toy" / "cells").glob("d2-c6e07-*")
    names = {"CELL": cell, "YAML": finished.yaml}
    result = call(*(names.get(argument, argument) for argument in arguments))
    assert result.code != 0
    (line,) = result.error.splitlines()
    assert line.startswith("varscale: ")
    assert expected in line
    assert len(line) < 500


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit-laws"],
        ["train", "rings"],
        ["train", "rings", "--depth", "0"],
        ["swep", "rings"],
        ["sweep", "rings", "--depth", "2"],
    ],
    ids=" ".join,
)
def test_mistakes_of_usage(call: Call, arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.code == 2
    assert "Usage: varscale" in result.error
    assert "Traceback" not in result.error


def test_dashboard_of_a_dead_server(call: Call, copy: Path) -> None:
    result = call("dashboard", "--tracking-uri", NOWHERE)
    assert result.code == 1
    assert result.output.startswith(f"MLflow at {NOWHERE}: ")
    assert len(result.output.splitlines()) == 1
    assert "Traceback" not in result.output + result.error


def test_packages_of_other_projects_are_noticed(tmp_path: Path) -> None:
    """A folder `sweeps` in the current one would be imported in place of ours."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "__init__.py").touch()
    process = subprocess.run(
        [sys.executable, "-m", "varscale.cli", "--help"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("varscale: its package 'sweeps' is shadowed by ")


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
