"""An evaluation that was interrupted goes on from what it has measured, and ends in the same bits."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Killed, cell_of_steps, files_of, ignore, kill_at, little_experiment, make_inputs
from torch import Tensor

from varscale.config import Experiment
from varscale.evaluation import agreement, pieces, subjects
from varscale.evaluation.extractors import Extractor
from varscale.evaluation.plan import RINGS_TRAINING, FidelityPlan, Subject
from varscale.evaluation.subjects import Evaluated, evaluate, reference_features
from varscale.families.storage import load_model, save_model
from varscale.store.layout import RunFiles, RunKey, Store
from varscale.store.records import read_result
from varscale.training.runs import Inputs, train_cell

IMAGES, BATCH, KILLED_AT = 200, 16, 80
TIMES = {"wall_seconds", "seconds_an_image"}


class Pixels:
    """Stands for a network: its features are pixels, and tell how many images passed at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batches_a_piece: int = 1) -> None:
        self.images = self.batches = 0
        self._monkeypatch, self._batches_a_piece = monkeypatch, batches_a_piece
        monkeypatch.setattr(subjects, "open_extractor", lambda plan, *_: self.extractor(plan))

    def extractor(self, plan: FidelityPlan) -> Extractor:
        return Extractor(plan.extractor, self)

    def __call__(self, images_b3ss: Tensor) -> tuple[Tensor, Tensor]:
        self.images, self.batches = self.images + len(images_b3ss), self.batches + 1
        self._monkeypatch.setattr(pieces, "SECONDS", inf if self.batches % self._batches_a_piece else 0.0)
        features_bD = images_b3ss.flatten(1).float() / 255 + len(images_b3ss) / 1000
        return features_bD, features_bD[:, :4]


def experiment(**fidelity: Any) -> Experiment:
    settings = {"samples": IMAGES, "reference_images": IMAGES, "bootstrap_draws": 2, "batch_size": BATCH}
    captions = {"validation_images": 40, "captions": {"width": 8}}
    return little_experiment(data=captions, evaluation={"fidelity": {**settings, "candidates": [2], **fidelity}})


def plan_of(settings: Experiment) -> FidelityPlan:
    plan = FidelityPlan.of(settings)
    assert plan is not None
    return plan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, RunFiles]:
    """A tokenizer, and a cell of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    inputs, cell = make_inputs(folder), cell_of_steps(little_experiment(), 2)
    files = files_of(cell, inputs, folder)
    train_cell(cell, None, files, inputs, ignore)
    return inputs, files


@pytest.fixture
def what(made: tuple[Inputs, RunFiles], monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    """The cell, one of two of whose images is kept; and its rings are counted."""
    monkeypatch.setitem(RINGS_TRAINING, "images", 640)
    monkeypatch.setitem(agreement.COUNTER_TRAINING, "images", 640)
    return Evaluated("cell", "a cell", experiment().data, made[0].tokenizer, made[1])


def files_in(folder: Path, name: str = "resumed") -> RunFiles:
    return Store(folder).run(RunKey("evaluations", name, "0123456789abcdef"))


def measured(files: RunFiles) -> dict[str, Any]:
    result = read_result(files)
    assert result is not None
    assert not files.pieces.exists(), "nothing goes on from there any more"
    return {name: value for name, value in {**result.metrics, **result.row}.items() if name not in TIMES}


@pytest.mark.parametrize(("subject", "kept"), [("cell", 80), ("real", 64), ("reconstructed", 64)])
def test_it_goes_on_from_the_last_piece(
    subject: Subject, kept: int, what: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are of two batches. A cell keeps 8 of 16 images, so it was at its tenth batch, others at the fifth."""
    what = replace(what, subject=subject, cell=what.cell if subject == "cell" else None)
    plan, store = plan_of(experiment()), Store(tmp_path)
    Pixels(monkeypatch)
    evaluate(plan, what, files_in(tmp_path, "whole"), store, ignore)
    expected = measured(files_in(tmp_path, "whole"))
    network = Pixels(monkeypatch, batches_a_piece=2)
    with pytest.raises(Killed):
        evaluate(plan, what, files_in(tmp_path), store, kill_at(KILLED_AT))
    assert network.images == KILLED_AT
    network, reported = Pixels(monkeypatch), list[int]()
    evaluate(plan, what, files_in(tmp_path), store, lambda done, total: reported.append(done))
    assert measured(files_in(tmp_path)) == expected
    assert (network.images, reported[0], reported[-1]) == (IMAGES - kept, kept, IMAGES)
    if subject == "cell":
        assert {"class_agreement", "class_probability", "inception_score"} <= expected.keys()


def test_other_weights_and_batches_begin_anew(what: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although their evaluation is the same one: they may differ in rounding."""
    assert what.cell is not None
    store, files, cell = Store(tmp_path), files_in(tmp_path), RunFiles(tmp_path / what.cell.folder.name)
    shutil.copytree(what.cell.folder, cell.folder)
    what = replace(what, cell=cell)
    reference_features(plan_of(experiment()), Pixels(monkeypatch).extractor(plan_of(experiment())), what.data, store)

    def measured_until(killed_at: int, **fidelity: Any) -> int:
        network = Pixels(monkeypatch)
        with pytest.raises(Killed):
            evaluate(plan_of(experiment(**fidelity)), what, files, store, kill_at(killed_at))
        return network.images

    assert measured_until(80) == 80
    assert measured_until(120) == 40
    assert measured_until(120, batch_size=20) == 120
    model = load_model(cell.weights)
    for parameter in model.parameters():
        parameter.data *= 1 + 1e-6
    save_model(cell.weights, model, cell.fingerprint)
    assert measured_until(120, batch_size=20) == 120
    assert measured_until(160, batch_size=20) == 40


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-7] if how == "truncated" else content[:-7] + bytes(7))


@pytest.mark.parametrize("how", ["truncated", "edited"])
def test_of_a_damaged_piece_the_images_are_measured_again(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan, data = plan_of(experiment()), experiment().data
    network, store, files = Pixels(monkeypatch), Store(tmp_path), Store(tmp_path).run(plan.reference_key())
    whole = reference_features(plan, network.extractor(plan), data, Store(tmp_path / "whole"))
    with pytest.raises(Killed):
        reference_features(plan, network.extractor(plan), data, store, kill_at(KILLED_AT))
    damage(files.piece(2 * BATCH), how)
    network = Pixels(monkeypatch, batches_a_piece=2)  # the new pieces end elsewhere
    with pytest.raises(Killed):
        reference_features(plan, network.extractor(plan), data, store, kill_at(7 * BATCH))
    assert f"{files.piece(2 * BATCH)}: damaged" in caplog.text
    assert network.images == 5 * BATCH
    network = Pixels(monkeypatch)
    resumed = reference_features(plan, network.extractor(plan), data, store)
    assert network.images == IMAGES - 6 * BATCH
    assert torch.equal(resumed.features_ND, whole.features_ND)
    assert not files.pieces.exists()


def test_two_at_once_measure_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, network = plan_of(experiment()), Pixels(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(reference_features, plan, network.extractor(plan), experiment().data, Store(tmp_path))
            for _ in range(2)
        ]
    first, second = (call.result().features_ND for call in calls)
    assert torch.equal(first, second)
    assert network.images == len(first) == IMAGES
