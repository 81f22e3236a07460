"""Training steps of the paper's depth 16 on a GPU: 680 tokens of 4,096 codes, in the ways that a sweep may choose."""

import itertools
import statistics
from collections.abc import Callable

import torch

from benchmarks.measuring import Options, Report, rate
from benchmarks.studies import Size, experiment_680, make_inputs, trunk_of
from benchmarks.trainings import bare_training, batches
from varscale.config.yaml import changed
from varscale.training.cells import Execution, Trunk
from varscale.training.execution import measure_matmul_peak

SIZE, BATCH = Size(16, 1024, 16), 64
QUICK_SIZE, QUICK_BATCH = Size(2, 32, 2), 2
STEPS, ROUNDS = 5, 3
PRECISIONS = ("float32", "bfloat16")


def run(options: Options) -> Report:
    size, batch = (QUICK_SIZE, QUICK_BATCH) if options.quick else (SIZE, BATCH)
    report = Report(
        "paper",
        f"A training step on a GPU: {size.title}, 680 tokens, V = 4096, batch {batch}",
        ("way", "images/s", "TFLOP/s", "peak TFLOP/s", "utilisation", "GiB", "GiB foreseen"),
    )
    if not options.quick and not torch.cuda.is_available():
        report.notes = ["no GPU here: not measured."]
        return report
    for precision, compiled, parts in itertools.product(PRECISIONS, (False, True), (1, 2)):
        if not (options.quick and compiled):
            changes = {"optim.precision": precision, "runtime.micro_batch": batch // parts}
            trunk = trunk_of(changed(experiment_680(size, batch), changes, "benchmarks"), size.depth)
            _measure(trunk, options.execution(compiled=compiled), options, report)
    report.notes = ["utilisation: 3 × the executed forward FLOPs, against a large product in the same precision."]
    return report


def _measure(trunk: Trunk, execution: Execution, options: Options, report: Report) -> None:
    torch.compiler.reset()
    batch, precision = trunk.batch_size, trunk.experiment.optim.precision
    inputs = make_inputs(options.folder / "680 tokens", trunk.experiment, execution, images=8 * batch)
    training, data = bare_training(trunk, inputs), batches(trunk, inputs)

    def speed(steps: int) -> float:
        return rate(lambda: training.step(next(data)), batch, steps)

    speed(2)
    memory = _peak_memory(lambda: speed(1))
    images = statistics.median(speed(1 if options.quick else STEPS) for _ in range(options.rounds(ROUNDS)))
    flops, peak = trunk.model.executed_training_flops(), measure_matmul_peak(precision)
    at_once = trunk.images_at_once(execution.memory_bytes)
    foreseen = trunk.step_bytes(at_once)
    way = f"{precision}, {'compiled' if execution.compiled else 'eager'}, {at_once} images at once"
    speeds = (images, images * flops / 1e12, peak / 1e12, images * flops / peak)
    report.rows.append((way, *speeds, memory / 2**30, foreseen / 2**30))


def _peak_memory(work: Callable[[], object]) -> float:
    """Bytes of the GPU."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return float(torch.cuda.max_memory_allocated())
