"""What each of two CPU processes does for test_distributed.py: train, and write what it has in the end.

Arguments: a folder with `tiny_training.make_inputs` in it. The processes meet by the variables that torchrun sets.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from small_models import make_module, var_config
from tiny_training import PATCH_NUMS, VOCAB_SIZE, inputs_in, sections
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from varscale.data.loading import EvaluationBatches, ImageBatches, StepBatches
from varscale.data.sources.rings.source import RingsSource
from varscale.data.tokens.store import TokenStore
from varscale.tokenizer.module import TokenizerModule
from varscale.training.trainer import Loader

STEPS, BATCH = 8, 8
ADVERSARIAL = {
    "patch_nums": (1, 2, 6),
    "channel_multipliers": (1, 1, 2),
    "adversarial_weight": 0.3,
    "adversarial_start": 0.5,
    "discriminator_channels": 4,
}


class Losses(Callback):
    """The mean over processes of each step's loss, as it was logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        loss = trainer.callback_metrics["train_loss"].detach().clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
        self.losses.append(float(loss) / trainer.world_size)


def train_model(folder: Path, rank: int, processes: int, strategy: Any, **changes: Any) -> dict[str, Any]:
    """The transformer: losses, validation figures and weights, whole on every process."""
    torch.manual_seed(rank)  # the module must not depend on it
    description = var_config(
        PATCH_NUMS, VOCAB_SIZE, num_classes=3, depth=3, adaln_gamma_init=0.1, drop_path_rate=0.3, label_dropout=0.3
    )
    optim = {"batch_size": BATCH, "lr": 5e-3, "lr_batch_size": BATCH, "grad_clip": 0.3}
    module = make_module(description, optim, log_every_steps=1, **changes)
    tokens = inputs_in(folder).tokens
    share = {"rank": rank, "world_size": processes}
    batches = StepBatches(
        TokenStore.open(tokens.train), seed=0, batch_size=BATCH, start_step=0, num_steps=STEPS, **share
    )
    recorder = Losses()
    trainer = make_trainer(strategy, processes, recorder)
    trainer.fit(module, Loader(batches))
    sharded = isinstance(module.model, FSDPModule)
    if sharded:
        assert all(isinstance(parameter, DTensor) for parameter in module.model.parameters())
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(module.model, options=full)
    else:
        weights = {name: tensor.detach().clone() for name, tensor in module.model.state_dict().items()}
    norm = float(trainer.logged_metrics["gradient_norm"])
    figures: dict[str, float] = {}
    if not sharded:
        store = TokenStore.open(tokens.validation)
        trainer.validate(module, Loader(EvaluationBatches(store, batch_size=7, **share)), verbose=False)
        figures = module.prediction.compute()
    return {"losses": recorder.losses, "weights": weights, "figures": figures, "norm": norm, "sharded": sharded}


def train_tokenizer(rank: int, processes: int, strategy: str, **changes: Any) -> dict[str, Any]:
    """The tokenizer: codebook, its averaged copy and its moments."""
    torch.manual_seed(rank)
    training = {"images": 20 * BATCH, "batch_size": BATCH, "lr": 3e-3, "quantize_after": 0.2, "warmup_images": 0,
                "restart_every_steps": 3, "restart_usage": 0.8}  # fmt: skip
    module = TokenizerModule(*sections(training, **changes))
    source = RingsSource(512, module.tokenizer.image_size)
    batches = ImageBatches(source, seed=0, batch_size=BATCH, start_step=0, num_steps=20, rank=rank,
                           world_size=processes, workers=0)  # fmt: skip
    moved: list[int] = []
    restart = module.tokenizer.quantizer.restart_codes

    def restart_codes(dead_V: torch.Tensor, vectors_Nc: torch.Tensor) -> torch.Tensor:
        moved_V = restart(dead_V, vectors_Nc)
        moved.append(int(moved_V.sum()))
        return moved_V

    module.tokenizer.quantizer.restart_codes = restart_codes
    trainer = make_trainer(strategy, processes)
    trainer.fit(module, Loader(batches))
    moments = trainer.optimizers[0].state[module.tokenizer.quantizer.codebook_Vc]
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in module.state_dict().items()},
        "moments": {name: tensor.clone() for name, tensor in moments.items()},
        "moved": moved,
    }


def make_trainer(strategy: Any, processes: int, *callbacks: Callback) -> Trainer:
    """A trainer without output."""
    return Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the batches are split already
    )


def main(folder: Path) -> None:
    """All cases, one after the other."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)

    def sharding() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1, process_group_backend="gloo")

    results = {
        "model": train_model(folder, rank, processes, "ddp"),
        "sharded": train_model(folder, rank, processes, sharding()),
        "model in parts": train_model(folder, rank, processes, "ddp", images_at_once=3),
        "sharded in parts": train_model(folder, rank, processes, sharding(), images_at_once=3),
        "tokenizer": train_tokenizer(rank, processes, "ddp"),
        "tokenizer in parts": train_tokenizer(rank, processes, "ddp", micro_batch=3),
        "adversarial": train_tokenizer(rank, processes, "ddp_find_unused_parameters_true", **ADVERSARIAL),
    }
    torch.save(results, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
