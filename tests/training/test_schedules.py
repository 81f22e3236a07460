"""Schedules against formulas written out anew, and against the reference's annealing."""

import math

import pytest

from varscale.training.schedules import Schedule

BATCH = 16


def wsd(total: int | None, decay: int) -> Schedule:
    return Schedule("wsd", 2e-3, BATCH, 10 * BATCH, total, decay, weight_decay=0.05)


def test_warm_up_then_stable_then_decay_to_nothing() -> None:
    schedule = wsd(100 * BATCH, 20 * BATCH)
    for step in range(100):
        if step < 10:
            share = (step + 1) / 10
        elif step < 80:
            share = 1.0
        else:
            share = 1 - (step - 80) / 20
        assert schedule.lr(step * BATCH) == pytest.approx(2e-3 * share, rel=1e-12), step
    assert schedule.lr(100 * BATCH) == 0


@pytest.mark.parametrize(("steps", "decay"), [(50, 10), (100, 20), (13, 3)])
def test_a_branch_is_the_whole_schedule_from_its_branch_point(steps: int, decay: int) -> None:
    trunk, whole = wsd(None, 0), wsd(steps * BATCH, decay * BATCH)
    for step in range(steps - decay + 1):  # the first step of the decay still has the full rate
        assert trunk.lr(step * BATCH) == whole.lr(step * BATCH)
    assert trunk.lr((steps - decay + 1) * BATCH) > whole.lr((steps - decay + 1) * BATCH)
    assert trunk.lr(10**9) == 2e-3


def test_final_ratio_is_where_the_decay_ends() -> None:
    schedule = Schedule("wsd", 1.0, 1, 0, 100, 50, final_ratio=0.1)
    assert schedule.lr(75) == pytest.approx(0.55)
    assert schedule.lr(100) == pytest.approx(0.1)
    assert schedule.lr(1000) == pytest.approx(0.1)


def reference_lin0(step: int, warmup: int, steps: int, final: float) -> float:
    """Share of the peak: the reference holds 5% of what follows its warm-up, then falls over the other 95%."""
    left = 1 - (step - warmup) / (steps - 1 - warmup)
    return min(1.0, final + (1 - final) * left / 0.95)


def test_linear_is_the_references() -> None:
    steps, warmup, final = 500, 20, 0.01
    schedule = Schedule("linear", 1.0, BATCH, warmup * BATCH, steps * BATCH, final_ratio=final)
    held = 0.05 * (steps - 1 - warmup)
    for step in range(warmup, steps):
        expected = 1.0 if step - warmup < held else reference_lin0(step, warmup, steps, final)
        assert schedule.lr(step * BATCH) == pytest.approx(expected, abs=1e-12), step
    assert schedule.lr((steps - 1) * BATCH) == pytest.approx(final)  # reached by the last step


def test_weight_decay_goes_to_its_end_along_a_cosine() -> None:
    steps = 200
    schedule = Schedule(
        "linear", 1.0, BATCH, 0, steps * BATCH, final_ratio=0.1, weight_decay=0.05, final_weight_decay=0.08
    )
    for step in range(steps):
        expected = 0.08 + (0.05 - 0.08) * (1 + math.cos(math.pi * step / (steps - 1))) / 2
        assert schedule.decay(step * BATCH) == pytest.approx(expected, abs=1e-12)
    assert wsd(None, 0).decay(12345) == 0.05


def test_a_cosine_begins_as_a_trunk_does_up_to_the_end_of_the_warm_up() -> None:
    steps, warmup = 50, 10
    trunk = wsd(None, 0)
    whole = Schedule("cosine", 2e-3, BATCH, warmup * BATCH, steps * BATCH, (steps - warmup) * BATCH)
    for step in range(steps):
        if step <= warmup:
            assert whole.lr(step * BATCH) == trunk.lr(step * BATCH)
        else:
            expected = 1e-3 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            assert whole.lr(step * BATCH) == pytest.approx(expected, rel=1e-12), step


def test_cosine_of_tokenizers() -> None:
    schedule = Schedule("cosine", 3.0, 1, 10, 110, final_ratio=0.5)
    assert schedule.lr(10) == 3.0
    assert schedule.lr(60) == pytest.approx(3.0 * 0.75)  # half-way between 1 and 0.5
    assert schedule.lr(110) == pytest.approx(1.5)
    assert all(schedule.lr(i) >= schedule.lr(i + 1) for i in range(10, 110))


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="warm-up of 96 images runs into the decay, which starts at 80 of 100"):
        Schedule("wsd", 1.0, 16, 96, 100, 20)
    for kind in ("linear", "cosine"):
        with pytest.raises(ValueError, match=f"a {kind} schedule needs total_images"):
            Schedule(kind, 1.0, 16)
    with pytest.raises(ValueError, match="needs total_images"):
        Schedule("wsd", 1.0, 16, final_weight_decay=0.1)
