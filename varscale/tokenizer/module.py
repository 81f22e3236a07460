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

from varscale.config.tokenizer import TokenizerArchitecture, TokenizerTraining
from varscale.evaluation.codebook import count_codes
from varscale.evaluation.perceptual import load_lpips
from varscale.tokenizer.autoencoder import MultiScaleTokenizer, TokenizerOutput
from varscale.tokenizer.bitwise import BitwiseQuantizer
from varscale.tokenizer.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from varscale.training.callbacks import ScheduleCallback, check_finite
from varscale.training.schedules import Schedule


class TokenizerModule(LightningModule):
    """Tokenizer, its averaged copy and, where its weight is not 0, the discriminator.

    Batches are dicts with `images_B3HW` in [-1, 1]. Everything that is measured or used later (validation, tokens,
    decoding) comes from the averaged copy, `averaged`. A device's share of a step passes in parts of `micro_batch`
    images, 0 at once; parts change nothing but rounding and the adversarial term's weight, which each finds for itself.
    The learning rate of each step is set by `ScheduleCallback`, which the module brings to its trainer.
    With a discriminator on several devices the trainer's strategy must be `ddp_find_unused_parameters_true`, since the
    discriminator does nothing before its start.
    """

    def __init__(
        self, architecture: TokenizerArchitecture, training: TokenizerTraining, *, log_every_steps: int = 20
    ) -> None:
        """Build the tokenizer with the settings' seed.

        Raises:
            ValueError: the images are too small for the discriminator, or what `load_lpips` and `Schedule` refuse.
        """
        super().__init__()
        self.automatic_optimization = False  # two optimizers
        self.settings, self.log_every_steps = (settings := training), log_every_steps
        settings.check_image_size(architecture.image_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.tokenizer = MultiScaleTokenizer(architecture)
            # a third faster on CPUs; PyTorch's stub lacks this overload
            self.tokenizer.to(memory_format=torch.channels_last)
            adversarial = settings.adversarial_weight > 0
            self.discriminator = PatchDiscriminator(settings.discriminator_channels) if adversarial else None
        self._averaged = AveragedModel(self.tokenizer, multi_avg_fn=get_ema_multi_avg_fn(settings.averaging_decay))
        self._averaged.requires_grad_(False)
        self.schedule = Schedule(
            "cosine",
            settings.lr,
            settings.batch_size,
            settings.warmup_images,
            settings.total_images,
            final_ratio=settings.final_lr_ratio,
        )
        self.quantize_from_step = round(settings.quantize_after * settings.total_images / settings.batch_size)
        # LPIPS is frozen and rebuilt from its file: kept out of the modules, hence out of checkpoints and DDP
        path = settings.perceptual_weights_path
        self._lpips = [load_lpips(Path(path))] if path else []
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usage_V", torch.zeros(architecture.vocab_size, dtype=torch.int64))

    steps: Tensor
    usage_V: Tensor

    @property
    def averaged(self) -> MultiScaleTokenizer:
        """The averaged tokenizer: the one to use."""
        return cast(MultiScaleTokenizer, self._averaged.module)

    @property
    def images_seen(self) -> int:
        """Images of all finished steps; the trainer's own step count counts both optimizers."""
        return int(self.steps) * self.settings.batch_size

    def configure_callbacks(self) -> list[ScheduleCallback]:
        """The learning rate's schedule."""
        return [ScheduleCallback(self.schedule)]

    def configure_optimizers(self) -> list[AdamW]:
        """AdamW for the tokenizer and, where there is one, for the discriminator."""
        settings = self.settings
        trained = {name: p for name, p in self.tokenizer.named_parameters() if p.requires_grad}
        plain = {name for name, p in trained.items() if p.ndim <= 1 or name == "quantizer.codebook_Vc"}
        decayed, rest = ([p for name, p in trained.items() if (name in plain) is kind] for kind in (False, True))
        models: list[Any] = [[{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest}]]
        if self.discriminator is not None:
            models.append(self.discriminator.parameters())
        return [AdamW(params, settings.lr, settings.betas, weight_decay=0.0, fused=True) for params in models]

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """One step of the tokenizer, then one of the discriminator where it has set in."""
        images_B3HW = batch["images_B3HW"].contiguous(memory_format=torch.channels_last)
        if int(self.steps) == self.quantize_from_step:
            self._initialise_codes(images_B3HW)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        quantizes = int(self.steps) >= self.quantize_from_step
        parts = images_B3HW.split(self.settings.micro_batch or len(images_B3HW))
        optimizers[0].zero_grad()
        outputs, figures = zip(
            *(self._add_gradient(part_b3HW, len(part_b3HW) / len(images_B3HW), quantizes) for part_b3HW in parts),
            strict=True,
        )
        nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.settings.grad_clip, foreach=True)
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

    @property
    def _adversarial(self) -> bool:
        return (
            self.discriminator is not None
            and self.images_seen >= self.settings.adversarial_start * self.settings.total_images
        )

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
        reconstruction = self.settings.l1_weight * l1 + self.settings.l2_weight * l2
        figures = {"train_l1": l1.detach(), "train_l2": l2.detach(), "train_quantizer": output.quantizer_loss.detach()}
        if self._lpips and self.settings.perceptual_weight > 0:
            perceptual = self._lpips[0].to(self.device)(output.reconstruction_B3HW, images_B3HW).mean()
            reconstruction = reconstruction + self.settings.perceptual_weight * perceptual
            figures["train_lpips"] = perceptual.detach()
        loss = reconstruction + output.quantizer_loss
        if self._adversarial:
            assert self.discriminator is not None
            adversarial = generator_loss(self.discriminator(output.reconstruction_B3HW))
            weight = adaptive_weight(reconstruction, adversarial, self.tokenizer.decoder.output.weight)
            loss = loss + self.settings.adversarial_weight * weight * adversarial
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
        """Codes start as vectors of the data, of all scales alike, the same on every process; signs at their size."""
        quantizer, averaged = self.tokenizer.quantizer, self.averaged.quantizer
        parts = images_B3HW.split(self.settings.micro_batch or len(images_B3HW))
        features_BChw = torch.cat([self.tokenizer.features(part_b3HW) for part_b3HW in parts])
        if isinstance(quantizer, BitwiseQuantizer):
            quantizer.initialise_magnitudes(_of_first_process(features_BChw))
            averaged.get_parameter("magnitude_K").copy_(quantizer.magnitude_K)
            return
        vectors_Nc = _replacements(quantizer(features_BChw).residuals, quantizer.vocab_size, self.settings.seed)
        quantizer.initialise_codes(vectors_Nc, seed=self.settings.seed)
        averaged.codebook_Vc.copy_(quantizer.codebook_Vc)

    @torch.no_grad()
    def _keep_codes_alive(self, optimizer: Any, tokens: Sequence[Tensor], residuals: Sequence[Tensor]) -> None:
        """Count use over all processes; every so often move dead codes onto vectors of the data.

        None in the last fifth of training, so that the tokens settle. A moved code begins with fresh optimizer
        moments, and at once in the averaged copy: old averages of another code would be worse than none.
        """
        quantizer = self.tokenizer.quantizer
        if isinstance(quantizer, BitwiseQuantizer):
            return  # its codes can't be moved
        used_V = count_codes(tokens, quantizer.vocab_size).sum(0)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(used_V)
        self.usage_V += used_V
        if int(self.steps) % self.settings.restart_every_steps or self.images_seen > 0.8 * self.settings.total_images:
            return
        dead_V = self.usage_V < self.settings.restart_usage * self.usage_V.sum() / quantizer.vocab_size
        self.usage_V.zero_()
        if not bool(dead_V.any()):
            return
        seed = self.settings.seed * 1_000_003 + int(self.steps)
        vectors_Nc = _replacements(residuals, quantizer.vocab_size, seed)
        moved_V = quantizer.restart_codes(dead_V, vectors_Nc)
        self.averaged.quantizer.codebook_Vc[moved_V] = quantizer.codebook_Vc[moved_V]
        for moments in optimizer.state.get(quantizer.codebook_Vc, {}).values():
            if moments.shape == quantizer.codebook_Vc.shape:
                moments[moved_V] = 0


def _replacements(residuals: Sequence[Tensor], count: int, seed: int) -> Tensor:
    """Up to `count` of the first process's looked-up vectors (count, c), drawn without repeats, in turn by scale.

    Equal turns keep the few vectors of the coarse scales from drowning among the finest scale's.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = [vectors[torch.randperm(len(vectors), generator=generator).to(vectors.device)] for vectors in residuals]
    turns_N = torch.cat([torch.arange(len(vectors)) for vectors in shuffled])
    order_N = turns_N.argsort(stable=True)[:count]
    return _of_first_process(torch.cat(shuffled)[order_N.to(residuals[0].device)])


def _of_first_process(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, src=0)
    return tensor
