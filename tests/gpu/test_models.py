"""A GPU computes what the processor computes: models, random numbers, kernels for lower precision, compilation."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from small_models import PAPER, make_module, make_tokenizer, make_var, var_config
from torch import Tensor

from varscale.families.raster.config import RasterConfig
from varscale.families.raster.family import RasterTransformer
from varscale.families.shared.predictor import ScalePredictor
from varscale.families.shared.transformer import TokenTransformer
from varscale.families.var.transformer import VAR
from varscale.generation.sampling import sample
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

pytestmark = pytest.mark.gpu


SIZES = (PAPER, 512, 16, 5, 3, 192, 3)
# gates as large as the other modulation, so that the blocks matter from the start
LIVELY: dict[str, Any] = {"adaln_gamma_init": 1.0, "init_std": 0.05, "head_init": 1.0}
TOKENIZER = {"base_channels": 32, "channel_multipliers": (1, 1, 2), "attention": True, "norm_groups": 32}


def lively_var(**settings: Any) -> VAR:
    torch.manual_seed(0)
    return make_var(*SIZES, **{**LIVELY, **settings})


def paper_tokenizer() -> MultiScaleTokenizer:
    return make_tokenizer(PAPER, 512, 16, **TOKENIZER)


def inputs_for(var: TokenTransformer, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    later = var.config.tokens - var.first_tokens
    return torch.arange(batch), torch.randn(batch, later, var.config.latent_channels, generator=generator)


def logits_and_gradients(var: TokenTransformer, device: str, *, bfloat16: bool = False) -> list[Tensor]:
    """The logits, then the gradients of a loss that weights each logit differently."""
    var = copy.deepcopy(var).to(device)
    labels, inputs = (tensor.to(device) for tensor in inputs_for(var))
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        logits = var(labels, inputs)
    assert logits.dtype == torch.float32
    target = torch.arange(logits.shape[1], device=device) % var.config.vocab_size
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), target.expand(len(labels), -1)).backward()
    return [logits.detach().cpu(), *(p.grad.cpu() for p in var.parameters() if p.grad is not None)]


def assert_near(ours: list[Tensor], theirs: list[Tensor], share: float) -> None:
    """Each tensor's error is at most this share of its norm."""
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        assert (mine - yours).norm() <= share * yours.norm()


def test_random_numbers_are_those_of_the_processor() -> None:
    index = torch.tensor([0, 1, 2**40, 7])
    assert torch.equal(uniform(3, "sampling", 5, index.cuda(), 100).cpu(), uniform(3, "sampling", 5, index, 100))


VARIANTS: list[dict[str, Any]] = [{}, {"shared_adaln": True}, {"normalise_queries_keys": False}, {"block": "modern"}]


@pytest.mark.parametrize("settings", VARIANTS)
def test_float32_and_its_gradients(settings: dict[str, Any]) -> None:
    var = lively_var(**settings)
    assert_near(logits_and_gradients(var, "cuda"), logits_and_gradients(var, "cpu"), 1e-4)


@pytest.mark.parametrize("settings", VARIANTS)
def test_bfloat16_by_flash_kernels(settings: dict[str, Any]) -> None:
    var = lively_var(**settings)
    assert_near(logits_and_gradients(var, "cuda", bfloat16=True), logits_and_gradients(var, "cpu"), 0.03)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_next_tokens_by_causal_kernels(bfloat16: bool) -> None:
    torch.manual_seed(0)
    sizes = {**var_config(*SIZES, **LIVELY).model_dump(), "family": "raster", "patch_nums": (16,)}
    model = RasterTransformer(RasterConfig(**sizes))
    ours, theirs = logits_and_gradients(model, "cuda", bfloat16=bfloat16), logits_and_gradients(model, "cpu")
    assert_near(ours, theirs, 0.03 if bfloat16 else 1e-4)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_compiled_blocks(bfloat16: bool) -> None:
    var = lively_var()
    eager = logits_and_gradients(var, "cuda", bfloat16=bfloat16)
    model = make_module(var_config(*SIZES, **LIVELY), compiled=True).model
    model.load_state_dict(var.state_dict())
    var = cast(VAR, model)
    assert_near(logits_and_gradients(var, "cuda", bfloat16=bfloat16), eager, 0.03 if bfloat16 else 1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_sampling_sees_the_logits_of_training(use_cache: bool) -> None:
    var, tokenizer = lively_var().cuda(), paper_tokenizer().cuda()
    labels = torch.tensor([1, 4, 0], device="cuda")
    tokens = [torch.randint(512, (3, side**2), device="cuda") for side in PAPER]
    with torch.no_grad():
        inputs = tokenizer.next_scale_inputs(tokens)
        conditional, unconditional = var(labels, inputs), var(torch.full_like(labels, 5), inputs)
        predictor, total, following = ScalePredictor(var, labels, 3.0, use_cache=use_cache), None, None
        for k, (begin, end) in enumerate(var.scale_bounds):
            t = 3.0 * k / (len(PAPER) - 1)
            expected = (1 + t) * conditional[:, begin:end] - t * unconditional[:, begin:end]
            assert_near([predictor.predict(following)], [expected], 1e-4)
            total, following = tokenizer.quantizer.accumulate(total, tokens[k], k)


def test_samples_are_those_of_the_processor() -> None:
    var, tokenizer = lively_var(), paper_tokenizer()
    labels = torch.arange(4)
    ours, theirs = sample(var, tokenizer, labels), sample(var.cuda(), tokenizer.cuda(), labels.cuda())
    # a number that lies within rounding of the border between two tokens changes them and what follows: rare
    assert torch.equal(ours.tokens[0], theirs.tokens[0].cpu())
    same = torch.cat(ours.tokens, 1) == torch.cat(theirs.tokens, 1).cpu()
    assert same[:, :30].float().mean() > 0.95


@pytest.fixture
def _tf32() -> Iterator[None]:
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    matmul.fp32_precision = convolution.fp32_precision = "tf32"
    yield
    matmul.fp32_precision, convolution.fp32_precision = before


@pytest.mark.usefixtures("_tf32")
def test_lookups_are_exact_where_tf32_is_allowed() -> None:
    tokenizer = paper_tokenizer()
    features = torch.randn(16, 16, 16, 16)
    expected = tokenizer.quantizer.encode(features)
    found = tokenizer.quantizer.cuda().encode(features.cuda())
    different = torch.cat(found, 1).cpu() != torch.cat(expected, 1)
    assert different.float().mean() < 1e-3
    inputs = tokenizer.quantizer.next_scale_inputs(found)
    theirs = tokenizer.quantizer.cpu().next_scale_inputs([tokens.cpu() for tokens in found])
    assert_near([inputs.cpu()], [theirs], 1e-5)


def test_tokens_and_pictures() -> None:
    tokenizer = paper_tokenizer()
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    tokens = tokenizer.encode(images)
    picture = tokenizer.decode(tokens)
    tokenizer = tokenizer.cuda()
    assert_near([tokenizer.decode([scale.cuda() for scale in tokens]).cpu()], [picture], 5e-3)
    same = torch.cat(tokenizer.encode(images.cuda()), 1).cpu() == torch.cat(tokens, 1)
    assert same.float().mean() > 0.9  # one flip at a coarse scale changes all that follow
