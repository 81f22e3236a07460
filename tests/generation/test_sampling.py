import itertools
import math
from typing import Any

import pytest
import torch
from small_models import make_tokenizer, make_var
from torch.utils.flop_counter import FlopCounterMode

from varscale.families.base import SamplingOptions
from varscale.families.models import draw, smooth_weights
from varscale.families.shared.predictor import ScalePredictor
from varscale.families.var.transformer import VAR
from varscale.generation.bulk import labels_in_turn
from varscale.generation.sampling import sample, sample_with
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


@pytest.fixture(scope="module")
def models() -> tuple[VAR, MultiScaleTokenizer]:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(vocab_size=16, base_channels=8, norm_groups=4)
    tokenizer.quantizer.initialise_codes(torch.randn(64, 4))
    var = make_var(vocab_size=16, adaln_gamma_init=1.0, init_std=0.3, head_init=1.0)
    return var, tokenizer


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("cfg", [0.0, 3.0])
def test_logits_equal_guided_teacher_forcing(
    models: tuple[VAR, MultiScaleTokenizer], use_cache: bool, cfg: float
) -> None:
    var, tokenizer = models
    labels = torch.tensor([1, 4, 0])
    tokens = [torch.randint(16, (3, side**2)) for side in var.config.patch_nums]
    with torch.no_grad():
        inputs = tokenizer.next_scale_inputs(tokens)
        conditional, unconditional = var(labels, inputs), var(torch.full((3,), 5), inputs)
        predictor, total, following = ScalePredictor(var, labels, cfg, use_cache=use_cache), None, None
        for k, (begin, end) in enumerate(var.scale_bounds):
            t = cfg * k / 2
            expected = (1 + t) * conditional[:, begin:end] - t * unconditional[:, begin:end]
            torch.testing.assert_close(predictor.predict(following), expected, atol=1e-4, rtol=1e-5)
            total, following = tokenizer.quantizer.accumulate(total, tokens[k], k)


def test_cached_and_uncached_samples_agree(models: tuple[VAR, MultiScaleTokenizer]) -> None:
    labels = torch.tensor([0, 1, 2, 5])
    cached, uncached = (sample(*models, labels, seed=3, use_cache=use) for use in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(cached.tokens, uncached.tokens, strict=True))
    assert [tuple(t.shape) for t in cached.tokens] == [(4, 1), (4, 4), (4, 9)]
    assert cached.images.shape == (4, 3, 6, 6)
    assert cached.images.min() >= 0
    assert cached.images.max() <= 1
    torch.testing.assert_close(cached.images, (models[1].decode(cached.tokens) + 1) / 2)


def test_an_image_depends_on_seed_and_index_not_on_its_batch(models: tuple[VAR, MultiScaleTokenizer]) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    whole = torch.cat(sample(*models, labels, seed=3).tokens, 1)
    part = sample(*models, labels[4:], seed=3, sample_indices=torch.tensor([4, 5]))
    assert torch.equal(torch.cat(part.tokens, 1), whole[4:])
    assert not torch.equal(torch.cat(sample(*models, labels, seed=4).tokens, 1), whole)
    assert not torch.equal(whole[0], whole[5])  # the same label, another index


def test_first_scale_skips_only_the_head_of_the_branch_without_class(
    models: tuple[VAR, MultiScaleTokenizer],
) -> None:
    var, _ = models
    flops = []
    for cfg in (0.0, 1.5):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            predictor = ScalePredictor(var, torch.tensor([1]), cfg)
            predictor.predict(None)
        flops.append(counter.get_total_flops())
        assert predictor.caches is not None
        assert all(cache.length == 1 for cache in predictor.caches)
    head = 4 * var.config.width**2 + 2 * var.config.width * var.config.vocab_size
    assert flops[1] == 2 * flops[0] - head


def allowed_by_brute_force(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """The smallest set of likeliest tokens that reaches top_p, among the top_k likeliest."""
    order = sorted(range(len(logits)), key=lambda index: -logits[index])
    kept = order[:top_k] if top_k else order
    if not top_p:
        return set(kept)
    weights = [math.exp(logits[index]) for index in kept]
    reached = itertools.accumulate(weight / sum(weights) for weight in weights)
    return set(kept[: next(n for n, total in enumerate(reached, 1) if total >= top_p - 1e-7)])


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.8, 1.0])
def test_tokens_are_drawn_with_their_probability(top_k: int, top_p: float) -> None:
    count = 20_000
    grid = (torch.arange(count) + 0.5) / count
    for logits in torch.randn(4, 9) * 2:
        allowed = allowed_by_brute_force(logits.tolist(), top_k, top_p)
        weights = torch.tensor([math.exp(x) if i in allowed else 0.0 for i, x in enumerate(logits.tolist())])
        drawn = draw(logits.expand(1, count, 9), grid[None], top_k=top_k, top_p=top_p)[0]
        frequencies = torch.bincount(drawn, minlength=9) / count
        torch.testing.assert_close(frequencies, weights / weights.sum(), atol=3 / count, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.999}])
def test_the_ends_of_the_distribution_are_never_overrun(settings: dict[str, float]) -> None:
    logits = torch.full((1, 2, 4096), -torch.inf)
    logits[..., [7, 9]] = torch.tensor([0.1, 0.0])
    assert draw(logits, torch.tensor([[0.0, 1 - 2**-24]]), **settings).tolist() == [[7, 9]]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    count, logits = 20_000, torch.randn(9) * 2
    grid = (torch.arange(count) + 0.5) / count
    weights = torch.tensor([math.exp(x / temperature) for x in logits.tolist()])
    drawn = draw(logits.expand(1, count, 9), grid[None], temperature=temperature)[0]
    frequencies = torch.bincount(drawn, minlength=9) / count
    torch.testing.assert_close(frequencies, weights / weights.sum(), atol=3 / count, rtol=0)


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("top_p", [0.0, 0.8])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_smooth_weights_are_the_references(top_k: int, top_p: float, progress: float) -> None:
    """Each number by hand, as in `autoregressive_infer_cfg`; the noise is that of the tokens' ranks if they are cut."""
    uniform = torch.randint(2**24, (1, 4, 9)) * 2.0**-24
    logits = torch.randn(1, 4, 9)
    weights = smooth_weights(logits, uniform, progress, top_k=top_k, top_p=top_p)
    tau = max(0.27 * (1 - progress * 0.95), 0.005)
    for place in range(4):
        values = logits[0, place].tolist()
        allowed = allowed_by_brute_force(values, top_k, top_p)
        order = sorted(range(9), key=lambda token: -values[token]) if top_k or top_p else list(range(9))
        noise = {token: -math.log(-math.log(uniform[0, place, n] + 2**-25)) for n, token in enumerate(order)}
        powers = {token: (values[token] * (1 + progress) + noise[token]) / tau for token in allowed}
        most = max(powers.values())
        total = sum(math.exp(power - most) for power in powers.values())
        expected = [math.exp(powers[token] - most) / total if token in allowed else 0.0 for token in range(9)]
        torch.testing.assert_close(weights[0, place], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_smoothed_tokens_are_gumbel_draws_of_sharper_logits(models: tuple[VAR, MultiScaleTokenizer]) -> None:
    """The heaviest code of a Gumbel softmax is a draw from the softmax, here of (1 + progress)·logits."""
    count, logits = 20_000, torch.randn(5)
    weights = smooth_weights(
        logits.expand(1, count, 5), uniform(0, "test", 0, torch.arange(1), 5 * count).view(1, -1, 5), 0.5
    )
    frequencies = weights.argmax(-1)[0].bincount(minlength=5) / count
    torch.testing.assert_close(frequencies, (1.5 * logits).softmax(0), atol=4 * 0.5 / count**0.5, rtol=0)


def test_a_smooth_image_is_decoded_from_mixtures_and_depends_on_its_index_alone(
    models: tuple[VAR, MultiScaleTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, options = torch.tensor([0, 1, 2, 3]), SamplingOptions(seed=3, smooth=True)
    whole = sample_with(*models, labels, options)
    for at_once in (1, 2**30):
        monkeypatch.setattr("varscale.families.var.sampling.SMOOTHED_NUMBERS", at_once)
        part = sample_with(*models, labels[2:], options, torch.tensor([2, 3]))
        torch.testing.assert_close(part.images, whole.images[2:], atol=1e-5, rtol=0)
        assert torch.equal(torch.cat(part.tokens, 1), torch.cat(whole.tokens, 1)[2:])
    assert (models[1].decode(whole.tokens) / 2 + 0.5 - whole.images).abs().max() > 1e-3
    # one code has all the weight where all others are cut: then it is the greedy image
    greedy = sample_with(*models, labels, SamplingOptions(top_k=1))
    smooth = sample_with(*models, labels, SamplingOptions(top_k=1, smooth=True))
    torch.testing.assert_close(smooth.images, greedy.images, atol=1e-5, rtol=0)


def test_constant_guidance_is_the_same_at_all_scales(models: tuple[VAR, MultiScaleTokenizer]) -> None:
    var, tokenizer = models
    labels, none = torch.tensor([1, 4]), torch.full((2,), 5)
    tokens = [torch.randint(16, (2, side**2)) for side in var.config.patch_nums]
    with torch.no_grad():
        inputs = tokenizer.next_scale_inputs(tokens)
        expected = 3 * var(labels, inputs) - 2 * var(none, inputs)
        predictor, total, following = ScalePredictor(var, labels, 2.0, schedule="constant"), None, None
        for k, (begin, end) in enumerate(var.scale_bounds):
            torch.testing.assert_close(predictor.predict(following), expected[:, begin:end], atol=1e-4, rtol=1e-5)
            total, following = tokenizer.quantizer.accumulate(total, tokens[k], k)


def test_sampling_under_bfloat16_is_nearly_the_same(models: tuple[VAR, MultiScaleTokenizer]) -> None:
    """As on a GPU: not the bits, but most tokens of the first scales."""
    labels = labels_in_turn(range(5), 40)
    exact = sample_with(*models, labels, SamplingOptions())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sample_with(*models, labels, SamplingOptions())
    assert rounded.images.dtype == torch.float32
    assert (exact.tokens[0] == rounded.tokens[0]).float().mean() > 0.9


def test_modes_are_restored_part_by_part(models: tuple[VAR, MultiScaleTokenizer]) -> None:
    var, tokenizer = models
    var.train()
    tokenizer.train()
    tokenizer.encoder.eval()
    with pytest.raises(ValueError, match="labels"):
        sample(var, tokenizer, torch.tensor([9]))
    sample(var, tokenizer, torch.tensor([1]))
    assert var.training
    assert tokenizer.training
    assert tokenizer.decoder.training
    assert not tokenizer.encoder.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.tensor([6])}, r"0 … 4 \(5 for no class\), not 6 … 6"),
        ({"labels": torch.tensor([-1])}, "not -1"),
        ({"labels": torch.tensor([0.5])}, "integers"),
        ({"top_p": 1.5}, "top_p in .* 1.5"),
        ({"cfg": -1.0}, "cfg.* -1.0"),
    ],
)
def test_bad_arguments_are_named(
    models: tuple[VAR, MultiScaleTokenizer], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(*models, **({"labels": torch.tensor([0])} | arguments))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and above 0, not 0.0"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e-30}, "temperature .* from 1e-06 to 1e"),
        ({"guidance": 1e30}, "not 1e.30; at most 1e"),
        ({"guidance_schedule": "rampp"}, "must be ramp or constant, not rampp"),
        ({"guidance": -0.5}, "not -0.5"),
    ],
)
def test_bad_options_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**settings)


def test_a_foreign_tokenizer_is_refused(models: tuple[VAR, MultiScaleTokenizer]) -> None:
    other = make_tokenizer(vocab_size=17)
    with pytest.raises(ValueError, match="vocab_size 16, but the tokenizer 17"):
        sample(models[0], other, torch.tensor([0]))
