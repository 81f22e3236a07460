"""How precision and compilation are chosen, with costs made up; and what is measured, for real."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from requirements import require_program
from tiny_training import NUMERICS, little_experiment
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from varscale.config import RuntimeConfig
from varscale.config.yaml import changed
from varscale.errors import ExperimentError
from varscale.kernels import building
from varscale.kernels.attention import available
from varscale.kernels.building import SWITCH
from varscale.training import execution as numerics
from varscale.training.cells import Numerics, Trunk
from varscale.training.execution import apply_numerics, build_var, check_memory, choose_numerics, measure_matmul_peak

Cost = Callable[[Trunk, Numerics], tuple[float, float]]


def trunks() -> list[tuple[Trunk, int]]:
    """Three sizes, each with its images."""
    experiment = little_experiment()
    return [(Trunk(experiment, depth, 0, 1e12), 8 * 1000 * depth) for depth in (4, 2, 3)]


def choose(
    monkeypatch: pytest.MonkeyPatch, cost: Cost, capability: str = "AVX512", **runtime: Any
) -> tuple[Numerics, dict[str, float]]:
    monkeypatch.setattr(numerics, "_step_cost", cost)
    monkeypatch.setattr(numerics.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    return choose_numerics(trunks(), RuntimeConfig(**runtime), 1, 2)


def per_flop(trunk: Trunk) -> float:
    """A step that takes a second for 1e9 FLOPs."""
    return trunk.flops_per_image * trunk.batch_size / 1e9


@pytest.mark.parametrize(
    ("bfloat16", "compiled", "start", "expected"),
    [
        (0.5, 0.5, 0.0, ("bfloat16", True)),
        (2.0, 0.5, 0.0, ("float32", True)),
        (0.5, 2.0, 0.0, ("bfloat16", False)),
        (2.0, 2.0, 0.0, ("float32", False)),
        (2.0, 0.5, 1e9, ("float32", False)),  # twice as fast, but compiling takes longer than the sweep
    ],
)
def test_the_fewest_seconds_win(
    monkeypatch: pytest.MonkeyPatch, bfloat16: float, compiled: float, start: float, expected: tuple[str, bool]
) -> None:
    def cost(trunk: Trunk, choice: Numerics) -> tuple[float, float]:
        factor = (bfloat16 if choice.precision == "bfloat16" else 1) * (compiled if choice.compiled else 1)
        return factor * per_flop(trunk), start if choice.compiled else 0.0

    chosen, seconds = choose(monkeypatch, cost)
    assert (chosen.precision, chosen.compiled) == expected
    assert (chosen.threads, chosen.tokenizer_threads) == (1, 2)
    total = sum(trunk.flops_per_image * images for trunk, images in trunks())
    assert seconds["float32, eager"] == pytest.approx(total / 1e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in bfloat16")
def test_bfloat16_is_not_tried_on_a_processor_that_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(trunk: Trunk, choice: Numerics) -> tuple[float, float]:
        assert choice.precision == "float32"
        return per_flop(trunk), 0.0

    chosen, _ = choose(monkeypatch, cost, capability="AVX2")
    assert chosen.precision == "float32"


def test_compile_time_counts_once_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(trunk: Trunk, choice: Numerics) -> tuple[float, float]:
        return per_flop(trunk), 7.0 if choice.compiled else 0.0

    _, seconds = choose(monkeypatch, cost, precision="float32")
    assert seconds["float32, compiled"] - seconds["float32, eager"] == pytest.approx(3 * 7)


def test_a_slow_moment_of_the_machine_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor that only the first of a process's models has to be compiled."""
    turns: Counter[bool] = Counter()

    def cost(trunk: Trunk, choice: Numerics) -> tuple[float, float]:
        turns[choice.compiled] += 1
        first = turns[choice.compiled] == 1
        quickest = per_flop(trunk) * (0.5 if choice.compiled else 1)
        return quickest * (4 if first and choice.compiled else 1), 3.0 if first and choice.compiled else 0.0

    chosen, seconds = choose(monkeypatch, cost, precision="float32")
    assert chosen.compiled
    assert seconds["float32, compiled"] == pytest.approx(0.5 * seconds["float32, eager"] + 3 * 3)


@pytest.mark.parametrize(("precision", "compiles"), [("float32", "on"), ("bfloat16", "off"), ("bfloat16", "on")])
def test_what_is_said_is_not_measured(monkeypatch: pytest.MonkeyPatch, precision: str, compiles: str) -> None:
    def cost(trunk: Trunk, choice: Numerics) -> tuple[float, float]:
        raise AssertionError("nothing was left to choose")

    chosen, seconds = choose(monkeypatch, cost, precision=precision, compile=compiles)
    assert (chosen.precision, chosen.compiled, seconds) == (precision, compiles == "on", {})


@pytest.mark.parametrize("runtime", [{"precision": "bfloat16"}, {"compile": "on"}])
def test_what_is_said_is_kept(monkeypatch: pytest.MonkeyPatch, runtime: dict[str, str]) -> None:
    seen: set[Numerics] = set()

    def cost(trunk: Trunk, choice: Numerics) -> tuple[float, float]:
        seen.add(choice)
        return 1.0, 0.0

    chosen, _ = choose(monkeypatch, cost, **runtime)
    assert chosen in seen
    assert len(seen) == 2
    for choice in seen:
        assert choice.precision == runtime.get("precision", choice.precision)
        assert choice.compiled == ("compile" in runtime or choice.compiled)


def test_as_many_images_pass_at_once_as_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each size for itself, in parts of about one size; its weights and moments have to fit too."""
    smallest, _, largest = sorted((trunk for trunk, _ in trunks()), key=lambda trunk: trunk.flops_per_image)
    state, image = largest.shape.training_state_bytes(), largest.shape.activation_bytes(1)
    assert largest.batch_size == 8
    for images, expected in ((8.5, 8), (7.5, 4), (3.5, 3), (1.5, 1)):
        monkeypatch.setattr(numerics, "memory_bytes", lambda _, images=images: (state + images * image) / 0.6)
        chosen, _ = choose(monkeypatch, lambda *_: (1.0, 0.0), precision="float32")
        assert largest.images_at_once(chosen) == expected
    assert smallest.images_at_once(chosen) == 8
    more = replace(chosen, memory_bytes=2 * chosen.memory_bytes)  # whatever else the study's device could hold
    assert smallest.fingerprint("tokens", more) == smallest.fingerprint("tokens", chosen)
    assert largest.fingerprint("tokens", more) != largest.fingerprint("tokens", chosen)
    monkeypatch.setattr(numerics, "memory_bytes", lambda _: (state + 0.5 * image) / 0.6)
    brave = Trunk(changed(largest.experiment, {"runtime.micro_batch": 2}, "a test"), 4, 0, 1e12)
    brave.check_memory(replace(chosen, memory_bytes=1))
    assert brave.images_at_once(chosen) == 2
    with pytest.raises(ExperimentError, match=r"depth 4 needs 0.0 GiB for a step of one image, and a run has"):
        choose(monkeypatch, lambda *_: (1.0, 0.0), precision="float32")


def test_workers_on_one_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max((trunk for trunk, _ in trunks()), key=lambda trunk: trunk.flops_per_image)
    state, image = largest.shape.training_state_bytes(), largest.shape.activation_bytes(1)
    monkeypatch.setattr(numerics, "memory_bytes", lambda _: 2 * (state + 4.5 * image) / 0.6)
    monkeypatch.setattr(numerics, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(numerics, "_step_cost", lambda *_: (1.0, 0.0))
    runtime = RuntimeConfig(precision="float32")
    alone, shared = (choose_numerics(trunks(), runtime, 1, 2, workers)[0] for workers in (1, 2))
    assert [largest.images_at_once(choice) for choice in (alone, shared)] == [8, 4]


def test_a_run_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one whose estimate is a little high."""
    monkeypatch.setattr(numerics, "memory_bytes", lambda _: 2.0**31)
    check_memory(2.6 * 2**30, "runtime.micro_batch")
    with pytest.raises(ValueError, match=r"runtime\.micro_batch: a step needs about 2\.8 GiB, and there are 2\.0 GiB"):
        check_memory(2.8 * 2**30, "runtime.micro_batch")


def test_what_is_measured_is_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of all images that pass at once, each time that the clock runs."""
    trunk, _ = trunks()[0]
    timed: list[int] = []
    timings = numerics._timings

    def count(work: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        timed.append(counter.get_total_flops())
        return timings(work, repeats, warmup)

    monkeypatch.setattr(numerics, "_timings", count)
    seconds, start = numerics._step_cost(trunk, NUMERICS)
    assert seconds > 0
    assert start >= 0
    step = trunk.batch_size * trunk.flops_per_image
    assert all(0.9 * step < flops <= step for flops in timed)  # the first products need no gradient of their inputs
    assert len(timed) == 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_peak(precision: str) -> None:
    assert measure_matmul_peak(precision, 1) > 1e8


def test_build_var_has_the_shapes_parameters() -> None:
    trunk, _ = trunks()[0]
    for shape in (trunk.shape, replace(trunk.shape, normalise_queries_keys=False, shared_adaln=True)):
        var = build_var(shape)
        assert sum(parameter.numel() for parameter in var.parameters()) == shape.parameters()
        assert var.normalise_queries_keys == shape.normalise_queries_keys


def test_kernels_loaded_before_they_were_ruled_out_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run's numbers would depend on what its process had done before."""
    monkeypatch.setenv(SWITCH, "1")
    require_program("g++")
    assert available(8)
    apply_numerics(NUMERICS, 8)
    assert not available(8)


def test_steps_are_measured_with_the_kernels_of_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(numerics, "available", lambda _: False)  # too wide heads
    enabled = []
    monkeypatch.setattr(numerics, "_step_cost", lambda *_: enabled.append(building.enabled()) or (1.0, 0.0))
    choice, _ = choose_numerics(trunks(), RuntimeConfig(), 1, 1)
    assert not choice.native_kernels
    assert enabled
    assert not any(enabled)


def test_a_process_computes_as_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    apply_numerics(NUMERICS, 8)
    assert os.environ[SWITCH] == "0"
    assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="begun with the compiled attention kernel"):
        apply_numerics(Numerics("float32", False, True, 1, 1), 10**6)  # no kernel for such wide heads
