"""Hours on a device, against hand computations; and what one calibration measures, for real."""

from pathlib import Path

import pytest
from toy_sweep import toy_experiment

from sweeps import calibration
from sweeps.calibration import MeasuredSpeed, MeasuringTokenizer, MeasuringTrunk
from sweeps.costs import StudyCosts, encoding_work, size_costs, tokenizer_work, training_work
from sweeps.devices import Paces, named_device, this_machine
from sweeps.grid import grid_cells, unfit_sizes
from sweeps.jobs.base import StudyPlace
from sweeps.pace import Pace
from varscale.config import RuntimeConfig
from varscale.config.yaml import changed, load_experiment
from varscale.numerics.machine import Share
from varscale.store.layout import RunKey, Store
from varscale.tokenizer.shape import TokenizerShape


@pytest.mark.parametrize(("precision", "peak"), [("bfloat16", 989.5e12), ("float32", 67e12)])
def test_hours_of_a_named_device(precision: str, peak: float) -> None:
    """Depth 16 of the paper: 3 × the executed forward pass, at 0.4 of the data sheet's dense peak; 3 GPUs."""
    experiment = changed(load_experiment("imagenet256"), {"optim.precision": precision, "grid.depths": [16]}, "a test")
    cells = grid_cells(experiment)
    device = named_device("h100", 0.4, RuntimeConfig(workers=3))
    image = cells[0].trunk.model.executed_training_flops() / (0.4 * peak)
    estimate = device.seconds([training_work(cells[0].trunk, 1000)])
    assert estimate is not None
    assert estimate.seconds == pytest.approx(1000 * image)
    costs = StudyCosts(size_costs(cells), tokenizer_work(experiment), encoding_work(experiment, 10**6), ())
    shape = TokenizerShape(experiment.tokenizer.architecture)
    tokenizer = (25_600_000 * shape.training_flops() + 10**6 * shape.encode_flops()) / (0.4 * 494.5e12)
    (size,) = costs.sizes
    # one size can't use three GPUs: its trunk and its longest branch come one after the other
    longest = (size.trunk_images + cells[-1].decay_images) * image
    assert device.least_seconds(costs) == pytest.approx(tokenizer + longest)
    alone = named_device("h100", 0.4, RuntimeConfig())
    together = size.trunk_images + sum(cell.decay_images for cell in cells)
    assert alone.least_seconds(costs) == pytest.approx(tokenizer + together * image)
    assert "computed, not measured" in device.basis
    assert "0.4" in device.basis


def test_this_machine_is_as_fast_as_it_was_measured() -> None:
    small, _, _, _, large, *_ = grid_cells(toy_experiment())
    models = Pace()
    models.add(small.trunk.flops_per_image, 10, 5.0)
    device = this_machine(RuntimeConfig(workers=2), Paces(models))
    measured = device.estimate(training_work(small.trunk, 8))
    assert measured is not None
    assert (measured.seconds, measured.exact) == (pytest.approx(4.0), True)
    beyond = device.estimate(training_work(large.trunk, 8))
    assert beyond is not None
    ratio = large.trunk.flops_per_image / small.trunk.flops_per_image
    assert (beyond.seconds, beyond.exact) == (pytest.approx(4.0 * ratio), False)
    assert device.seconds(tokenizer_work(toy_experiment())) is None  # nothing is known of it
    assert this_machine(RuntimeConfig(), Paces()).seconds([training_work(small.trunk, 8)]) is None


def test_all_sizes_that_do_not_fit_are_named() -> None:
    settings = {"grid.depths": [16, 40, 48], "grid.budgets": [1e20]}
    trunks = [cell.trunk for cell in grid_cells(changed(load_experiment("imagenet256"), settings, "a test"))]
    device = named_device("4090", 0.3, RuntimeConfig())
    needs = [trunk.step_bytes(1) / 2**30 for trunk in trunks]
    expected = f"depth 40 needs {needs[1]:.1f} GiB, depth 48 needs {needs[2]:.1f} GiB, and a run has 22.4 GiB"
    assert unfit_sizes(trunks, device.memory_bytes) == f"grid.depths: for a step of one image {expected}"
    assert unfit_sizes(trunks, 1e15) == ""


def test_what_a_calibration_measures(tmp_path: Path) -> None:
    """Real steps of a size and of the tokenizer; that they take about as long as in runs shows in a quiet sweep."""
    experiment = toy_experiment()
    cell, *_ = grid_cells(experiment)
    store = Store(tmp_path)
    place = StudyPlace(
        store,
        store.study("toy"),
        store.run(RunKey("tokenizers", "none", "0")),
        store.tokens(RunKey("tokens", "none", "0")),
    )
    size = TokenizerShape(experiment.tokenizer.architecture).training_flops()
    jobs = {
        cell.trunk.flops_per_image: MeasuringTrunk(experiment, place, 0, cell.trunk, False),
        size: MeasuringTokenizer(experiment, place, 1),
    }
    for expected, job in jobs.items():
        job.write()
        job.run(Share(), lambda done, total: None)
        assert job.done()
        speed = MeasuredSpeed.read(job.files.result)
        assert speed is not None
        assert speed.size == expected
        assert 1e-5 < speed.seconds < 10


@pytest.mark.parametrize(("flops", "images"), [(10**6, 64), (10**8, 5), (2 * 10**9, 1), (4 * 10**9, 0)])
def test_a_calibration_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch, flops: int, images: int) -> None:
    """Half a second at a peak of 1e9 FLOPs a second, a single image three; larger sizes are estimated."""
    monkeypatch.setattr("varscale.training.execution.measure_matmul_peak", lambda precision: 1e9)
    assert calibration._images_of_a_step(flops, 64, "float32") == images
