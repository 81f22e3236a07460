"""Whether compiling pays, with costs made up; what one machine has; and what is measured, for real."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import tokenizer_for
from tiny_training import little_experiment
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sweeps.grid import unfit_sizes
from varscale.config import RuntimeConfig
from varscale.config.yaml import changed
from varscale.errors import ExperimentError
from varscale.numerics.machine import MachineShares, Share, device_name, machine_bytes, processors
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.training import execution as execution_module
from varscale.training.cells import Execution, Trunk, provenance
from varscale.training.execution import ExecutionRecord, check_memory, decide_execution, measure_matmul_peak

Cost = Callable[[Trunk, int, MultiScaleTokenizer, bool], tuple[float, float]]


def trunks(**optim: Any) -> list[tuple[Trunk, int]]:
    """Three sizes, each with its images."""
    experiment = little_experiment(optim=optim)
    return [(Trunk(experiment, depth, 0, 1e12), 8 * 1000 * depth) for depth in (4, 2, 3)]


def decide(monkeypatch: pytest.MonkeyPatch, cost: Cost, **runtime: Any) -> ExecutionRecord:
    monkeypatch.setattr(execution_module, "_step_cost", cost)
    monkeypatch.setattr(execution_module, "measure_matmul_peak", lambda precision: 5e9)
    sizes = trunks()
    return decide_execution(sizes, RuntimeConfig(**runtime), Share(), tokenizer_for(sizes[0][0].model))


def per_flop(trunk: Trunk) -> float:
    """A step of 8 images that takes a second for 1e9 FLOPs."""
    return trunk.flops_per_image * 8 / 1e9


@pytest.mark.parametrize(
    ("factor", "start", "expected"),
    [
        (0.5, 0.0, True),
        (2.0, 0.0, False),
        (0.5, 1e9, False),  # twice as fast, but compiling takes longer than the study
    ],
)
def test_the_fewest_seconds_win(monkeypatch: pytest.MonkeyPatch, factor: float, start: float, expected: bool) -> None:
    def cost(trunk: Trunk, images: int, _: MultiScaleTokenizer, compiled: bool) -> tuple[float, float]:
        assert (trunk.depth, images) == (4, 8)  # the largest
        return (factor if compiled else 1) * per_flop(trunk), start if compiled else 0.0

    record = decide(monkeypatch, cost)
    total = sum(trunk.flops_per_image * images for trunk, images in trunks())
    assert record.compiled == expected
    assert record.estimated_seconds["eager"] == pytest.approx(total / 1e9)
    assert record.estimated_seconds["compiled"] == pytest.approx(factor * total / 1e9 + 3 * start)  # once a size
    assert (record.device, record.peak_flops) == (device_name(), 5e9)


@pytest.mark.parametrize("said", ["on", "off"])
def test_what_is_said_is_not_measured(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def cost(*_: Any) -> tuple[float, float]:
        raise AssertionError("nothing was left to choose")

    record = decide(monkeypatch, cost, compile=said)
    assert (record.compiled, record.estimated_seconds) == (said == "on", {})


def test_a_decision_holds_on_its_machine_and_as_the_settings_allow() -> None:
    record = ExecutionRecord(device=device_name(), compiled=True, peak_flops=1e9)
    for compiled in (True, False):
        record = record.model_copy(update={"compiled": compiled})
        allowed = [record.allowed(RuntimeConfig(compile=said)) for said in ("auto", "on", "off")]
        assert allowed == [True, compiled, not compiled]
    assert not record.model_copy(update={"device": "another"}).allowed(RuntimeConfig())
    execution = record.execution(Share(threads=3))
    assert (execution.compiled, execution.threads, execution.peak_flops) == (False, 3, 1e9)
    assert execution.memory_bytes == Share(threads=3).memory_bytes()


def test_as_many_images_pass_at_once_as_the_memory_holds() -> None:
    """Of each size for itself, in parts of about one size; its weights and moments have to fit too."""
    smallest, _, largest = sorted((trunk for trunk, _ in trunks()), key=lambda trunk: trunk.flops_per_image)
    state, image = largest.model.training_state_bytes(), largest.model.activation_bytes(1)
    assert largest.batch_size == 8
    for images, expected in ((8.5, 8), (7.5, 4), (3.5, 3), (1.5, 1)):
        memory = (state + images * image) / 0.6
        assert unfit_sizes([largest], memory) == ""
        assert largest.images_at_once(memory) == expected
        assert provenance(Execution(memory_bytes=memory), largest)["images_at_once"] == expected
    assert smallest.images_at_once(memory) == 8
    assert largest.images_at_once(Execution().memory_bytes) == 8
    too_little = (state + 0.5 * image) / 0.6
    brave = Trunk(changed(largest.experiment, {"runtime.micro_batch": 2}, "a test"), 4, 0, 1e12)
    assert unfit_sizes([brave], 1) == ""
    assert brave.images_at_once(too_little) == 2
    assert unfit_sizes([largest], too_little).startswith("grid.depths: for a step of one image depth 4 needs 0.0 GiB")


def test_numbers_of_half_the_size_leave_room_for_more_images() -> None:
    exact, half = (trunks(precision=precision)[0][0] for precision in ("float32", "bfloat16"))
    assert (exact.element_bytes, half.element_bytes) == (4, 2)
    model = exact.model
    memory = (model.training_state_bytes() + 4.2 * model.activation_bytes(1)) / 0.6
    assert exact.images_at_once(memory) <= half.images_at_once(memory)


def test_the_machine_is_divided_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varscale.numerics.machine.processors", lambda: 12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    by_default = MachineShares.of(RuntimeConfig())
    assert (by_default.workers, by_default.gpus, by_default.worker.threads, by_default.whole.threads) == (12, 0, 1, 12)
    three = MachineShares.of(RuntimeConfig(workers=3, tokenizer_threads=5))
    assert (three.worker.threads, three.whole.threads) == (4, 5)
    assert three.worker.memory_bytes() == pytest.approx(machine_bytes() / 3)
    assert MachineShares.of(RuntimeConfig(workers=24)).worker.threads == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_gpus = MachineShares.of(RuntimeConfig())
    assert (on_gpus.workers, on_gpus.gpus, on_gpus.worker.workers_a_device) == (2, 2, 1)
    assert MachineShares.of(RuntimeConfig(workers=5)).worker.workers_a_device == 3


def test_workers_on_one_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert [Share(4, workers).memory_bytes() for workers in (1, 2)] == [2**30, 2**29]


def test_processors_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5}, raising=False)
    assert processors() == 2


def test_a_run_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one whose estimate is a little high."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(execution_module, "machine_bytes", lambda: 2.0**31)
    check_memory(2.6 * 2**30, "runtime.micro_batch")
    with pytest.raises(
        ExperimentError, match=r"runtime\.micro_batch: a step needs about 2\.8 GiB, and there are 2\.0 G"
    ):
        check_memory(2.8 * 2**30, "runtime.micro_batch")


def test_what_is_measured_is_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of all images that pass at once, each time that the clock runs."""
    trunk, _ = trunks()[0]
    timed: list[int] = []
    timings = execution_module.timings

    def count(work: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        timed.append(counter.get_total_flops())
        return timings(work, repeats, warmup)

    monkeypatch.setattr(execution_module, "timings", count)
    tokenizer = tokenizer_for(trunk.model)
    with FlopCounterMode(display=False) as counter:  # the inputs of all scales but the first
        tokenizer.next_scale_inputs([torch.zeros(8, tokens, dtype=torch.int64) for tokens in trunk.model.groups])
    seconds, start = execution_module._step_cost(trunk, trunk.batch_size, tokenizer, False)
    assert seconds > 0
    assert start >= 0
    step = trunk.batch_size * trunk.flops_per_image
    training = [flops - counter.get_total_flops() for flops in timed]
    assert all(0.9 * step < flops <= step for flops in training)  # the first products need no gradient of their inputs
    assert len(timed) == 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_peak(precision: str) -> None:
    assert measure_matmul_peak(precision) > 1e8
