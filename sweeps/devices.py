"""What a study is planned for: a named GPU by its data sheet, or this machine by what was measured on it."""

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import ValidationError

from sweeps.costs import Arithmetic, StudyCosts, Work
from sweeps.pace import Pace
from varscale.config import Experiment, RuntimeConfig
from varscale.config.tokenizer import TokenizerArchitecture
from varscale.errors import ExperimentError
from varscale.store.curves import read_curve
from varscale.store.layout import Store
from varscale.store.records import RunIdentity, read_result
from varscale.tokenizer.shape import TokenizerShape

DEFAULT_UTILISATION = 0.3
"""Of the data sheet's peak. Depth 16 of the paper, compiled, reached it on an H200: 328 images a second
(docs/benchmarks.md)."""
BLOCK_CALL_SECONDS = 1e-4
"""What a block's call takes at least to draw images, however few tokens pass: a dozen kernels or more that a processor
starts one after the other. Measured on one AVX2 core, one token of one image: .06 to .2 ms up to width 64. Not measured
on GPUs."""
THIS = "this"


class Gpu(NamedTuple):
    """A GPU's data sheet."""

    title: str
    memory_bytes: float
    peak_flops: dict[Arithmetic, float]
    """Dense; float32 is what general cores do, in which PyTorch multiplies float32 matrices unless told otherwise."""


# NVIDIA's data sheets; Hopper's state the peaks of tensor cores with sparsity, twice the dense ones. "H100 Tensor
# Core GPU" and "H200 Tensor Core GPU" (SXM): BF16 1,979, TF32 989, FP32 67. "A100 Tensor Core GPU" (SXM, 80 GB),
# dense: 312, 156, 19.5. RTX 4090: "Ada GPU Architecture", appendix A, with float32 sums, dense: 165.2, 82.6, 82.6.
_HOPPER: dict[Arithmetic, float] = {"bfloat16": 1979e12 / 2, "tf32": 989e12 / 2, "float32": 67e12}
GPUS = {
    "h100": Gpu("H100 SXM 80 GB", 80e9, _HOPPER),
    "h200": Gpu("H200 SXM 141 GB", 141e9, _HOPPER),
    "a100": Gpu("A100 SXM 80 GB", 80e9, {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12}),
    "4090": Gpu("GeForce RTX 4090 24 GB", 24e9, {"bfloat16": 165.2e12, "tf32": 82.6e12, "float32": 82.6e12}),
}


class Estimate(NamedTuple):
    """How long work takes."""

    seconds: float
    exact: bool
    """Whether it follows from the device's basis directly, and not from other work by FLOPs."""


@dataclass(frozen=True)
class Paces:
    """How fast this machine is, as far as it was measured."""

    models: Pace = field(default_factory=Pace)
    tokenizers: Pace = field(default_factory=Pace)
    basis: str = ""
    """What was measured, for people."""


@dataclass(frozen=True)
class Device:
    """What a study is planned for."""

    title: str
    memory_bytes: float
    """What a run has."""
    workers: int
    """Runs at once."""
    unit: str
    """What hours of one worker are called."""
    basis: str
    """What the hours rest on, for people."""
    estimate: Callable[[Work], Estimate | None]
    """How long a worker takes; None: nothing is known of it."""

    def seconds(self, works: Iterable[Work]) -> Estimate | None:
        """How long one worker takes for all of it; of what nothing is known is left out."""
        found = [estimate for work in works if work.flops and (estimate := self.estimate(work)) is not None]
        if not found:
            return None
        return Estimate(sum(each.seconds for each in found), all(each.exact for each in found))

    def least_seconds(self, costs: StudyCosts) -> float:
        """The least time from start to end: tokenizer and tokens, then all workers at once, or the longest chain."""

        def seconds(works: Iterable[Work]) -> float:
            estimate = self.seconds(works)
            return 0.0 if estimate is None else estimate.seconds

        side_by_side = seconds((*costs.trunks, *costs.branches, *costs.evaluations)) / self.workers
        longest = max(map(seconds, costs.chains), default=0.0)
        return seconds((*costs.tokenizer, *costs.encoding)) + max(side_by_side, longest)


def named_device(name: str, utilisation: float, runtime: RuntimeConfig) -> Device:
    """A GPU of the data sheets; `runtime.workers` of them, or one."""
    gpu = GPUS[name]

    def estimate(work: Work) -> Estimate:
        seconds = work.executed / (gpu.peak_flops[work.arithmetic] * utilisation)
        return Estimate(seconds + work.block_calls * BLOCK_CALL_SECONDS, exact=not work.block_calls)

    peaks = ", ".join(f"{kind} {peak / 1e12:.4g}" for kind, peak in gpu.peak_flops.items())
    basis = (
        f"computed, not measured: FLOPs that are executed, at a utilisation of {utilisation:g} (--utilisation) of "
        f"the data sheet's dense peak (TFLOP/s: {peaks}); small models, float32 and drawing images reach less, and to "
        f"the last (~) {1e3 * BLOCK_CALL_SECONDS:g} ms are added for each call of a block, a guess"
    )
    return Device(gpu.title, gpu.memory_bytes, runtime.workers or 1, "GPU-hours", basis, estimate)


def this_machine(runtime: RuntimeConfig, paces: Paces) -> Device:
    """This machine, at the speeds measured (imports torch)."""
    from varscale.numerics.machine import MachineShares, device_name

    shares = MachineShares.of(runtime)

    def estimate(work: Work) -> Estimate | None:
        pace = {"model": paces.models, "tokenizer": paces.tokenizers}.get(work.network)
        if pace is None or not pace.sizes:
            return None
        exact = work.trains and work.size in pace.sizes
        seconds = work.flops / work.size * pace.seconds(work.size)
        return Estimate(seconds + work.block_calls * BLOCK_CALL_SECONDS, exact)

    unit = "GPU-hours" if shares.gpus else "hours"
    return Device(device_name(), shares.worker.memory_bytes(), shares.workers, unit, paces.basis, estimate)


def recorded_paces(store: Store) -> Paces:
    """How long an image took in the trunks of a runs folder, and in its tokenizers of this machine."""
    from varscale.numerics.machine import device_name

    models, tokenizers = Pace(), Pace()
    for run in store.begun("trunks"):
        identity = RunIdentity.read(run.identity)
        size = identity.params.get("flops_per_image") if identity is not None else None
        rates = [rate for point in read_curve(run.metrics) if (rate := point.metrics.get("images_per_second", 0)) > 0]
        if rates and isinstance(size, int | float) and size > 0:
            models.add(int(size), 1, 1 / statistics.median(rates))
    for run in store.begun("tokenizers"):
        result, points = read_result(run), list(read_curve(run.metrics))
        paces = [
            (later.time - earlier.time) / (later.images - earlier.images)
            for earlier, later in itertools.pairwise(points)
            if later.images > earlier.images
        ]
        size = _tokenizer_flops(RunIdentity.read(run.identity))
        if size and paces and result is not None and result.provenance.get("device") == device_name():
            tokenizers.add(size, 1, statistics.median(paces))
    known = models.sizes or tokenizers.sizes
    basis = f"of what was trained in {store.runs}; ~ is estimated from that by FLOPs" if known else ""
    return Paces(models, tokenizers, basis)


def check_device(name: str, utilisation: float | None, *, calibrate: bool) -> None:
    """Raise `ExperimentError` where the options name no device, or don't go together."""
    if name not in (*GPUS, THIS):
        raise ExperimentError(f"--device {name}: unknown; expected {', '.join(GPUS)} or {THIS}")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ExperimentError(f"--utilisation {utilisation:g}: expected a share of the peak above 0 and up to 1")
    if name == THIS and utilisation is not None:
        raise ExperimentError("--utilisation: this machine's speed is measured; name a --device that it belongs to")
    if name != THIS and calibrate:
        raise ExperimentError(f"--calibrate measures this machine, not {name}: leave out one of the two")


def planned_device(experiment: Experiment, store: Store, name: str, utilisation: float | None) -> Device:
    """The device that options name, after `check_device`; this machine as fast as its runs were."""
    if name == THIS:
        return this_machine(experiment.runtime, recorded_paces(store))
    return named_device(name, DEFAULT_UTILISATION if utilisation is None else utilisation, experiment.runtime)


def _tokenizer_flops(identity: RunIdentity | None) -> int:
    """Training FLOPs of an image; 0 where the run doesn't say what was trained."""
    try:
        params = identity.params if identity is not None else {}
        made = {name: value for name, value in params.items() if name in TokenizerArchitecture.model_fields}
        return TokenizerShape(TokenizerArchitecture.model_validate(made)).training_flops()
    except ValidationError:
        return 0
