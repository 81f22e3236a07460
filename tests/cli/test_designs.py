"""The verbs init and design-tokenizer, through the command; the machine's speed is made up."""

import json
from pathlib import Path

import pytest
from command_calls import Call
from made_up_machine import PEAK, speeds, write_pictures
from toy_sweep import varscale

from varscale.config.text import read_yaml
from varscale.config.tokenizer import TokenizerConfig
from varscale.config.yaml import load_experiment


@pytest.fixture(autouse=True)
def _made_up_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.calibration.calibrate", speeds)
    monkeypatch.setattr("varscale.training.execution.measure_matmul_peak", lambda _: PEAK)


def test_init_writes_what_a_sweep_takes(call: Call, tmp_path: Path) -> None:
    write_pictures(tmp_path / "my pictures" / "train", 40)
    write_pictures(tmp_path / "my pictures" / "val" / "of another class", 3)
    result = call("init", "my pictures", "--hours", "0.2")
    assert result.code == 0, result.error
    *_, summary, written = result.output.splitlines()
    assert (written, "40 images in 1 class" in result.output) == ("my-pictures.yaml", True)
    assert "sizes at 6 budgets" in summary
    assert "not used: data.validation_path: my pictures/val" in result.output
    experiment = load_experiment("my-pictures.yaml")
    assert (experiment.name, experiment.data.validation_images) == ("my-pictures", 8)
    plan = call("plan", "my-pictures.yaml")
    assert plan.code == 0, plan.error
    again = call("init", "my pictures")
    assert (again.code, "my-pictures.yaml: is there already" in again.error) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nowhere",), "nowhere: no such file or folder"),
        (("empty",), "no images and no Parquet files"),
        (("three",), "3 pictures; a study needs 20"),
        (("broken.parquet",), "not a readable Parquet file"),
        (("three", "--hours", "0"), "--hours 0"),
        (("three", "--out", "mine.txt"), "ends in .yaml"),
    ],
)
def test_what_init_refuses(arguments: tuple[str, ...], reason: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    write_pictures(tmp_path / "three", 3)
    result = call("init", *arguments)
    assert (result.code, reason in result.error, result.error.count("\n")) == (1, True, 0)
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.slow
def test_a_law_of_forty_pictures(call: Call, tmp_path: Path) -> None:
    """As drafted for a machine of half this one's speed or less, so that it is over soon."""
    write_pictures(tmp_path / "forty", 40, side=20)
    result = call("init", "forty", "--hours", "0.04")
    assert result.code == 0, result.error
    process = varscale("sweep", "forty.yaml", cwd=tmp_path, timeout=3000)
    assert process.returncode == 0, process.stdout + process.stderr
    laws = json.loads((tmp_path / "runs" / "studies" / "forty" / "laws" / "laws.json").read_text())
    assert laws["fits"]
    assert "tokenizer: PSNR" in process.stdout


def test_design_tokenizer(call: Call, tmp_path: Path) -> None:
    result = call("design-tokenizer", "--image-size", "256", "--tokens", "680", "--out", "section.yaml")
    assert result.code == 0, result.error
    proposed = next(line for line in result.output.splitlines() if "► 1 2 3 4 5 6 8 10 13 16" in line)
    assert " 10% " in proposed  # the share of attention that is known of the paper's 16 blocks
    section = TokenizerConfig(**read_yaml((tmp_path / "section.yaml").read_text())["tokenizer"])
    assert section.architecture == load_experiment("imagenet256").tokenizer.architecture
    again = call("design-tokenizer", "--image-size", "32", "--out", "section.yaml")
    assert (again.code, "section.yaml: is there already" in again.error) == (1, True)


def test_design_tokenizer_of_a_size_that_can_not_be_halved(call: Call) -> None:
    result = call("design-tokenizer", "--image-size", "30")
    assert (result.code, "multiple of 4" in result.error, result.error.count("\n")) == (1, True, 0)


def test_models_deeper_than_stochastic_depth_allows_are_counted(call: Call) -> None:
    assert call("design-tokenizer", "--image-size", "24", "--depth", "1024").code == 0
