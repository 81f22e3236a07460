"""Sampling with and without the key-value cache, at the paper's ten scales, with guidance."""

import statistics

import torch
from torch import Tensor

from benchmarks.measuring import Goal, Options, Report, in_turns, median_ratio, rate
from benchmarks.plain_var import PlainVAR
from varscale.accounting import VARShape
from varscale.generation.sampling import sample
from varscale.models.autoencoder import MultiScaleTokenizer
from varscale.training.numerics import build_var

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
BATCH = 2
GOAL = 3.0


def run(options: Options) -> Report:
    depth, width, heads = (2, 32, 2) if options.quick else (8, 256, 8)
    report = Report(
        "sampling",
        f"Sampling {BATCH} images: depth {depth} width {width} heads {heads}, 10 scales, 680 tokens, guidance 1.5",
        ("way", "images/s", "seconds an image", "FLOPs an image", "against uncached"),
    )
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(
        PATCH_NUMS, 512, 16, 16, channel_multipliers=(1, 1, 2), residual_blocks=1, attention=False, norm_groups=8
    ).eval()
    torch.nn.init.normal_(tokenizer.quantizer.codebook_Vc)
    shape = VARShape(PATCH_NUMS, 512, 16, 10, depth, width, heads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    var, tokenizer = build_var(shape).to(device).eval(), tokenizer.to(device)
    labels_B = torch.arange(BATCH, device=device)

    def speed(use_cache: bool) -> float:
        def draw() -> float:
            return float(sample(var, tokenizer, labels_B, cfg=1.5, use_cache=use_cache).images[0, 0, 0, 0])

        return rate(draw, BATCH, 1)

    plain = PlainVAR(var.cpu(), tokenizer.quantizer, "library", label_dropout=0.0).to(device)
    var.to(device)
    works = {
        "cached": lambda: speed(True),
        "uncached": lambda: speed(False),
        "plain VAR, uncached": lambda: rate(lambda: _sample_plainly(plain, tokenizer, labels_B), BATCH, 1),
    }
    speeds = in_turns(works, options.rounds(5))
    for way, values in speeds.items():
        median = statistics.median(values)
        flops = float(shape.sampling_flops(cache=way == "cached"))
        report.rows.append((way, median, 1 / median, flops, median_ratio(values, speeds["uncached"])))
    ratio = median_ratio(speeds["cached"], speeds["uncached"])
    report.goals.append(
        Goal(f"cached sampling at least {GOAL} × uncached at 10 scales", f"{ratio:.2f} ×", ratio >= GOAL)
    )
    bound = shape.sampling_flops(cache=False) / shape.sampling_flops(cache=True)
    report.notes = [
        f"uncached computes all scales so far anew at each, {bound:.2f} × the FLOPs of cached: more than that is only "
        "possible where the long passes are also less efficient.",
        "drawing tokens and decoding to 64 × 64 pixels included.",
    ]
    return report


@torch.no_grad()
def _sample_plainly(plain: PlainVAR, tokenizer: MultiScaleTokenizer, labels_B: Tensor) -> float:
    """Guided sampling with the plain model: at each scale one pass over all tokens so far."""
    scales, batch = len(PATCH_NUMS), len(labels_B)
    both_B = torch.cat((labels_B, torch.full_like(labels_B, plain.num_classes)))
    inputs_BMc = plain.codebook_Vc.new_zeros(batch, 0, plain.codebook_Vc.shape[1])
    features_hat_BChw = None
    for k, side in enumerate(PATCH_NUMS):
        conditional_BMV, unconditional_BMV = plain(both_B, inputs_BMc.repeat(2, 1, 1))[:, -(side**2) :].chunk(2)
        guidance = 1.5 * k / (scales - 1)
        probability_BMV = ((1 + guidance) * conditional_BMV - guidance * unconditional_BMV).softmax(dim=2)
        tokens_BM = torch.multinomial(probability_BMV.flatten(0, 1), 1).view(batch, -1)
        features_hat_BChw, next_BMc = tokenizer.quantizer.accumulate(features_hat_BChw, tokens_BM, k)
        if next_BMc is not None:
            inputs_BMc = torch.cat((inputs_BMc, next_BMc), dim=1)
    assert features_hat_BChw is not None
    return float(tokenizer.decode_features(features_hat_BChw)[0, 0, 0, 0])
