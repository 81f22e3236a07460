"""Share of the machine's measured matrix-multiply peak that training reaches, from depth 4 to 20."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import Options, Report, in_turns, rate
from benchmarks.studies import TOKENS_130, make_inputs, rings, size_of, trunk_of, untrained_tokenizer
from benchmarks.trainings import bare_training, batches
from varscale.config import Experiment
from varscale.config.yaml import changed
from varscale.numerics.machine import Share
from varscale.training.cells import Execution, Trunk
from varscale.training.execution import decide_execution, measure_matmul_peak

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
    runtime = experiment.runtime.model_copy(update={"compile": "off"} if options.quick else {})
    sizes = [(trunk, 1000 * trunk.batch_size) for trunk in trunks]
    compiled = decide_execution(sizes, runtime, Share(options.threads), untrained_tokenizer(experiment)).compiled
    execution = options.execution(compiled=compiled)
    chosen = "compiled" if compiled else "eager"
    report.notes.append(f"{study}: {chosen}, decided for all its sizes together.")
    works: dict[str, Callable[[], float]] = {
        size_of(trunk).title: _turn(trunk, study, execution, options) for trunk in trunks
    }
    works["peak"] = lambda: measure_matmul_peak(experiment.optim.precision)
    speeds = in_turns(works, options.rounds(5))
    for trunk, (size, values) in zip(trunks, speeds.items(), strict=False):
        flops = trunk.model.executed_training_flops()
        speed, peak = statistics.median(values), statistics.median(speeds["peak"])
        share = statistics.median(value * flops / top for value, top in zip(values, speeds["peak"], strict=True))
        numbers = (speed, flops / 1e9, speed * flops / 1e9, peak / 1e9, share)
        report.rows.append((study, size, trunk.batch_size, *numbers))


def _turn(trunk: Trunk, study: str, execution: Execution, options: Options) -> Callable[[], float]:
    inputs = make_inputs(options.folder / f"utilisation {study}", trunk.experiment, execution, images=256)
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
