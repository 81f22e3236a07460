"""The machine: what a run finds on it and what is recorded of it. Torch is imported only where a GPU must be asked."""

import os
import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from varscale.config import RuntimeConfig
from varscale.config.section import RunResources
from varscale.errors import ExperimentError

PROCESS_BYTES = 2**28
"""What a process that trains takes at the least, of the machine's memory or, for its context, of a GPU's: twice as much
was measured for the smallest models."""
MOST_THREADS_A_PROCESSOR = 16
"""More are a slip of the keyboard; some more than there are processors do no harm."""


@dataclass(frozen=True)
class Peers:
    """The processes that carry out one run together, each with one device; and which of them this one is."""

    rank: int = 0
    count: int = 1
    meeting: str = ""
    """Where they find each other: a file, on one machine; or `host:port` of the first."""

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    @property
    def on_one_machine(self) -> bool:
        """Whether they meet at a file."""
        return self.meeting.startswith("/")


@dataclass(frozen=True)
class Share:
    """A worker's share of the machine."""

    threads: int = 1
    """CPU threads."""
    workers_a_device: int = 1
    """Workers that share a GPU's memory."""
    peers: Peers = Peers()
    """Workers that it carries out a run with."""

    def memory_bytes(self) -> float:
        """Of the device that a run is on: the share of a GPU's, or of the machine's that goes with the threads."""
        import torch

        if torch.cuda.is_available():
            return float(torch.cuda.get_device_properties(0).total_memory) / self.workers_a_device
        return machine_bytes() * min(1.0, self.threads / processors())


@dataclass(frozen=True)
class MachineShares:
    """The machine, divided among the workers of a study. A single run takes a worker's share: it is the same cell."""

    workers: int
    """Runs at once."""
    gpus: int
    worker: Share
    """Of a run that others go on beside."""
    whole: Share
    """Of a run that has the machine to itself."""

    @classmethod
    def of(cls, runtime: RuntimeConfig) -> "MachineShares":
        """What the settings leave open, from what this machine has (imports torch)."""
        import torch

        gpus = torch.cuda.device_count()
        workers = runtime.workers or gpus or processors()
        threads = runtime.threads or max(1, processors() // workers)
        worker = Share(threads, -(-workers // max(1, gpus)))
        return cls(workers, gpus, worker, Share(runtime.tokenizer_threads or processors()))

    def check_run(self, title: str, wanted: RunResources) -> None:
        """Raise `ExperimentError` where a run takes more devices than this machine has workers."""
        if wanted.nodes > 1:
            raise ExperimentError(f"resources.nodes: {wanted.nodes} nodes for {title}: only with --launcher slurm")
        if wanted.devices > self.workers:
            have = f"{self.gpus} GPUs" if self.gpus else f"{self.workers} workers (runtime.workers)"
            raise ExperimentError(f"resources.devices: {title} takes {wanted.devices}, and there are {have} here")

    def check(self) -> None:
        """Raise `ExperimentError` where the machine can't hold so many processes or threads."""
        memory = self.gpus * Share().memory_bytes() if self.gpus else machine_bytes()
        needed = self.workers * PROCESS_BYTES
        if needed > memory:
            raise ExperimentError(
                f"runtime.workers (--workers): {self.workers} processes take at least {needed / 2**30:.1f} GiB, and "
                f"there are {memory / 2**30:.1f} GiB here: expected at most {int(memory / PROCESS_BYTES)}"
            )
        for key, share in (("threads", self.worker), ("tokenizer_threads", self.whole)):
            if share.threads > MOST_THREADS_A_PROCESSOR * processors():
                raise ExperimentError(
                    f"runtime.{key}: {share.threads}, but this machine has {processors()} processors; expected no more "
                    "than these, or 0"
                )


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_bytes() -> float:
    """The machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@cache
def device_name() -> str:
    """The GPU, or the processor, by its model's name."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    level = torch.backends.cpu.get_cpu_capability()
    return f"{next(names, platform.machine())} ({level})"


@cache
def versions() -> dict[str, str]:
    """Of the packages that results may depend on."""
    import torch

    from varscale import __version__

    return {"varscale": __version__, "torch": torch.__version__, "lightning": version("lightning")}
