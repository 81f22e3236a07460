"""How runs use the machine."""

from typing import Annotated, Literal

from pydantic import Field

from varscale.config.section import BatchSizeOrZero, Processes, Real, Section, Steps, Whole


class RuntimeConfig(Section):
    """How runs use the machine. `auto` is measured once for a whole sweep and stored with it."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the transformer block."""
    micro_batch: BatchSizeOrZero = 0
    """Images that pass through the transformer at once: a step of more goes in parts, whose gradients are added up.
    0: of each size, as many as fit into the device's memory."""
    threads: Processes = 0
    """CPU threads a worker; 0: processors / workers."""
    tokenizer_threads: Processes = 0
    """CPU threads of the tokenizer's run and of encoding, which have the machine to themselves; 0: all processors."""
    workers: Processes = 0
    """Runs at once; 0: one a GPU, or one a processor without GPUs."""
    log_every_steps: Steps = 20
    """Steps between points of the training curves."""
    checkpoint_seconds: Annotated[Real, Field(gt=0, le=1e9)] = 60.0
    """Time between checkpoints that an interrupted run goes on from."""
    retries: Annotated[Whole, Field(ge=0, le=1000)] = 2
    """Times a crashed run is tried again."""
