import itertools
import math

import pytest
import torch
from small_models import make_tokenizer, make_var
from torch.utils.flop_counter import FlopCounterMode

from varscale.families.models import draw
from varscale.families.var.sampling import ScalePredictor
from varscale.families.var.transformer import VAR
from varscale.generation.sampling import sample
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
    assert draw(logits, torch.tensor([[0.0, 1 - 2**-24]]), **settings).tolist() == [[7, 9]]  # type: ignore[arg-type]


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
        sample(*models, **({"labels": torch.tensor([0])} | arguments))  # type: ignore[arg-type]


def test_a_foreign_tokenizer_is_refused(models: tuple[VAR, MultiScaleTokenizer]) -> None:
    other = make_tokenizer(vocab_size=17)
    with pytest.raises(ValueError, match="vocab_size 16, but the tokenizer 17"):
        sample(models[0], other, torch.tensor([0]))
