"""One clear line for everything that is wrong, and nothing written."""

from pathlib import Path

import pytest
from command_calls import Call
from toy_sweep import Finished, cell_folder, write_toy

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
    "values that are wrong only together": (
        ["--set", "data.image_size=16"],
        "with --set data.image_size=16: tokenizer.patch_nums: ends at 4, but 16 px",
    ),
    "another kind of data": (["--set", "data.kind=cifar10"], "--set data.kind=cifar10: data.path: missing"),
    "depth 0": (["--depths", "0"], "--depths 0: expected whole numbers from 1 up"),
    "depths in words": (["--depths", "a,b"], "--depths a,b: expected whole numbers from 1 up"),
    "no depths": (["--depths", ""], "--depths: an empty value follows"),
    "a depth twice": (["--depths", "12,12"], "--depths 12,12: grid.depths: repeated values in [12, 12]"),
    "a depth beyond sense": (["--depths", "1000000000"], "varscale: --depths 1000000000: grid.depths.0: input should"),
    "a depth of too many digits": (["--depths", "9" * 5000], "expected whole numbers from 1 up, such as 1,2,3"),
    "workers without end": (["--workers", "500000000000"], "varscale: --workers 500000000000: runtime.workers: input"),
    "workers beyond the memory": (["--workers", "4096"], "runtime.workers (--workers): 4096 processes take at least"),
    "threads beyond the machine": (["--set", "runtime.threads=4096"], "runtime.threads: 4096, but this machine has"),
    "a tokenizer of years": (["--set", "tokenizer.training.images=1e12"], "tokenizer.training.images: this takes at"),
    "a tokenizer beyond the memory": (["--set", "tokenizer.base_channels=16384"], "tokenizer.training.micro_batch:"),
    "too many cells": (
        ["--set", f"grid.seeds={[*range(1000)]}", "--set", f"grid.budgets={[1e8 + n for n in range(1000)]}"],
        "grid.budgets: 2000000 cells, with all depths, seeds and variants; at most 100000",
    ),
    "a path that can't be": (["--set", 'tokenizer.checkpoint="a\\0b"'], "tokenizer.checkpoint: string should match"),
    "a user who isn't": (
        ["--set", "data={kind: folder, image_size: 8, num_classes: 2, train_path: ~no, validation_path: ~no}"],
        "~no: the home directory ~no is not known",
    ),
    "too small budgets": (
        ["--set", "grid.budgets=[1e6]"],
        "grid.budgets: 2 of the cells have fewer than grid.min_steps = 5",
    ),
    "a branching schedule": (
        ["--set", "optim.schedule=linear"],
        "optim.schedule: a grid's cells leave the trunk of their size",
    ),
    "a branching schedule of a variant": (
        ["--set", "grid.variants=[{name: a, depths: [2], budgets: [2e7], settings: {optim.schedule: linear}}]"],
        "grid.variants: a: optim.schedule: a grid's cells leave the trunk of their size",
    ),
    "a cosine without a warm-up": (
        ["--set", "optim.schedule=cosine", "--set", "optim.warmup_fraction=0"],
        "optim.warmup_fraction: the warm-up takes 0 of the",
    ),
    "two variants of a name": (
        ["--set", "grid.variants=[{name: a, depths: [2], budgets: [2e7]}, {name: a, depths: [3], budgets: [2e7]}]"],
        "grid.variants: repeated values in ['a', 'a']",
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
    "a decay of no step": (
        ["--set", "optim.decay_fraction=0.01"],
        "optim.decay_fraction: 0.01 of the 16 steps of",
    ),
    "a section in a depth's recipe": (
        ["--set", "by_depth.2.optim.lr=1"],
        "by_depth.2: optim: only fields of model and optim can be changed here, such as optim.lr",
    ),
    "a width beyond sense": (["--set", "model.width_per_depth=99999999999"], "width_per_depth: input should be less"),
    "shards of no whole batches": (
        ["--set", "tokenizer.encode_batch_size=100"],
        "encode_batch_size: 100 does",
    ),
    "negative workers": (["--workers", "-1"], "--workers -1: expected 1 or more"),
    "missing data": (
        ["--set", "data={kind: folder, image_size: 8, num_classes: 2, train_path: gone, validation_path: gone}"],
        "gone",
    ),
    "missing tokenizer": (["--set", "tokenizer.checkpoint=gone.pth"], "gone.pth"),
    "runs folder of no store": (["--runs-dir", "runs?"], "--runs-dir runs?: SQLite can't lie below a folder with ?"),
    "runs folder with an escape": (["--runs-dir", "a%20b"], "--runs-dir a%20b: SQLite can't lie below a folder with ?"),
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "b200"], "--device b200: unknown; expected h100, h200, a100, 4090 or this"),
        (["--device", "h100", "--utilisation", "0"], "--utilisation 0: expected a share of the peak above 0 and up to"),
        (["--device", "h100", "--utilisation", "1.1"], "--utilisation 1.1: expected a share"),
        (["--device", "h100", "--utilisation", "nan"], "--utilisation nan: expected a share"),
        (["--utilisation", "0.3"], "--utilisation: this machine's speed is measured; name a --device"),
        (["--device", "a100", "--calibrate"], "--calibrate measures this machine, not a100"),
        (["--workers", "0"], "--workers 0: expected 1 or more"),
    ],
)
def test_mistakes_of_plans(call: Call, tmp_path: Path, finished: Finished, arguments: list[str], expected: str) -> None:
    result = call("plan", finished.yaml, *arguments)
    assert result.code != 0
    (line,) = result.error.splitlines()
    assert line.startswith(f"varscale: {expected}")
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["sample", "CELL", "--labels", "x"],
            "--labels x: no such class; expected none (no class), or classes: labels must lie in 0 … 1",
        ),
        (["sample", "CELL", "--labels", "7"], "7"),
        (["sample", "gone"], "gone: no finished cell"),
        (["train", "YAML", "--depth", "2", "--budget", "1e3"], "fewer than grid.min_steps"),
        (["train", "YAML", "--depth", "2"], "name a --budget in FLOPs"),
        (["train", "YAML", "--depth", "2", "--budget", "1"], "--budget: 1 of the cells have fewer than grid.min_steps"),
        (["train", "YAML", "--depth", "2", "--budget", "inf"], "--budget inf: expected training FLOPs"),
        (["train", "YAML", "--depth", "2", "--budget", "nan"], "--budget nan: expected training FLOPs"),
        (["train", "YAML", "--depth", "2", "--budget", "1", "--set", "optim.schedule=linear"], "less than one step"),
        (["train", "YAML", "--depth", "2", "--budget", "4e7", "--set", "optim.lr=1e30"], "the training loss is"),
        (["train-tokenizer", "YAML", "--set", "tokenizer.training.lr=1e30"], "the training loss is"),
        (["sample", "CELL", "--guidance", "nan"], "guidance (cfg) must be finite"),
        (["sample", "CELL", "--out", "."], "--out .: a folder"),
        (["sample", "CELL", "--guidance", "-1"], "guidance (cfg) must be finite and at least 0, not -1.0"),
        (["sample", "CELL", "--temperature", "0"], "temperature must be finite and above 0, not 0.0"),
        (["sample", "CELL", "--count", "0"], "--count 0: expected at least 1"),
        (["sample", "CELL", "--count", "999999999999"], "--count 999999999999: expected at least 1 and at most"),
        (["sample", "CELL", "--count", "99999"], "--count 99999: one picture holds 10000 images; name a folder"),
        (["sample", "CELL", "--out", "YAML/a.png"], "toy.yaml/a.png: can't be written (Not a directory)"),
        (["sample", "CELL", "--out", "/proc/a.png"], "--out /proc/a.png: can't be written"),
        (["sample", "CELL", "--out", "/proc/many.npz", "--count", "9"], "--out /proc/many.npz: can't be written"),
        (["sample", "CELL", "--guidance", "1e300"], "guidance (cfg) must be finite"),
        (["train", "YAML", "--depth", "2", "--budget", "1e300"], "--budget 1e+300: expected training FLOPs"),
        (["train", "YAML", "--depth", "2", "--budget", "1e29"], "grid.budgets: this takes at least"),
        (["tokenize", "YAML", "--set", "tokenizer.training.images=1e12"], "tokenizer.training.images: this takes"),
        (["import-official", "gone.pth", "/proc/a.safetensors"], "/proc/a.safetensors: can't be written"),
        (["export-official", "WEIGHTS", "YAML/a.pth"], "toy.yaml/a.pth: can't be written"),
        (["import-official", "gone.pth", "a.safetensors", "--patch-nums", "2,1"], "--patch-nums 2,1: expected sides"),
        (["run-job", "YAML"], "no job that can be read (its content does not match its checksum); a run's"),
        (["sample", "CELL", "--out", "many.npz"], "--out many.npz: say by --count how many images to draw"),
        (["sample", "CELL", "--out", "many", "--count", "9", "--labels", "0,7"], "labels must lie in 0 … 1"),
        (["sample", "CELL", "--labels", "as-training"], "--labels as-training: for many images; name a folder"),
        (["sync", "--runs-dir", "nowhere"], "--runs-dir nowhere: no such folder, so there is nothing to deliver"),
        (["sample", "CELL", "--out", "many", "--count", "9", "--labels", "balancd"], "expected balanced, as-training,"),
        (["sample", "CELL", "--out", "YAML", "--count", "9"], "expected a name that ends in .png, .npz or .parquet"),
        (["sample", "CELL", "--out", "WEIGHTS/many", "--count", "9"], "weights.safetensors"),
        (["sample", "CELL", "--tokenizer", "WEIGHTS"], "--tokenizer: only for a model's .safetensors file"),
        (["sample", "WEIGHTS"], "weights.safetensors: name its tokenizer's file by --tokenizer"),
        (["sample", "WEIGHTS", "--tokenizer", "WEIGHTS"], "weights.safetensors: holds a model, expected a tokenizer"),
        (["sample", "gone.safetensors", "--tokenizer", "WEIGHTS"], "gone.safetensors: no such file"),
        (["fit-laws", "--runs", "gone.csv"], "gone.csv"),
        (["fit-laws", "YAML", "--out", ""], "--out: an empty value follows; is a variable of the shell unset?"),
        (["fit-laws", "YAML", "--out="], "--out: an empty value follows"),
        (["fit-laws", "YAML", "--runs-dir", " "], "--runs-dir: an empty value follows"),
        (["sample", ""], "sample: an empty value follows"),
        (["fit-laws", "YAML", "--runs-dir", "empty"], "no finished cells; run `varscale sweep toy` first"),
        (["fit-laws", "YAML", "--law", "cubic"], "unknown law 'cubic'; the laws are power"),
        (["fit-laws", "YAML", "--from-mlflow", "--tracking-uri", "sqlite:///empty.db"], "holds no finished cell"),
        (
            ["fit-laws", "YAML", "--from-mlflow", "--tracking-uri", "http://127.0.0.1:9"],
            "MLflow at http://127.0.0.1:9",
        ),
        (["import-official", "YAML", "out.safetensors"], "not a checkpoint of FoundationVision/VAR"),
        (["import-official", "gone.pth", "out.safetensors"], "gone.pth"),
        (["import-official", "CELL", "out.pth"], "out.pth: expected a name that ends in .safetensors"),
        (["export-official", "YAML", "out.pth"], "not a readable .safetensors file"),
        (["export-official", "gone.safetensors", "gone.safetensors"], "expected a name that ends in .pth"),
        (["export-official", "gone.safetensors", "."], ".: a folder; name the .pth file to write"),
        (["export-official", "gone.safetensors", "out.pth"], "gone.safetensors: no such file"),
        (["sample", "CELL", "--out", "samples.jpg"], "--out samples.jpg: expected a name that ends in .png"),
        (["dashboard", "--tracking-uri", "nonsense"], "nonsense"),
        (["dashboard", "--runs-dir", "gone"], "--runs-dir gone: no such folder, so there is nothing to show"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_other_verbs(
    call: Call, copy: Path, finished: Finished, arguments: list[str], expected: str
) -> None:
    cell = cell_folder(copy, 2, 6e7)
    weights = cell / "weights.safetensors"
    places = {"CELL": cell, "YAML": finished.yaml, "WEIGHTS": weights}
    names = places | {
        f"{name}/{file}": path / file for name, path in places.items() for file in ("many", "a.png", "a.pth")
    }
    result = call(*(names.get(argument, argument) for argument in arguments))
    assert result.code != 0
    (line,) = result.error.splitlines()
    assert line.startswith("varscale: ")
    assert expected in line
    assert len(line) < 500


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit-laws"], "fit-laws: give an EXPERIMENT or --runs FILE, one of them"),
        (["train", "rings"], "train: missing option '--depth'"),
        (["train", "rings", "--depth", "0"], "train: --depth 0: input should be greater than or equal to 1"),
        (
            ["train", "rings", "--depth", "1000000000"],
            "train: --depth 1000000000: input should be less than or equal to 1024",
        ),
        (["swep", "rings"], "no such command 'swep'; did you mean 'sweep'?; see `varscale --help`"),
        (["sweep", "rings", "--depth", "2"], "sweep: no such option: --depth (Possible options: --depths"),
        (["sweep", "rings", "--depths"], "sweep: option '--depths' requires an argument; see `varscale sweep --help`"),
        (["sweep"], "sweep: missing argument 'EXPERIMENT'"),
        (["sweep", "rings", "cifar10"], "unexpected extra argument(s) (cifar10)"),
        (["sweep", "rings", "--workers", "two"], "sweep: --workers two: input should be a valid integer"),
        (["sweep", "rings", "--launcher", "slrum"], "'slrum' is not one of 'local', 'slurm'"),
        (["evaluate", "rings", "--samples", "abc"], "evaluate: --samples abc: input should be a valid integer"),
        (["evaluate", "rings", "--cells", "some"], "'some' is not one of 'all', 'best'"),
        (["plan", "rings", "--utilisation", "half"], "plan: --utilisation half: input should be a valid number"),
        (["sample", "CELL", "--seed", "-1"], "sample: --seed -1: input should be greater than or equal to 0"),
        (
            ["sample", "CELL", "--batch", "1000000000000"],
            "sample: --batch 1000000000000: input should be less than or equal to 65536",
        ),
        (
            ["fit-laws", "rings", "--bootstrap-draws", "1e12"],
            "fit-laws: --bootstrap-draws 1e12: input should be a valid integer",
        ),
        (["dashboard", "--port", "http"], "dashboard: --port http: input should be a valid integer"),
        (["dashboard", "--port", "5" * 5000], "dashboard: --port 5555"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_mistakes_of_usage(call: Call, tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = call(*arguments)
    assert result.code == 2
    (line,) = result.error.splitlines()
    assert line.startswith("varscale: ")
    assert expected in line
    assert line.endswith(" --help`")
    assert len(line) < 400
    assert not list(tmp_path.iterdir())


def test_without_a_verb_the_verbs_are_listed(call: Call) -> None:
    result = call()
    assert result.code == 0
    assert " sweep " in result.output
