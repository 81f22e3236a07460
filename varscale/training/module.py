"""Trains VAR on stored tokens (Tian et al. 2024, section 3.2 and appendix B; the reference's recipe).

Letters: B batch (b a part of it), K scales, L tokens of an image, c latent channels, D depth, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from varscale.evaluation.likelihood import TokenPrediction, by_scale, token_losses
from varscale.families.var.transformer import VAR
from varscale.numerics.precision import without_autocast
from varscale.numerics.randomness import uniform
from varscale.tokenizer.quantizer import MultiScaleQuantizer
from varscale.tokenizer.storage import load_tokenizer
from varscale.training.callbacks import check_finite


class TokenModelModule(LightningModule):
    """A VAR transformer, its loss and its optimizer.

    Batches are dicts: `tokens_BL`, `labels_B` and `sample_index_B` (the sample's number in the whole run, which names
    its random numbers: label dropout and stochastic depth are the same however the batch is split or resumed).
    Learning rate and weight decay of each step are set by `ScheduleCallback`.
    """

    def __init__(
        self,
        tokenizer_path: str,
        num_classes: int,
        depth: int,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        shared_adaln: bool = False,
        normalise_queries_keys: bool = True,
        adaln_init: float = 0.5,
        adaln_gamma_init: float = 1e-3,
        head_init: float = 0.02,
        *,
        batch_size: int,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        grad_clip: float = 2.0,
        label_dropout: float = 0.1,
        seed: int = 0,
        compile_blocks: bool = False,
        images_at_once: int = 0,
        log_every_steps: int = 20,
    ) -> None:
        """Read the finished tokenizer, whose quantizer makes each scale's inputs, and build the model.

        First the model's arguments (see `VAR`), then the training's (see `ModelConfig` and `OptimConfig`). A device's
        share of a step passes in parts of `images_at_once`; 0: at once.
        """
        super().__init__()
        tokenizer = load_tokenizer(Path(tokenizer_path))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.var = VAR(
                tokenizer.patch_nums,
                tokenizer.vocab_size,
                tokenizer.latent_channels,
                num_classes,
                depth,
                width,
                heads,
                mlp_ratio=mlp_ratio,
                drop_path_rate=drop_path_rate,
                shared_adaln=shared_adaln,
                normalise_queries_keys=normalise_queries_keys,
                adaln_init=adaln_init,
                adaln_gamma_init=adaln_gamma_init,
                head_init=head_init,
            )
        if compile_blocks:
            self.var.compile_blocks()
        # frozen and read from its own file: kept out of the modules, hence out of checkpoints and DDP
        self._quantizer = [tokenizer.quantizer.requires_grad_(False)]
        self.batch_size, self.lr, self.betas, self.weight_decay = batch_size, lr, betas, weight_decay
        self.grad_clip, self.label_dropout, self.seed = grad_clip, label_dropout, seed
        self.images_at_once, self.log_every_steps = images_at_once, log_every_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.prediction = TokenPrediction(tokenizer.patch_nums)
        self._scale_sizes = [side * side for side in tokenizer.patch_nums]

    steps: Tensor

    @property
    def images_seen(self) -> int:
        """Images of all finished steps, those before this trainer included."""
        return int(self.steps) * self.batch_size

    def configure_model(self) -> None:
        """Under Lightning's `ModelParallelStrategy`: shard each block, then the rest, over the processes (FSDP2)."""
        if self.device_mesh is None or isinstance(self.var, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.var.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.var, mesh=mesh)

    def configure_optimizers(self) -> Optimizer:
        """AdamW; no decay on biases, norms, 1-d and position, level and scale parameters."""
        plain = self.var.parameter_names_without_decay()
        named = list(self.var.named_parameters())
        decayed = [parameter for name, parameter in named if name not in plain]
        rest = [parameter for name, parameter in named if name in plain]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay, "decays": True},
            {"params": rest, "weight_decay": 0.0, "decays": False},
        ]
        return AdamW(groups, lr=self.lr, betas=self.betas, fused=self.device.type in ("cpu", "cuda"))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the whole gradient, in few calls: narrow, deep models have hundreds of small tensors."""
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.grad_clip, foreach=True)
        if self._logs_now:
            self.log("gradient_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def forward(self, labels_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, V) of stored tokens."""
        logits_BLV: Tensor = self.var(labels_B, self._inputs(tokens_BL))
        return logits_BLV

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Nothing: `training_step` does it, before the gradients of the first part."""

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy, the mean over all tokens of all scales: of the last part, divided by the number of images.

        The parts before have had their backward pass when this returns. Every image has random numbers of its own, so
        parts change nothing but how sums are rounded.
        """
        self.zero_grad()
        images, logged = len(batch["tokens_BL"]), []
        parts = list(zip(*(tensor.split(self.images_at_once or images) for tensor in batch.values()), strict=True))
        for number, values in enumerate(parts, start=1):
            part = dict(zip(batch, values, strict=True))
            logits_bLV = self._training_logits(part)
            loss_bL = token_losses(logits_bLV, part["tokens_BL"])
            loss = loss_bL.mean() * (len(loss_bL) / images)
            check_finite(loss, self.images_seen)
            if self._logs_now:
                wrong_bL = logits_bLV.detach().argmax(-1) != part["tokens_BL"]
                logged.append(torch.stack((loss_bL.detach(), wrong_bL)))
            if number < len(parts):
                with without_autocast(self.device):
                    loss.backward()
        if logged:
            loss_L, error_L = torch.cat(logged, dim=1).mean(1)
            self.log_dict(by_scale("train_loss", loss_L, self.var.patch_nums))
            self.log_dict(by_scale("train_error", error_L, self.var.patch_nums))
            self.log("lr", self.optimizers().param_groups[0]["lr"])
            self.log("step", float(self.steps + 1))  # Lightning counts from the last resume
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and count."""
        super().optimizer_step(*args, **kwargs)
        self.steps += 1

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Without label dropout and stochastic depth."""
        with torch.compiler.set_stance("force_eager"):  # other shapes: compiling anew would cost more than it gains
            self.prediction.update(self(batch["labels_B"], batch["tokens_BL"]), batch["tokens_BL"])

    @property
    def _logs_now(self) -> bool:
        return (int(self.steps) + 1) % self.log_every_steps == 0

    def _training_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, L, V), with label dropout and stochastic depth."""
        labels_B, index_B = batch["labels_B"], batch["sample_index_B"]
        if self.label_dropout > 0:
            dropped_B = uniform(self.seed, "label_dropout", 0, index_B, 1)[:, 0] < self.label_dropout
            labels_B = labels_B.masked_fill(dropped_B, self.var.num_classes)
        inputs_BMc = self._inputs(batch["tokens_BL"])
        logits_BLV: Tensor = self.var(labels_B, inputs_BMc, keep_D2B=self._kept_branches(index_B))
        return logits_BLV

    def _inputs(self, tokens_BL: Tensor) -> Tensor:
        quantizer: MultiScaleQuantizer = self._quantizer[0].to(tokens_BL.device)
        return quantizer.next_scale_inputs(tokens_BL.split(self._scale_sizes, dim=1))

    def _kept_branches(self, index_B: Tensor) -> Tensor | None:
        """Stochastic depth (Huang et al. 2016): 0 or 1 / keep probability for each block, branch and sample."""
        rates = self.var.drop_path_rates
        if not any(rates):
            return None
        drawn_BD2 = uniform(self.seed, "stochastic_depth", 0, index_B, 2 * len(rates)).view(-1, len(rates), 2)
        rate_D1 = drawn_BD2.new_tensor(rates).unsqueeze(1)
        return ((drawn_BD2 >= rate_D1) / (1 - rate_D1)).permute(1, 2, 0)
