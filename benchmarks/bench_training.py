"""Images a second of a whole training step, ours against the plain VAR, and what Lightning costs around it."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.measuring import Goal, Options, Report, in_turns, median_ratio, rate
from benchmarks.plain_var import AttentionBy, PlainTraining, PlainVAR
from benchmarks.studies import Size, experiment_130, make_inputs, trunk_of, untrained_tokenizer
from benchmarks.trainings import bare_training, batches, sweep_run
from varscale.families.var.transformer import VAR
from varscale.numerics.device import best_device
from varscale.numerics.machine import Share
from varscale.training.cells import Trunk
from varscale.training.execution import decide_execution
from varscale.training.runs import Inputs

TURN_SECONDS = 1.0
ROUNDS = 5
SWEEP_STEPS = 1000  # of each run of the sweep whose compile time must be earned back
# heads = depth, the paper's rule; the factor is the goal against the reference implementation
SIZES = {Size(4, 256, 4): 2.0, Size(8, 64, 8): 1.3, Size(12, 48, 12): 1.7}
QUICK_SIZES = {Size(2, 16, 2): 1.0}


def run(options: Options) -> Report:
    report = Report(
        "training",
        "A training step: forward, backward, clip, AdamW (batch 32, 130 tokens, V = 512)",
        ("size", "way", "images/s", "against plain"),
    )
    for size, goal in (QUICK_SIZES if options.quick else SIZES).items():
        _measure(size, goal, options, report)
    report.notes = [
        "plain: benchmarks/plain_var.py in float32, attention by matrix products or by PyTorch's "
        "scaled_dot_product_attention; ratios are against the faster of the two.",
        "ours, in Lightning: whole runs as a sweep's workers do them (token store, logging, callbacks), their "
        "first step left out.",
        f"chosen is what a sweep of one size and {SWEEP_STEPS} steps would, compile time counted.",
        *report.notes,
    ]
    return report


def _measure(size: Size, goal: float, options: Options, report: Report) -> None:
    torch.compiler.reset()
    experiment = experiment_130(size, **({"runtime.compile": "off"} if options.quick else {}))
    trunk = trunk_of(experiment, size.depth)
    share, tokenizer = Share(options.threads), untrained_tokenizer(experiment)
    compiled = decide_execution(
        [(trunk, SWEEP_STEPS * trunk.batch_size)], experiment.runtime, share, tokenizer
    ).compiled

    def inputs_of(*, compiled: bool) -> Inputs:
        images = 256 if options.quick else 8192
        return make_inputs(options.folder / "130 tokens", experiment, options.execution(compiled=compiled), images)

    seconds = 0.1 if options.quick else TURN_SECONDS
    works: dict[str, Callable[[], float]] = {
        "plain, products": _plain(trunk, inputs_of(compiled=False), "products", seconds),
        "plain, library's attention": _plain(trunk, inputs_of(compiled=False), "library", seconds),
        "ours, eager": _ours(trunk, inputs_of(compiled=False), seconds, report),
    }
    chosen = "ours, compiled (chosen)" if compiled else "ours, eager"
    if compiled:
        works[chosen] = _ours(trunk, inputs_of(compiled=True), seconds, report)
    works["ours, chosen, in Lightning"] = _in_lightning(trunk, inputs_of(compiled=compiled), options, seconds)

    speeds = in_turns(works, options.rounds(ROUNDS))
    plain = max(("plain, products", "plain, library's attention"), key=lambda way: statistics.median(speeds[way]))
    for way, values in speeds.items():
        report.rows.append((size.title, way, statistics.median(values), median_ratio(values, speeds[plain])))
    ratio = median_ratio(speeds[chosen], speeds[plain])
    text = f"{size.title}: at least {goal} × the plain VAR (the issue's goal against the reference implementation)"
    report.goals.append(Goal(text, f"{ratio:.2f} ×", ratio >= goal))
    overhead = 1 - median_ratio(speeds["ours, chosen, in Lightning"], speeds[chosen])
    report.notes.append(
        f"{size.title}: chosen: {chosen.removeprefix('ours, ')}; Lightning costs {overhead:.1%} of a step."
    )


def _plain(trunk: Trunk, inputs: Inputs, by: AttentionBy, seconds: float) -> Callable[[], float]:
    optim, ours = trunk.experiment.optim, bare_training(trunk, inputs)
    like = ours.module.model.cpu()
    assert isinstance(like, VAR)
    model = PlainVAR(like, ours.tokenizer.quantizer, by, like.config.label_dropout)
    model.to(best_device())
    training = PlainTraining(model, lr=optim.peak_lr, weight_decay=optim.weight_decay, grad_clip=optim.grad_clip)
    data = batches(trunk, inputs)

    def step() -> None:
        training.step({name: tensor.to(model.mask_LL.device) for name, tensor in next(data).items()})

    return _steps(step, trunk.batch_size, seconds)


def _ours(trunk: Trunk, inputs: Inputs, seconds: float, report: Report) -> Callable[[], float]:
    training = bare_training(trunk, inputs)
    data = batches(trunk, inputs)
    if inputs.execution.compiled:
        started = time.perf_counter()
        training.step(next(data))
        report.notes.append(f"depth {trunk.depth}: the first compiled step took {time.perf_counter() - started:.1f} s.")
    return _steps(lambda: training.step(next(data)), trunk.batch_size, seconds)


def _steps(step: Callable[[], object], batch_size: int, seconds: float) -> Callable[[], float]:
    """A turn of about so many seconds; the number of steps is found at the first, unmeasured one."""
    repeats = 0

    def turn() -> float:
        nonlocal repeats
        if repeats == 0:
            step()
            repeats = max(1, round(seconds * rate(step, 1, 1)))
        return rate(step, batch_size, repeats)

    return turn


def _in_lightning(trunk: Trunk, inputs: Inputs, options: Options, seconds: float) -> Callable[[], float]:
    steps = 3

    def turn() -> float:
        nonlocal steps
        speed = float(sweep_run(trunk, inputs, steps, options.folder)["images_per_second"])
        steps = max(4, round(seconds * speed / trunk.batch_size) + 1)
        return speed

    return turn
