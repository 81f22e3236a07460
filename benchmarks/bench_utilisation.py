"""Share of the machine's measured matrix-multiply peak that training reaches, from depth 4 to 20."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import Options, Report, in_turns, rate
from benchmarks.studies import TOKENS_130, Size, make_inputs, rings, trunk_of
from benchmarks.trainings import bare_training, batches
from varscale.config import Experiment
from varscale.config.yaml import changed
from varscale.training.cells import Numerics, Trunk
from varscale.training.execution import choose_numerics, measure_matmul_peak

DEPTHS = (4, 8, 12, 16, 20)
TURN_SECONDS = 1.0
WIDER: dict[str, Any] = {**TOKENS_130, "optim.batch_size": 8, "model.width_per_depth": 16, "model.head_dim": 16}


def run(options: Options) -> Report:
    report = Report(
        "utilisation",
        "Utilisation: executed FLOPs of training a second, as a share of a large matrix product's",
        ("study", "size", "batch", "images/s", "GFLOPs an image", "GFLOP/s", "peak GFLOP/s", "utilisation"),
    )
    studies = {"rings": rings(), "130 tokens, width 16 · depth": changed(rings(), WIDER, "benchmarks")}
    for study, experiment in studies.items():
        _measure(study, experiment, options, report)
    report.notes.append("3 × the executed forward FLOPs (pairs that the mask hides left out); no Lightning around it.")
    return report


def _measure(study: str, experiment: Experiment, options: Options, report: Report) -> None:
    torch.compiler.reset()
    trunks = [trunk_of(experiment, depth) for depth in ((2,) if options.quick else DEPTHS)]
    runtime = {"precision": "float32", "compile": "off"} if options.quick else {}
    numerics, _ = choose_numerics(
        [(trunk, 1000 * trunk.batch_size) for trunk in trunks],
        experiment.runtime.model_copy(update=runtime),
        options.threads,
        options.threads,
    )
    compiled = "compiled" if numerics.compiled else "eager"
    report.notes.append(f"{study}: {numerics.precision}, {compiled}, chosen for all its sizes together.")
    works: dict[str, Callable[[], float]] = {
        Size(trunk.depth, trunk.shape.width, trunk.shape.heads).title: _turn(trunk, study, numerics, options)
        for trunk in trunks
    }
    works["peak"] = lambda: measure_matmul_peak(numerics.precision, options.threads)
    speeds = in_turns(works, options.rounds(5))
    for trunk, (size, values) in zip(trunks, speeds.items(), strict=False):
        flops = trunk.shape.executed_training_flops()
        speed, peak = statistics.median(values), statistics.median(speeds["peak"])
        share = statistics.median(value * flops / top for value, top in zip(values, speeds["peak"], strict=True))
        numbers = (speed, flops / 1e9, speed * flops / 1e9, peak / 1e9, share)
        report.rows.append((study, size, trunk.batch_size, *numbers))


def _turn(trunk: Trunk, study: str, numerics: Numerics, options: Options) -> Callable[[], float]:
    folder = options.folder / ("utilisation-" + "".join(letter for letter in study if letter.isalnum()))
    inputs = make_inputs(folder, trunk.experiment, numerics, 1.0, images=256)
    training, data = bare_training(trunk, inputs), batches(trunk, inputs)
    repeats = 0

    def step() -> None:
        training.step(next(data))

    def turn() -> float:
        nonlocal repeats
        if repeats == 0:
            step()
            repeats = 1 if options.quick else max(1, round(TURN_SECONDS * rate(step, 1, 1)))
        return rate(step, trunk.batch_size, repeats)

    return turn
