"""How a machine carries out a study's runs: whether to compile is measured once; so is the matrix-multiply peak."""

import time
from collections.abc import Callable, Sequence

import torch
from pydantic import Field, FiniteFloat

from varscale.config import RuntimeConfig
from varscale.errors import ExperimentError
from varscale.families.models import random_batch
from varscale.kernels.linear import linear
from varscale.numerics.device import best_device, deterministic
from varscale.numerics.machine import Share, device_name, machine_bytes
from varscale.store.records import Record
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.training.cells import Execution, Trunk
from varscale.training.module import ModelModule

_PEAK_SIDES = {"cpu": 1024, "cuda": 8192}


class ExecutionRecord(Record):
    """What was decided for a study on one machine (execution.json)."""

    device: str
    """The machine's GPU or processor: on another one it is decided anew."""
    compiled: bool
    peak_flops: FiniteFloat
    estimated_seconds: dict[str, FiniteFloat] = Field(default_factory=dict)
    """What the training of the whole study would take, eager and compiled, where both were measured."""

    def allowed(self, runtime: RuntimeConfig) -> bool:
        """Whether it was decided on this machine, as the settings allow."""
        return self.device == device_name() and runtime.compile in ("auto", "on" if self.compiled else "off")

    def execution(self, share: Share) -> Execution:
        """For a worker with a share of the machine."""
        return Execution(self.compiled, share.threads, share.memory_bytes(), self.peak_flops, share.peers)


def decide_execution(
    sizes: Sequence[tuple[Trunk, int]], runtime: RuntimeConfig, share: Share, tokenizer: MultiScaleTokenizer
) -> ExecutionRecord:
    """Measure what the settings leave open.

    Compiling the blocks pays where it saves more seconds of the study's training than it costs; the time to compile
    counts once for each size. Steps of the largest size are measured. `sizes` are the study's trunks, each with the
    images that all of its runs take together.
    """
    torch.set_num_threads(share.threads)
    seconds: dict[str, float] = {}
    if runtime.compile == "auto":
        largest = max((trunk for trunk, _ in sizes), key=lambda trunk: trunk.flops_per_image)
        at_once = largest.images_at_once(share.memory_bytes())
        total = sum(trunk.flops_per_image * images for trunk, images in sizes)
        models = len({trunk.model for trunk, _ in sizes})
        for name in ("eager", "compiled"):
            step, start = _step_cost(largest, at_once, tokenizer, name == "compiled")
            seconds[name] = total * (step / (largest.flops_per_image * at_once)) + models * start
    compiled = runtime.compile == "on" if not seconds else seconds["compiled"] < seconds["eager"]
    peak = measure_matmul_peak(sizes[0][0].experiment.optim.precision)
    return ExecutionRecord(device=device_name(), compiled=compiled, peak_flops=peak, estimated_seconds=seconds)


def measure_matmul_peak(precision: str) -> float:
    """FLOPs a second of a large square matrix product on this device in this precision: what utilisation refers to."""
    device = best_device()
    side = _PEAK_SIDES[device.type]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(timings(lambda: linear(a, b), repeats=5))


def check_memory(needed: float, key: str) -> None:
    """Refuse a run that can't fit, before it starts; `needed` is an estimate in bytes, right to within a third.

    Raises:
        ExperimentError: It needs more than the whole device has, however kind the estimate is; names the setting `key`,
            which says how many images pass at once.
    """
    cuda = torch.cuda.is_available()
    memory = float(torch.cuda.get_device_properties(0).total_memory) if cuda else machine_bytes()
    if 0.75 * needed > memory:
        raise ExperimentError(
            f"{key}: a step needs about {needed / 2**30:.1f} GiB, and there are {memory / 2**30:.1f} GiB here: let "
            "fewer images pass at once"
        )


def timings(work: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each call, after some that don't count."""
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


def _step_cost(trunk: Trunk, images: int, tokenizer: MultiScaleTokenizer, compiled: bool) -> tuple[float, float]:
    """Seconds of a training step of so many images, and of the first one beyond that (compilation)."""
    device = best_device()
    module = ModelModule(trunk.model, trunk.experiment.optim, tokenizer, compiled=compiled).to(device)
    optimizer = module.configure_optimizers()
    batch = {name: values.to(device) for name, values in random_batch(trunk.model, images).items()}
    bfloat16 = trunk.experiment.optim.precision == "bfloat16"

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            loss = module.family.losses(module.model, tokenizer, batch, seed=0).objective
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with deterministic():
        (first,) = timings(step, repeats=1, warmup=0)
        quickest = min(timings(step, repeats=12, warmup=1))  # what else a machine does only ever adds
    return quickest, max(0.0, first - quickest)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
