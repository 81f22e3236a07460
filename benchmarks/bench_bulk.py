"""Sampling in bulk: ours against the plain VAR and its way of decoding, and 1,000 images of the rings study."""

import statistics

import torch

from benchmarks.measuring import Goal, Options, Report, in_turns, median_ratio, rate
from benchmarks.plain_var import AttentionBy, PlainVAR
from benchmarks.studies import Size, experiment_130, rings, trunk_of, untrained_tokenizer
from varscale.config import Experiment
from varscale.families.base import SamplingOptions
from varscale.families.models import pictures
from varscale.families.var.sampling import sample_features
from varscale.families.var.transformer import VAR
from varscale.generation.bulk import drawn_batches, labels_in_turn
from varscale.numerics.device import best_device
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

BATCH = 64
GUIDANCE = 1.5
SIZE, QUICK_SIZE = Size(8, 64, 8), Size(2, 16, 2)
GOAL, DECODER_GOAL, RINGS_SECONDS = 2.0, 1.0, 60.0
RINGS_IMAGES, RINGS_DEPTH = 1000, 20


def run(options: Options) -> Report:
    size, batch = (QUICK_SIZE, 4) if options.quick else (SIZE, BATCH)
    report = Report(
        "bulk",
        f"Sampling in bulk: {size.title}, 130 tokens, batches of {batch}, guidance {GUIDANCE}",
        ("what", "way", "images/s", "ratio"),
    )
    _against_plain(size, batch, options, report)
    _rings(options, report)
    report.notes = [
        "plain: benchmarks/plain_var.py sampling as the reference does, with its key-value cache, the logits of both "
        "branches and torch.multinomial; ratios are against the faster of two ways of attention.",
        "whole batch: the decoder called once for the whole batch, as the reference does.",
    ]
    return report


def _against_plain(size: Size, batch: int, options: Options, report: Report) -> None:
    experiment = experiment_130(size)
    var, tokenizer = _models(experiment, size.depth)
    device = best_device()
    ways: tuple[AttentionBy, ...] = ("products", "library")
    plain = {f"plain, attention by {by}": PlainVAR(var, tokenizer.quantizer, by, 0.0).to(device) for by in ways}
    var, tokenizer = var.to(device), tokenizer.to(device)
    labels_B = labels_in_turn(range(experiment.data.num_classes), batch).to(device)
    indices_B = torch.arange(batch, device=device)

    def ours(use_cache: bool) -> float:
        drawing = SamplingOptions(GUIDANCE, use_cache=use_cache)
        return rate(lambda: float(sample_features(var, tokenizer, labels_B, drawing, indices_B)[0].sum()), batch, 1)

    works = {name: lambda model=model: _plain_rate(model, labels_B) for name, model in plain.items()}
    works |= {"ours": lambda: ours(True), "ours, without a cache": lambda: ours(False)}
    speeds = in_turns(works, options.rounds(5))
    fastest = max(plain, key=lambda name: statistics.median(speeds[name]))
    for name, values in speeds.items():
        report.rows.append(("tokens", name, statistics.median(values), median_ratio(values, speeds[fastest])))
    ratio = median_ratio(speeds["ours"], speeds[fastest])
    report.goals.append(Goal(f"tokens at least {GOAL} × plain", f"{ratio:.2f} ×", ratio >= GOAL))

    features_BChw, _ = sample_features(var, tokenizer, labels_B, SamplingOptions(GUIDANCE), indices_B)
    with torch.no_grad():
        decoders = {
            "whole batch": lambda: rate(lambda: float(tokenizer.decode_features(features_BChw).sum()), batch, 1),
            "ours": lambda: rate(lambda: float(pictures(tokenizer, features_BChw).sum()), batch, 1),
        }
        speeds = in_turns(decoders, options.rounds(5))
    for name, values in speeds.items():
        ratio = median_ratio(values, speeds["whole batch"])
        report.rows.append(("decoder", name, statistics.median(values), ratio))
    report.goals.append(
        Goal(
            f"the decoder at least {DECODER_GOAL} × one call for the whole batch",
            f"{ratio:.2f} ×",
            ratio >= DECODER_GOAL,
        )
    )


def _rings(options: Options, report: Report) -> None:
    """The largest size of the study, tokens and decoder."""
    depth, images = (2, 4) if options.quick else (RINGS_DEPTH, RINGS_IMAGES)
    experiment = rings()
    var, tokenizer = (model.to(best_device()) for model in _models(experiment, depth))
    labels_N = labels_in_turn(range(experiment.data.num_classes), images)

    def draw() -> int:
        return sum(
            int(batch[0, 0, 0, 0]) for batch in drawn_batches(var, tokenizer, labels_N, SamplingOptions(GUIDANCE))
        )

    speeds = in_turns({"ours": lambda: rate(draw, images, 1)}, options.rounds(2))["ours"]
    seconds = RINGS_IMAGES / statistics.median(speeds)
    report.rows.append((f"rings, depth {depth}, whole images", "ours", statistics.median(speeds), 1.0))
    goal = f"{RINGS_IMAGES:,} rings images of depth {depth} in under {RINGS_SECONDS:.0f} s"
    report.goals.append(Goal(goal, f"{seconds:.1f} s", seconds < RINGS_SECONDS))


def _plain_rate(model: PlainVAR, labels_B: torch.Tensor) -> float:
    return rate(lambda: float(model.sample(labels_B, GUIDANCE)[0].sum()), len(labels_B), 1)


def _models(experiment: Experiment, depth: int) -> tuple[VAR, MultiScaleTokenizer]:
    tokenizer = untrained_tokenizer(experiment)
    description = trunk_of(experiment, depth).model
    var = description.implementation().build(description).eval()
    assert isinstance(var, VAR)
    return var, tokenizer
