"""A sweep with a tokenizer that says nothing about its images: it stops before any cell, unless it is told to go on."""

from pathlib import Path

import pytest
import torch
from sweep_here import Sweeping
from toy_sweep import toy_experiment

from sweeps.grid import grid_cells
from sweeps.jobs.preparation import TokenizerJob
from sweeps.study import Study
from varscale.errors import SweepError, TokenizerRejected
from varscale.store.layout import RunFiles, Store
from varscale.store.records import Result, StudyRecord
from varscale.tokenizer import training as tokenizer_training
from varscale.tokenizer.storage import load_tokenizer, save_tokenizer

ONE_CELL = {"grid": {"depths": [2], "budgets": [2e7]}}
LINE = r"^\S+/tokenizers/\S+: no model should be trained on this tokenizer: reconstructions are no better than "


def tokenizer_files(runs: Path) -> RunFiles:
    experiment = toy_experiment(**ONE_CELL)
    return Study.of(experiment, Store(runs), grid_cells(experiment)).tokenizer


def collapse(files: RunFiles) -> None:
    """A finished tokenizer whose decoder gives grey whatever it is given; it is still to be measured."""
    tokenizer = load_tokenizer(files.weights, files.fingerprint)
    with torch.no_grad():
        for parameter in tokenizer.decoder.output.parameters():
            parameter.zero_()
    save_tokenizer(files.weights, tokenizer, files.fingerprint)
    files.result.unlink()


@pytest.fixture
def collapsed(sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch) -> Sweeping:
    """A runs folder with such a tokenizer and no tokens; training another one fails the test."""
    files = tokenizer_files(sweeping.runs)
    collapse(files)
    monkeypatch.setattr(tokenizer_training, "_train", lambda *_: pytest.fail("trained again"))
    return sweeping


def test_it_stops_before_any_cell(collapsed: Sweeping) -> None:
    rejected = toy_experiment(**ONE_CELL, tokenizer={"accept": False})
    for call in range(2):
        with pytest.raises(TokenizerRejected, match=LINE) as caught:
            collapsed(rejected)
        message = str(caught.value)
        assert "\n" not in message
        assert "tokenizer.training.lr (now 0.005)" in message
        assert message.endswith("tokenizer.accept: true goes on regardless")
        assert "no model should be trained" not in collapsed.output, "the command prints it, once"
        assert [type(job) for job in collapsed.executor.jobs] == ([] if call else [TokenizerJob])
    assert not list(collapsed.runs.glob("cells/*"))
    result = Result.read(tokenizer_files(collapsed.runs).result)
    assert result is not None
    assert result.metrics["mean_squared_error"] >= result.metrics["mean_picture_error"] > 0
    assert result.metrics["faults"] >= 1


def test_accepted_it_goes_on_and_every_table_says_so(collapsed: Sweeping) -> None:
    with pytest.raises(TokenizerRejected):
        collapsed(toy_experiment(**ONE_CELL, tokenizer={"accept": False}))
    outcome = collapsed(toy_experiment(**ONE_CELL, tokenizer={"accept": True}))
    assert not collapsed.executor.of(TokenizerJob)
    (row,) = outcome.rows
    assert row["tokenizer_faults"].startswith("reconstructions are no better than one mean picture")
    assert f"the tokenizer was accepted although {row['tokenizer_faults'][:40]}" in collapsed.output
    # further cells are not trained once it is no longer accepted, although tokens are there
    more = {"grid": {"depths": [2], "budgets": [2e7, 3e7]}, "tokenizer": {"accept": False}}
    with pytest.raises(SweepError, match=LINE):
        collapsed(toy_experiment(**more))
    assert collapsed.executor.jobs == []
    study = Study.of(toy_experiment(**more), Store(collapsed.runs), grid_cells(toy_experiment(**more)))
    assert len(study.missing) == 1
    assert StudyRecord.read(study.files.record).status == "KILLED"


def test_accepted_at_once_it_is_printed(collapsed: Sweeping) -> None:
    collapsed(toy_experiment(**ONE_CELL, tokenizer={"accept": True}))
    assert [type(job) for job in collapsed.executor.jobs[:1]] == [TokenizerJob]
    printed = " ".join(collapsed.output.split())
    assert "tokenizer: PSNR " in printed
    assert "accepted although reconstructions are no better than one mean picture (mean squared error " in printed


def test_a_tokenizer_measured_by_an_earlier_version_is_measured_again(collapsed: Sweeping) -> None:
    files = tokenizer_files(collapsed.runs)
    old = {"psnr": 20.0, "codebook_usage": 1.0}
    Result(fingerprint=files.fingerprint, status="finished", time=0.0, metrics=old).write(files.result)
    with pytest.raises(TokenizerRejected):
        collapsed(toy_experiment(**ONE_CELL, tokenizer={"accept": False}))
