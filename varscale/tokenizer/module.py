"""Trains the multi-scale VQ-VAE (VAR, section 3.2 and appendix; VQGAN's losses).

Letters: B batch (b a part of it), K scales, c latent channels, N looked-up vectors, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from varscale.config import SMALLEST_ADVERSARIAL_IMAGE
from varscale.evaluation.codebook import count_codes
from varscale.evaluation.perceptual import load_lpips
from varscale.evaluation.reconstruction import ReconstructionMeter
from varscale.tokenizer.autoencoder import MultiScaleTokenizer, TokenizerOutput
from varscale.tokenizer.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from varscale.training.callbacks import check_finite
from varscale.training.schedules import Schedule


class TokenizerModule(LightningModule):
    """Tokenizer, its averaged copy and, where its weight is not 0, the discriminator.

    Batches are dicts with `images_B3HW` in [-1, 1]. Everything that is measured or used later (validation, tokens,
    decoding) comes from the averaged copy, `averaged`. A device's share of a step passes in parts of `micro_batch`
    images, 0 at once; parts change nothing but rounding and the adversarial term's weight, which each finds for itself.
    With a discriminator on several devices the trainer's strategy must be `ddp_find_unused_parameters_true`, since the
    discriminator does nothing before its start.
    """

    def __init__(
        self,
        patch_nums: Sequence[int],
        vocab_size: int,
        latent_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        residual_blocks: int = 2,
        attention: bool = True,
        norm_groups: int = 32,
        phi_count: int = 4,
        phi_ratio: float = 0.5,
        commitment_weight: float = 0.25,
        *,
        total_images: int,
        batch_size: int,
        micro_batch: int = 0,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        grad_clip: float = 1.0,
        warmup_images: int = 0,
        final_lr_ratio: float = 0.01,
        ema_decay: float = 0.995,
        l1_weight: float = 0.2,
        l2_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        perceptual_weights_path: str | None = None,
        adversarial_weight: float = 0.0,
        adversarial_start: float = 0.3,
        discriminator_channels: int = 64,
        quantize_after: float = 0.0,
        restart_every_steps: int = 50,
        restart_usage: float = 0.1,
        seed: int = 0,
        log_every_steps: int = 20,
    ) -> None:
        """The model's arguments (see `MultiScaleTokenizer`), then the training's (see `TokenizerTraining`).

        Raises:
            ValueError: codes would never be used, images are too small for the discriminator, or what
                `MultiScaleTokenizer` and `Schedule` refuse.
        """
        super().__init__()
        if quantize_after > 0.8:
            raise ValueError(
                f"quantize_after: {quantize_after}, but codes settle in the last fifth of the training: at most 0.8"
            )
        self.automatic_optimization = False  # two optimizers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokenizer = MultiScaleTokenizer(
                patch_nums,
                vocab_size,
                latent_channels,
                base_channels,
                channel_multipliers=channel_multipliers,
                residual_blocks=residual_blocks,
                attention=attention,
                norm_groups=norm_groups,
                phi_count=phi_count,
                phi_ratio=phi_ratio,
                commitment_weight=commitment_weight,
            )
            # a third faster on CPUs; PyTorch's stub lacks this overload
            self.tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.discriminator = PatchDiscriminator(discriminator_channels) if adversarial_weight > 0 else None
            if self.discriminator is not None and self.tokenizer.image_size < SMALLEST_ADVERSARIAL_IMAGE:
                raise ValueError(
                    f"adversarial_weight: {adversarial_weight}, but the discriminator needs images of at least "
                    f"{SMALLEST_ADVERSARIAL_IMAGE} px, not {self.tokenizer.image_size}: set it to 0"
                )
        self._averaged = AveragedModel(self.tokenizer, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self._averaged.requires_grad_(False)
        self.schedule = Schedule("cosine", lr, batch_size, warmup_images, total_images, final_ratio=final_lr_ratio)
        self.total_images, self.batch_size, self.micro_batch = total_images, batch_size, micro_batch
        self.betas, self.weight_decay, self.grad_clip = betas, weight_decay, grad_clip
        self.l1_weight, self.l2_weight, self.perceptual_weight = l1_weight, l2_weight, perceptual_weight
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.quantize_from_step = round(quantize_after * total_images / batch_size)
        self.restart_every_steps, self.restart_usage, self.seed = restart_every_steps, restart_usage, seed
        self.log_every_steps = log_every_steps
        # LPIPS is frozen and rebuilt from its file: kept out of the modules, hence out of checkpoints and DDP
        self._lpips = [load_lpips(Path(perceptual_weights_path))] if perceptual_weights_path else []
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usage_V", torch.zeros(vocab_size, dtype=torch.int64))
        self.meter = ReconstructionMeter(len(patch_nums), vocab_size)

    steps: Tensor
    usage_V: Tensor

    @property
    def averaged(self) -> MultiScaleTokenizer:
        """The averaged tokenizer: the one to use."""
        return cast(MultiScaleTokenizer, self._averaged.module)

    @property
    def images_seen(self) -> int:
        """Images of all finished steps; the trainer's own step count counts both optimizers."""
        return int(self.steps) * self.batch_size

    def configure_optimizers(self) -> list[AdamW]:
        """AdamW for the tokenizer and, where there is one, for the discriminator."""
        codebook = self.tokenizer.quantizer.codebook_Vc
        parameters = [p for p in self.tokenizer.parameters() if p.requires_grad]
        decayed = [p for p in parameters if p.ndim > 1 and p is not codebook]
        plain = [p for p in parameters if p.ndim <= 1 or p is codebook]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizers = [AdamW(groups, lr=self.schedule.peak_lr, betas=self.betas, fused=True)]
        if self.discriminator is not None:
            optimizers.append(
                AdamW(
                    self.discriminator.parameters(),
                    lr=self.schedule.peak_lr,
                    betas=self.betas,
                    weight_decay=0.0,
                    fused=True,
                )
            )
        return optimizers

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """One step of the tokenizer, then one of the discriminator where it has set in."""
        images_B3HW = batch["images_B3HW"].contiguous(memory_format=torch.channels_last)
        if int(self.steps) == self.quantize_from_step:
            self._initialise_codes(images_B3HW)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.lr(self.images_seen)
        quantizes = int(self.steps) >= self.quantize_from_step
        parts = images_B3HW.split(self.micro_batch or len(images_B3HW))
        optimizers[0].zero_grad()
        outputs, figures = zip(
            *(self._add_gradient(part_b3HW, len(part_b3HW) / len(images_B3HW), quantizes) for part_b3HW in parts),
            strict=True,
        )
        nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.grad_clip)
        optimizers[0].step()
        self._averaged.update_parameters(self.tokenizer)
        logged = {name: torch.stack([figure[name] for figure in figures]).sum() for name in figures[0]}
        if self._adversarial:
            fakes = [output.reconstruction_B3HW for output in outputs]
            logged["train_discriminator"] = self._train_discriminator(optimizers[1], parts, fakes)
        self.steps += 1
        if quantizes:
            tokens = [torch.cat(scale) for scale in zip(*(output.tokens for output in outputs), strict=True)]
            residuals = [torch.cat(scale) for scale in zip(*(output.residuals for output in outputs), strict=True)]
            self._keep_codes_alive(optimizers[0], tokens, residuals)
        if int(self.steps) % self.log_every_steps == 0:
            self.log_dict({"step": float(self.steps), **logged})

    def on_validation_epoch_start(self) -> None:
        """Measure anew."""
        self.meter.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Measure the averaged tokenizer on a batch; `meter.compute()` afterwards."""
        self.meter.update(self.averaged, batch["images_B3HW"])

    @property
    def _adversarial(self) -> bool:
        return self.discriminator is not None and self.images_seen >= self.adversarial_start * self.total_images

    def _add_gradient(
        self, images_b3HW: Tensor, share: float, quantizes: bool
    ) -> tuple[TokenizerOutput, dict[str, Tensor]]:
        """Backward pass of a step's part; what it gave, detached, and its share of the logged figures."""
        output: TokenizerOutput = self.tokenizer(images_b3HW, quantize=quantizes)
        loss, figures = self._losses(images_b3HW, output)
        check_finite(loss, self.images_seen)
        self.manual_backward(loss * share)
        detached = output._replace(
            reconstruction_B3HW=output.reconstruction_B3HW.detach(), quantizer_loss=output.quantizer_loss.detach()
        )
        return detached, {name: value * share for name, value in {"train_loss": loss.detach(), **figures}.items()}

    def _losses(self, images_B3HW: Tensor, output: TokenizerOutput) -> tuple[Tensor, dict[str, Tensor]]:
        l1 = F.l1_loss(output.reconstruction_B3HW, images_B3HW)
        l2 = F.mse_loss(output.reconstruction_B3HW, images_B3HW)
        reconstruction = self.l1_weight * l1 + self.l2_weight * l2
        figures = {"train_l1": l1.detach(), "train_l2": l2.detach(), "train_quantizer": output.quantizer_loss.detach()}
        if self._lpips and self.perceptual_weight > 0:
            perceptual = self._lpips[0].to(self.device)(output.reconstruction_B3HW, images_B3HW).mean()
            reconstruction = reconstruction + self.perceptual_weight * perceptual
            figures["train_lpips"] = perceptual.detach()
        loss = reconstruction + output.quantizer_loss
        if self._adversarial:
            assert self.discriminator is not None
            adversarial = generator_loss(self.discriminator(output.reconstruction_B3HW))
            weight = adaptive_weight(reconstruction, adversarial, self.tokenizer.decoder.output.weight)
            loss = loss + self.adversarial_weight * weight * adversarial
            figures["train_adversarial"] = adversarial.detach()
        return loss, figures

    def _train_discriminator(self, optimizer: Any, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
        assert self.discriminator is not None
        optimizer.zero_grad()
        images, losses = sum(map(len, real)), []
        for real_b3HW, fake_b3HW in zip(real, fake, strict=True):
            loss = discriminator_loss(self.discriminator(real_b3HW), self.discriminator(fake_b3HW))
            losses.append(loss * (len(real_b3HW) / images))
            self.manual_backward(losses[-1])
        optimizer.step()
        return torch.stack(losses).detach().sum()

    @torch.no_grad()
    def _initialise_codes(self, images_B3HW: Tensor) -> None:
        """Codes start as vectors of the data, of all scales alike, the same on every process."""
        quantizer = self.tokenizer.quantizer
        parts = images_B3HW.split(self.micro_batch or len(images_B3HW))
        features_BChw = torch.cat([self.tokenizer.features(part_b3HW) for part_b3HW in parts])
        vectors_Nc = _replacements(quantizer(features_BChw).residuals, quantizer.vocab_size, self.seed)
        quantizer.initialise_codes(self._from_first_process(vectors_Nc), seed=self.seed)
        self.averaged.quantizer.codebook_Vc.copy_(quantizer.codebook_Vc)

    @torch.no_grad()
    def _keep_codes_alive(self, optimizer: Any, tokens: Sequence[Tensor], residuals: Sequence[Tensor]) -> None:
        """Count use over all processes; every so often move dead codes onto vectors of the data.

        None in the last fifth of training, so that the tokens settle. A moved code begins with fresh optimizer
        moments, and at once in the averaged copy: old averages of another code would be worse than none.
        """
        quantizer = self.tokenizer.quantizer
        used_V = count_codes(tokens, quantizer.vocab_size).sum(0)
        self.usage_V += self._summed(used_V)
        if int(self.steps) % self.restart_every_steps or self.images_seen > 0.8 * self.total_images:
            return
        dead_V = self.usage_V < self.restart_usage * self.usage_V.sum() / quantizer.vocab_size
        self.usage_V.zero_()
        if not bool(dead_V.any()):
            return
        seed = self.seed * 1_000_003 + int(self.steps)
        vectors_Nc = _replacements(residuals, quantizer.vocab_size, seed)
        moved_V = quantizer.restart_codes(dead_V, self._from_first_process(vectors_Nc))
        self.averaged.quantizer.codebook_Vc[moved_V] = quantizer.codebook_Vc[moved_V]
        for moments in optimizer.state.get(quantizer.codebook_Vc, {}).values():
            if moments.shape == quantizer.codebook_Vc.shape:
                moments[moved_V] = 0

    def _summed(self, counts: Tensor) -> Tensor:
        if self._world_size > 1:
            torch.distributed.all_reduce(counts)
        return counts

    def _from_first_process(self, vectors: Tensor) -> Tensor:
        if self._world_size > 1:
            torch.distributed.broadcast(vectors, src=0)
        return vectors

    @property
    def _world_size(self) -> int:
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _replacements(residuals: Sequence[Tensor], count: int, seed: int) -> Tensor:
    """Up to `count` looked-up vectors (count, c), drawn without repeats, in turn from every scale.

    Equal turns keep the few vectors of the coarse scales from drowning among the finest scale's.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = [vectors[torch.randperm(len(vectors), generator=generator).to(vectors.device)] for vectors in residuals]
    turns_N = torch.cat([torch.arange(len(vectors_Nc)) for vectors_Nc in shuffled])
    order_N = turns_N.argsort(stable=True)[:count]
    return torch.cat(shuffled)[order_N.to(residuals[0].device)].contiguous()
