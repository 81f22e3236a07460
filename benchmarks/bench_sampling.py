"""Sampling with and without the key-value cache, at the paper's ten scales, with guidance.

Without a cache there are two ways: pass the scales so far at each scale, or, with the forward pass of training as it
is, the whole sequence.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring import Goal, Options, Report, in_turns, median_ratio, rate
from benchmarks.plain_var import PlainVAR
from varscale.config.tokenizer import TokenizerArchitecture
from varscale.families.var.config import VARConfig
from varscale.families.var.transformer import VAR
from varscale.generation.sampling import sample
from varscale.numerics.device import best_device
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
BATCH = 2
NUM_CLASSES = 10
GOAL = 3.0


def run(options: Options) -> Report:
    depth, width, heads = (2, 32, 2) if options.quick else (8, 256, 8)
    report = Report(
        "sampling",
        f"Sampling {BATCH} images: depth {depth} width {width} heads {heads}, 10 scales, 680 tokens, guidance 1.5",
        ("way", "images/s", "seconds an image", "FLOPs an image", "against uncached"),
    )
    torch.manual_seed(0)
    architecture = TokenizerArchitecture(
        patch_nums=PATCH_NUMS, vocab_size=512, latent_channels=16, base_channels=16, channel_multipliers=(1, 1, 2),
        residual_blocks=1, attention=False, norm_groups=8,
    )  # fmt: skip
    tokenizer = MultiScaleTokenizer(architecture).eval()
    torch.nn.init.normal_(tokenizer.quantizer.codebook_Vc)
    config = VARConfig(
        patch_nums=PATCH_NUMS, vocab_size=512, latent_channels=16, num_classes=NUM_CLASSES, depth=depth, width=width,
        heads=heads,
    )  # fmt: skip
    device = best_device()
    var, tokenizer = VAR(config).to(device).eval(), tokenizer.to(device)
    labels_B = torch.arange(BATCH, device=device)

    def speed(use_cache: bool) -> float:
        def draw() -> float:
            return float(sample(var, tokenizer, labels_B, cfg=1.5, use_cache=use_cache).images[0, 0, 0, 0])

        return rate(draw, BATCH, 1)

    plain = PlainVAR(var.cpu(), tokenizer.quantizer, "library", label_dropout=0.0).to(device)
    var.to(device)
    works = {
        "cached": lambda: speed(True),
        "uncached, scales so far": lambda: speed(False),
        "uncached, whole sequence": lambda: rate(lambda: _sample(var, tokenizer, labels_B, whole=True), BATCH, 1),
        "plain VAR, scales so far": lambda: rate(lambda: _sample(plain, tokenizer, labels_B, whole=False), BATCH, 1),
    }
    speeds = in_turns(works, options.rounds(5))
    whole = 2 * len(PATCH_NUMS) * config.forward_flops()
    so_far = config.sampling_flops(cache=False)
    for way, values in speeds.items():
        flops = {"cached": config.sampling_flops(), "uncached, whole sequence": whole}.get(way, so_far)
        row = (statistics.median(values), 1 / statistics.median(values), float(flops))
        report.rows.append((way, *row, median_ratio(values, speeds["uncached, scales so far"])))
    for way in ("uncached, whole sequence", "uncached, scales so far"):
        ratio = median_ratio(speeds["cached"], speeds[way])
        report.goals.append(Goal(f"cached at least {GOAL} × {way}, at 10 scales", f"{ratio:.2f} ×", ratio >= GOAL))
    bound = so_far / config.sampling_flops()
    report.notes = [
        f"the scales so far, anew at each scale, are {bound:.2f} × the FLOPs of cached: more is only possible "
        "where the long passes are also less efficient.",
        "drawing tokens and decoding to 64 × 64 pixels included.",
    ]
    return report


@torch.no_grad()
def _sample(
    model: Callable[[Tensor, Tensor], Tensor], tokenizer: MultiScaleTokenizer, labels_B: Tensor, *, whole: bool
) -> float:
    """Guided sampling without a cache, by passes over all tokens so far or over the whole sequence, zeros to come."""
    scales, batch = len(PATCH_NUMS), len(labels_B)
    both_B = torch.cat((labels_B, torch.full_like(labels_B, NUM_CLASSES)))
    inputs_BMc = torch.zeros(batch, 0, tokenizer.latent_channels, device=labels_B.device)
    features_hat_BChw = None
    for k, side in enumerate(PATCH_NUMS):
        ends = inputs_BMc.shape[1] + 1
        missing = sum(each**2 for each in PATCH_NUMS) - ends if whole else 0
        logits_BLV = model(both_B, F.pad(inputs_BMc, (0, 0, 0, missing)).repeat(2, 1, 1))
        conditional_BMV, unconditional_BMV = logits_BLV[:, ends - side**2 : ends].chunk(2)
        guidance = 1.5 * k / (scales - 1)
        probability_BMV = ((1 + guidance) * conditional_BMV - guidance * unconditional_BMV).softmax(dim=2)
        tokens_BM = torch.multinomial(probability_BMV.flatten(0, 1), 1).view(batch, -1)
        features_hat_BChw, next_BMc = tokenizer.quantizer.accumulate(features_hat_BChw, tokens_BM, k)
        if next_BMc is not None:
            inputs_BMc = torch.cat((inputs_BMc, next_BMc), dim=1)
    assert features_hat_BChw is not None
    return float(tokenizer.decode_features(features_hat_BChw)[0, 0, 0, 0])
