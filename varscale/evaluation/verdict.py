"""The verdict on a tokenizer: whether models should be trained on its tokens, by the figures that were measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from varscale.config import TokenizerConfig
from varscale.errors import TokenizerRejected
from varscale.store.layout import RunFiles
from varscale.store.records import read_result

HARDLY_BETTER = 0.9
"""Share of the mean picture's squared error above which reconstructions say next to nothing about their images."""
GOOD = 0.1
"""Share of it below which few codes are no fault: simple images need no more."""
FEW_CODES = 3.0
"""A scale of several tokens whose perplexity is below this, or below a quarter of a small codebook, has collapsed."""
LEAST_USAGE = 0.05
"""Share of the codes that could be used below which a codebook has collapsed."""
LEAST_BIT_ENTROPY = 0.3
"""Of a bit of bitwise tokens, on average over bits and scales, below which they have collapsed: 5 in 100 are the other
value."""


@dataclass(frozen=True)
class Fault:
    """Something that speaks against training models on a tokenizer."""

    what: str
    """In plain words, with the figures."""
    helps: tuple[str, ...]
    """What to change."""


def tokenizer_faults(figures: Mapping[str, float], settings: TokenizerConfig) -> list[Fault]:
    """What speaks against a tokenizer; nothing, if it is fit for use.

    A scale of a single token may use one code: what the mean of an image says may be said by the next scale. Few codes
    are a fault of the others only where images are not reconstructed well. Of bitwise tokens the share of codes in use
    is not judged, since most of 2^d corners stay empty however good they are, nor whether there are vectors enough for
    all codes, since none is learnt; what is judged is how evenly their bits are set.

    Args:
        figures: What `ReconstructionMeter` measured on validation images and, where the tokenizer was trained here,
            `feature_vectors`: of how many vectors its training images consist. Figures that are missing aren't judged.
        settings: The tokenizer's.
    """
    training, bitwise = settings.training, settings.quantizer == "bitwise"
    retrain = (
        *(("tokenizer.training.quantize_after 0.2",) if training.quantize_after < 0.1 else ()),
        f"a lower tokenizer.training.lr (now {training.lr:g})",
        f"more tokenizer.training.images (now {training.images:,})",
    )
    fewer_codes = f"a smaller tokenizer.vocab_size (now {settings.vocab_size:,})"
    if bitwise:
        fewer_codes = f"a larger tokenizer.entropy_weight (now {settings.entropy_weight:g})"
    if settings.checkpoint is not None:
        retrain, fewer_codes = ("a tokenizer.checkpoint that was trained on such images",), ""
    found = []
    mean_picture, vectors = figures.get("mean_picture_error", 0.0), figures.get("feature_vectors")
    if mean_picture > 0:  # otherwise the images are all alike, and say nothing about a tokenizer
        share = figures["mean_squared_error"] / mean_picture
        if lost := share > HARDLY_BETTER:
            better = "no" if share >= 1 else "hardly"
            text = f"reconstructions are {better} better than one mean picture ({_errors(figures)})"
            found.append(Fault(text, retrain))
        poor = [
            f"{perplexity:.2f} at scale {scale}"
            for scale, (side, perplexity) in enumerate(_perplexities(figures, settings), start=1)
            if perplexity < min(FEW_CODES, settings.vocab_size / 4) and (side > 1 or lost)
        ]
        if poor and share > GOOD:
            text = f"scales use a handful of codes (perplexity {', '.join(poor)})"
            found.append(Fault(text, (*retrain, fewer_codes)))
        if bitwise and figures.get("bit_entropy", 1.0) < LEAST_BIT_ENTROPY and share > GOOD:
            text = f"bits hardly change (an entropy of {figures['bit_entropy']:.2f} of 1 bit)"
            found.append(Fault(text, (*retrain, fewer_codes)))
        if not bitwise and figures["codebook_usage"] < LEAST_USAGE and share > GOOD:
            text = f"{figures['codebook_usage']:.1%} of the codes that the images could use are used"
            found.append(Fault(text, (*retrain, fewer_codes)))
    if vectors is not None and settings.vocab_size > vectors and not bitwise:
        text = f"there are {settings.vocab_size:,} codes, and {vectors:,.0f} vectors in the training images"
        found.append(Fault(text, (fewer_codes, "more training images")))
    return found


def recorded_faults(files: RunFiles, settings: TokenizerConfig) -> list[Fault] | None:
    """What speaks against a finished tokenizer; None where it was not measured."""
    result = read_result(files)
    return None if result is None else tokenizer_faults(result.metrics, settings)


def check_tokenizer(files: RunFiles, settings: TokenizerConfig) -> None:
    """Nothing, where a finished tokenizer is fit for use, or accepted as it is, or not measured yet.

    Raises:
        TokenizerRejected: It should not be trained on.
    """
    faults = [] if settings.accept else recorded_faults(files, settings)
    if faults:
        helps = dict.fromkeys(text for fault in faults for text in fault.helps if text)
        raise TokenizerRejected(
            f"{files.folder}: no model should be trained on this tokenizer: {'; '.join(each.what for each in faults)}. "
            f"What may help: {', '.join(helps)}. tokenizer.accept: true goes on regardless"
        )


def described(files: RunFiles, settings: TokenizerConfig) -> str:
    """A finished tokenizer's figures in a line, and in another one what speaks against it; "" where there are none."""
    result = read_result(files)
    if result is None or "mean_picture_error" not in result.metrics:
        return ""
    figures = result.metrics
    perplexities = ", ".join(f"{perplexity:.3g}" for _, perplexity in _perplexities(figures, settings))
    used = f"{figures['codebook_usage']:.0%} of the codes used"
    if "bit_entropy" in figures:
        used = f"an entropy of {figures['bit_entropy']:.2f} of 1 bit"
    line = f"tokenizer: PSNR {figures['psnr']:.1f} dB, {_errors(figures)}, {used}, perplexity by scale {perplexities}"
    faults = tokenizer_faults(figures, settings)
    return "\n".join([line, *(f"accepted although {fault.what}" for fault in faults)])


def _errors(figures: Mapping[str, float]) -> str:
    ours, mean_picture = figures["mean_squared_error"], figures["mean_picture_error"]
    return f"mean squared error {ours:.4f}, the mean picture's {mean_picture:.4f}"


def _perplexities(figures: Mapping[str, float], settings: TokenizerConfig) -> list[tuple[int, float]]:
    """Side and perplexity of each scale."""
    return [(side, figures[f"codebook_perplexity_scale_{k}"]) for k, side in enumerate(settings.patch_nums, start=1)]
