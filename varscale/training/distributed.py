"""Several processes that train one model together, a device each: torch.distributed, and Lightning's strategies."""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from varscale.numerics.device import best_device
from varscale.numerics.machine import Peers

SILENCE = timedelta(minutes=30)
"""How long a process may keep the others waiting within a step."""
MEETING = timedelta(days=7)
"""How long they may wait for the first one to begin."""
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """The processes of one run, and how they share the model."""

    peers: Peers = field(default_factory=Peers)
    sharded: bool = False
    """Whether each holds a part of weights and moments (FSDP2), instead of all (DDP)."""

    @contextmanager
    def together(self, name: str) -> Iterator[None]:
        """Within it they are the process group of torch.distributed; each name serves once a meeting."""
        peers = self.peers
        if peers.count == 1:
            yield
            return
        if peers.on_one_machine and sys.platform == "linux":  # one machine: nothing listens beyond it
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        meeting = meet(peers)
        if peers.leads:
            meeting.set(f"{name} begins", "")
        else:
            meeting.get(f"{name} begins")  # the first one may have had to wait at the run's lock
        distributed.init_process_group(
            "nccl" if best_device().type == "cuda" else "gloo",
            store=PrefixStore(name, meeting),
            rank=peers.rank,
            world_size=peers.count,
            timeout=SILENCE,
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()
            rank_zero_only.rank = 0  # Lightning's, which outlives the trainer: this process may do other runs alone

    def agree(self, decide: Callable[[], Value]) -> Value:
        """What the first process decides."""
        if self.peers.count == 1:
            return decide()
        told = [decide() if self.peers.leads else None]
        distributed.broadcast_object_list(told, src=0)
        return told[0]  # type: ignore[return-value]  # the first one's

    def strategy(self) -> Strategy | str:
        """Lightning's."""
        if self.peers.count == 1:
            return "auto"
        return _FullySharded(self.peers.count) if self.sharded else DDPStrategy()

    def environment(self) -> LightningEnvironment:
        """Who this process is, for Lightning; what a scheduler or torchrun may have left in the environment is not."""
        return _OneOf(self.peers.rank) if self.peers.count > 1 else LightningEnvironment()

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """A sharded model's weights, gathered on the first process; on the others nothing. All must ask."""
        weights: dict[str, Any] = get_model_state_dict(model, options=WHOLE)
        return weights


ALONE = Team()


@functools.lru_cache(maxsize=1)  # several runs, one after another, may meet at the same place
def meet(peers: Peers) -> Store:
    """Where the peers leave messages for each other."""
    if peers.on_one_machine:
        store: Store = FileStore(peers.meeting, peers.count)
        store.set_timeout(MEETING)
        return store
    host, _, port = peers.meeting.rpartition(":")
    return TCPStore(host, int(port), peers.count, is_master=peers.leads, timeout=MEETING, wait_for_workers=False)


class _OneOf(LightningEnvironment):
    """A process that was started by others, and sees one device."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._number = rank

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts none."""
        return True

    def node_rank(self) -> int:
        """Each is on a node of its own, as far as Lightning knows."""
        return self._number

    def local_rank(self) -> int:
        """The only one there."""
        return 0


class _FullySharded(ModelParallelStrategy):
    """FSDP2 with checkpoints of the same form as a single device's, so that any number of devices goes on from them.

    Lightning's own whole checkpoints number an optimizer's parameters in another order than the optimizer does.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """From the checkpoint that was loaded."""
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole, on the first process."""
        assert self.model is not None
        if not optimizer.state:  # before the first step, where PyTorch's function would count one
            return optimizer.state_dict()
        named: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=WHOLE)
        if not named:  # only the first process has it
            return {}
        number = {name: number for number, name in enumerate(self._names(optimizer))}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in named["param_groups"]]
        return {
            "state": {number[name]: state for name, state in named["state"].items()},
            "param_groups": groups,
        }

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads it, mapped from the file."""
        checkpoint: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its part."""
        assert self.model is not None
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=WHOLE)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its part."""
        assert self.model is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if not state["state"]:
                continue
            names = self._names(optimizer)
            groups = [
                {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
            ]
            named: dict[str, Any] = {
                "state": {names[number]: each for number, each in state["state"].items()},
                "param_groups": groups,
            }
            set_optimizer_state_dict(self.model, optimizer, named, options=WHOLE)

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Of an optimizer's parameters, in the order in which it numbers them."""
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
