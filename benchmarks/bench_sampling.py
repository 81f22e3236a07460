"""Sampling with and without the key-value cache, at the paper's ten scales, with guidance."""

import statistics

import torch

from benchmarks.measuring import Goal, Options, Report, in_turns, median_ratio, rate
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

    speeds = in_turns({"cached": lambda: speed(True), "uncached": lambda: speed(False)}, options.rounds(7))
    for way, values in speeds.items():
        median = statistics.median(values)
        flops = float(shape.sampling_flops(cache=way == "cached"))
        report.rows.append((way, median, 1 / median, flops, median_ratio(values, speeds["uncached"])))
    ratio = median_ratio(speeds["cached"], speeds["uncached"])
    report.goals.append(
        Goal(f"cached sampling at least {GOAL} × uncached at 10 scales", f"{ratio:.2f} ×", ratio >= GOAL)
    )
    report.notes = ["drawing tokens and decoding to 64 × 64 pixels included."]
    return report
