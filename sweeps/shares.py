"""How a sweep's workers share the machine. A single run takes one worker's share, so that it is the sweep's cell."""

from typing import NamedTuple

from varscale.config import RuntimeConfig
from varscale.store.fingerprint import processors


class Shares(NamedTuple):
    """The machine, divided."""

    workers: int
    """Runs at once: `runtime.workers`, or one a GPU, or one a processor."""
    gpus: int
    threads: int
    """CPU threads of a worker: `runtime.threads`, or an equal share of the processors."""
    workers_a_device: int
    """Workers that share a GPU's memory."""


def shares(runtime: RuntimeConfig) -> Shares:
    """What the settings leave open, from what this machine has (imports torch)."""
    import torch

    gpus = torch.cuda.device_count()
    workers = runtime.workers or gpus or processors()
    threads = runtime.threads or max(1, processors() // workers)
    return Shares(workers, gpus, threads, -(-workers // max(1, gpus)))
