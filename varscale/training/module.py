"""Trains a model of any family on stored tokens (for VAR: Tian et al. 2024, section 3.2 and appendix B).

Letters: B batch (b a part of it), L tokens of an image.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from varscale.config import OptimConfig
from varscale.evaluation.likelihood import TokenPrediction, by_scale
from varscale.families.base import ModelDescription, TokenLosses
from varscale.numerics.precision import without_autocast
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.training.callbacks import check_finite
from varscale.training.flat import FlatAdamW

EPSILON = 1e-8
"""AdamW's."""
MOST_COMPILATIONS = 128
"""Of a block in one process: sizes of a sweep, each for whole and last parts of a step; beyond, PyTorch fails."""


class ModelModule(LightningModule):
    """A model, its loss and its optimizer.

    Batches are dicts: `tokens_BL` (or `latents_BChw`), `labels_B` and `sample_index_B` (the sample's number in the
    whole run, which names its random numbers: label dropout and stochastic depth are the same however the batch is
    split or resumed).
    Learning rate and weight decay of each step are set by `ScheduleCallback`. A device's share of a step passes in
    parts of `images_at_once` images, 0: at once; parts change nothing but how sums are rounded.

    Optimisation is manual, as in the tokenizer's module, because the gradients of several parts add up within a step.
    """

    def __init__(
        self,
        description: ModelDescription,
        optim: OptimConfig,
        tokenizer: MultiScaleTokenizer,
        *,
        seed: int = 0,
        compiled: bool = False,
        images_at_once: int = 0,
        log_every_steps: int = 20,
    ) -> None:
        """Build the model and freeze the tokenizer; the seed is that of initialisation and of all random numbers."""
        super().__init__()
        self.automatic_optimization = False
        self.family = description.implementation()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = self.family.build(description)
        if compiled:
            for block in self.family.blocks(self.model):
                block.compile(fullgraph=True, dynamic=False, recompile_limit=MOST_COMPILATIONS)
        # frozen and read from its own file: kept out of the modules, hence out of checkpoints and DDP
        self._tokenizer = [tokenizer.requires_grad_(False)]
        self.optim, self.seed = optim, seed
        self.images_at_once, self.log_every_steps = images_at_once, log_every_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.taken = 0  # the same number, without asking a device for it
        self.prediction = TokenPrediction(description.groups, has_likelihood=self.family.has_likelihood)

    steps: Tensor

    @property
    def images_seen(self) -> int:
        """Images of all finished steps, those before this trainer included."""
        return self.taken * self.optim.batch_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.taken = int(checkpoint["state_dict"]["steps"])

    def configure_model(self) -> None:
        """Under Lightning's `ModelParallelStrategy`: shard each block, then the rest, over the processes (FSDP2)."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.family.blocks(self.model):
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> Optimizer:
        """AdamW, with the family's groups of parameters. A CPU updates each group as one tensor."""
        parameters = dict(self.model.named_parameters())
        groups = [
            {
                "params": [parameters[name] for name in group.names],
                "lr": self.optim.peak_lr * group.rate,
                "weight_decay": self.optim.weight_decay * group.decay,
                "eps": EPSILON * group.epsilon,
                "rate": group.rate,
                "decays": group.decay,
            }
            for group in self.family.parameter_groups(self.model)
        ]
        if self.device.type == "cpu" and self.device_mesh is None:
            return FlatAdamW(groups, self.optim.peak_lr, self.optim.betas)
        return AdamW(groups, self.optim.peak_lr, self.optim.betas, fused=self.device.type in ("cpu", "cuda"))

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """One step of the training loss, part by part; what is logged of it is not weighted."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        alone = self.trainer.world_size == 1
        images, parts = len(batch["labels_B"]), _parts(batch, self.images_at_once)
        logs_now = (self.taken + 1) % self.log_every_steps == 0
        logged = []
        for part in parts:
            losses = self.family.losses(self.model, self._tokenizer[0], part, self.seed)
            loss = losses.objective * (len(losses.loss_BL) / images)
            if alone:
                check_finite(loss, self.images_seen)
            with without_autocast(self.device):
                self.manual_backward(loss)
            if logs_now:
                logged.append(losses._replace(loss_BL=losses.loss_BL.detach()))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.optim.grad_clip, foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not alone:  # the norm is the same for all processes, and so they end together
            check_finite(norm, self.images_seen, "norm of the gradient")
        if logs_now:
            self._log(logged, norm)
        optimizer.step()
        self.steps += 1
        self.taken += 1

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Without label dropout and stochastic depth."""
        with torch.compiler.set_stance("force_eager"):  # other shapes: compiling anew would cost more than it gains
            self.prediction.update(self.family.losses(self.model, self._tokenizer[0], batch))

    def _log(self, parts: list[TokenLosses], norm: Tensor) -> None:
        groups = self.prediction.groups
        loss_L = torch.cat([part.loss_BL for part in parts]).mean(0)
        self.log_dict(by_scale("train_loss", loss_L, groups), sync_dist=True)
        if self.family.has_likelihood:
            error_L = torch.cat([part.wrong for part in parts]).float().mean(0)
            self.log_dict(by_scale("train_error", error_L, groups), sync_dist=True)
        self.log("gradient_norm", norm)
        group = self.optimizers().param_groups[0]
        self.log("lr", group["lr"] / group.get("rate", 1.0))
        self.log("step", float(self.taken + 1))  # Lightning counts from the last resume


def _parts(batch: Mapping[str, Tensor], images_at_once: int) -> list[dict[str, Tensor]]:
    """A batch in parts of so many images; 0: as it is."""
    if images_at_once in (0, len(batch["labels_B"])):
        return [dict(batch)]
    split = zip(*(tensor.split(images_at_once) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, values, strict=True)) for values in split]
