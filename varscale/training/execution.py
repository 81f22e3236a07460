"""Which precision and whether to compile, measured once for a whole sweep; and the machine's matrix-multiply peak."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from varscale.config import RuntimeConfig
from varscale.families.var.config import VARShape
from varscale.families.var.transformer import VAR
from varscale.kernels.attention import available
from varscale.kernels.building import SWITCH
from varscale.numerics.device import best_device, deterministic
from varscale.store.fingerprint import processors
from varscale.training.cells import Numerics, Precision, Trunk

_TURNS = 2
_PEAK_SIDES = {"cpu": 1024, "cuda": 8192}


def measure_matmul_peak(precision: str, threads: int) -> float:
    """FLOPs a second of a large square matrix product on this device in this precision: what utilisation refers to."""
    torch.set_num_threads(threads)
    device = best_device()
    side = _PEAK_SIDES[device.type]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(_timings(lambda: a @ b, repeats=5))


def choose_numerics(
    trunks: Sequence[tuple[Trunk, int]],
    runtime: RuntimeConfig,
    threads: int,
    tokenizer_threads: int,
    workers_a_device: int = 1,
) -> tuple[Numerics, dict[str, float]]:
    """Choose what the experiment leaves open by measuring training steps; the fewest seconds for the sweep win.

    First the precision, on the smallest and the largest size. Then
    whether compiling blocks pays, on the largest size in that precision; the time to compile counts, once for each
    size. One choice serves all sizes, since losses of different arithmetic must not be compared.

    Args:
        trunks: The sizes of a sweep, each with the images that all of its runs take together.
        runtime: What is already decided.
        threads: CPU threads of a transformer's run.
        tokenizer_threads: CPU threads of the tokenizer's run, recorded with the choice.
        workers_a_device: Workers that share a GPU's memory.

    Returns:
        The choice, and the estimated seconds of every way measured, named `<precision>, compiled|eager`.

    Raises:
        ExperimentError: a size does not fit into the memory even with one image.
    """
    torch.set_num_threads(threads)
    memory = int(memory_bytes(threads) / (workers_a_device if best_device().type == "cuda" else 1))
    head_channels = {trunk.shape.width // trunk.shape.heads for trunk, _ in trunks}
    native = best_device().type == "cpu" and all(map(available, head_channels))
    ordered = sorted((trunk for trunk, _ in trunks), key=lambda trunk: trunk.flops_per_image)
    sizes = len({trunk.shape for trunk in ordered})
    total_flops = sum(trunk.flops_per_image * images for trunk, images in trunks)
    compiled = runtime.compile == "on"
    precisions: tuple[Precision, ...] = (ordered[0].experiment.optim.precision,)
    seconds: dict[Numerics, float] = {}

    def sweep_seconds(choices: Sequence[Numerics], measured: Sequence[Trunk]) -> dict[Numerics, float]:
        steps = {choice: [math.inf] * len(measured) for choice in choices}
        starts = {choice: [0.0] * len(measured) for choice in choices}
        for _ in range(_TURNS):  # a machine's slow moments must not decide; only the first turn compiles
            for choice in choices:
                for place, trunk in enumerate(measured):
                    step, start = _step_cost(trunk, choice)
                    steps[choice][place] = min(steps[choice][place], step)
                    starts[choice][place] = max(starts[choice][place], start)
        seconds = {}
        for choice in choices:
            flops_a_step = [trunk.flops_per_image * trunk.images_at_once(choice) for trunk in measured]
            per_flop = statistics.fmean(step / flops for step, flops in zip(steps[choice], flops_a_step, strict=True))
            seconds[choice] = total_flops * per_flop + sizes * statistics.fmean(starts[choice])
        return seconds

    _switch_kernels(native)

    def choice_of(precision: Precision, compiled: bool) -> Numerics:
        choice = Numerics(precision, compiled, native, threads, tokenizer_threads, memory)
        for trunk in ordered:
            trunk.check_memory(choice)
        return choice

    best = choice_of(precisions[0], compiled)
    if len(precisions) > 1 and has_bfloat16_arithmetic():
        choices = [choice_of(precision, compiled) for precision in precisions]
        seconds |= sweep_seconds(choices, [ordered[0], ordered[-1]])
        best = min(seconds, key=lambda choice: seconds[choice])
    if runtime.compile == "auto":
        pair = sweep_seconds([replace(best, compiled=compiles) for compiles in (False, True)], [ordered[-1]])
        seconds |= pair
        best = min(pair, key=lambda choice: pair[choice])
    names = {choice: f"{choice.precision}, {'compiled' if choice.compiled else 'eager'}" for choice in seconds}
    return best, {names[choice]: value for choice, value in seconds.items()}


def has_bfloat16_arithmetic() -> bool:
    """Whether products in bfloat16 may be faster here: x86 without AVX-512 emulates them, tens of times as slowly."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return best_device().type != "cpu" or not x86 or "AVX512" in torch.backends.cpu.get_cpu_capability()


def memory_bytes(threads: int) -> float:
    """Of the device that a run is on: a GPU's, or the share of the machine's that goes with its threads."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    machine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return machine * min(1.0, threads / processors())


def check_memory(needed: float, key: str) -> None:
    """Refuse a run that can't fit, before it starts.

    Args:
        needed: Estimated bytes, right to within a third.
        key: The setting that says how many images pass at once.

    Raises:
        ValueError: it needs more than the whole device has, however kind the estimate is.
    """
    memory = memory_bytes(processors())
    if 0.75 * needed > memory:
        raise ValueError(
            f"{key}: a step needs about {needed / 2**30:.1f} GiB, and there are {memory / 2**30:.1f} GiB here: let "
            "fewer images pass at once"
        )


def _step_cost(trunk: Trunk, numerics: Numerics) -> tuple[float, float]:
    """Seconds of a training step of as many images as pass at once, and of the first one beyond that (compilation)."""
    device = best_device()
    var = build_var(trunk.shape).to(device)
    if numerics.compiled:
        var.compile_blocks()
    optimizer = torch.optim.AdamW(var.parameters(), fused=True)
    images = trunk.images_at_once(numerics)
    labels_B = torch.zeros(images, dtype=torch.int64, device=device)
    later = var.tokens - var.first_tokens
    inputs_BMc = torch.randn(images, later, var.latent_channels, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=numerics.precision == "bfloat16"):
            loss = var(labels_B, inputs_BMc).logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with deterministic():
        (first,) = _timings(step, repeats=1, warmup=0)
        quickest = min(_timings(step, repeats=8, warmup=1))  # what else a machine does only ever adds
    return quickest, max(0.0, first - quickest)


def apply_numerics(numerics: Numerics, head_channels: int) -> None:
    """Make this process compute as decided; to be called before a run.

    Raises:
        ValueError: this machine can't build the attention kernel that the study was begun with.
    """
    torch.set_num_threads(numerics.threads)
    _switch_kernels(numerics.native_kernels)
    if numerics.native_kernels and not available(head_channels):
        raise ValueError(
            "this study was begun with the compiled attention kernel, which can't be built here, and losses of "
            "different arithmetic must not be mixed: install a C++ compiler, or use another --runs-dir"
        )


def _switch_kernels(native: bool) -> None:
    """For this process and those it starts; never on against the user's own switch."""
    if not native:
        os.environ[SWITCH] = "0"


def build_var(shape: VARShape) -> VAR:
    """The transformer of a shape."""
    return VAR(**asdict(shape))


def _timings(work: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        _synchronise()
        started = time.perf_counter()
        work()
        _synchronise()
        seconds.append(time.perf_counter() - started)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
