"""The tokenizer's LightningModule: codes kept alive, averages, adversarial term.

Letters: V vocabulary, c latent channels.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny_training import sections
from torch.nn import functional as F
from torch.utils.data import DataLoader

from varscale.data.loading import ImageBatches
from varscale.data.sources.rings.source import RingsSource
from varscale.errors import Diverged
from varscale.tokenizer import module as tokenizer_module
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.module import TokenizerModule
from varscale.training.trainer import Loader

BATCH = 8
ADVERSARIAL = {
    "patch_nums": (1, 2, 6),
    "channel_multipliers": (1, 1, 2),
    "adversarial_weight": 0.5,
    "discriminator_channels": 4,
}
"""A discriminator, and images large enough for it."""
pytestmark = pytest.mark.filterwarnings("ignore")


class AfterStep(Callback):
    """Calls a function with the module after every step."""

    def __init__(self, function: Callable[[TokenizerModule], None]) -> None:
        self._function = function

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._function(pl_module)


def make_module(steps: int, **changes: Any) -> TokenizerModule:
    training = {"images": steps * BATCH, "batch_size": BATCH, "lr": 3e-3, "warmup_images": 0}
    return TokenizerModule(*sections(training, **changes))


def train(module: TokenizerModule, steps: int, after: Callable[[TokenizerModule], None] = lambda _: None) -> None:
    batches = ImageBatches(
        RingsSource(512, module.tokenizer.image_size),
        seed=0,
        batch_size=BATCH,
        start_step=0,
        num_steps=steps,
        workers=0,
    )
    fit(module, Loader(batches), after)


def fit(module: TokenizerModule, batches: Any, after: Callable[[TokenizerModule], None] = lambda _: None) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AfterStep(after)],
    )
    trainer.fit(module, batches)


def assert_near(ours: TokenizerModule, theirs: TokenizerModule) -> None:
    found = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        if not name.startswith("meter."):
            torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=2e-3, msg=name)


def codebook(tokenizer: MultiScaleTokenizer) -> torch.Tensor:
    return tokenizer.quantizer.codebook_Vc.detach().clone()


def first_images(side: int = 8) -> torch.Tensor:
    batches = ImageBatches(RingsSource(512, side), seed=0, batch_size=BATCH, start_step=0, num_steps=1, workers=0)
    return next(iter(batches))["images_B3HW"]


def exact_distance(first_VC: torch.Tensor, second_NC: torch.Tensor) -> torch.Tensor:
    return torch.cdist(first_VC, second_NC, compute_mode="donot_use_mm_for_euclid_dist")


def test_codes_start_as_vectors_of_the_data() -> None:
    module = make_module(4)
    with torch.no_grad():
        residuals = module.tokenizer(first_images()).residuals
    before = codebook(module.tokenizer)
    module._initialise_codes(first_images())
    started = codebook(module.tokenizer)
    assert not torch.equal(before, started)
    distance_VN = exact_distance(started, torch.cat(residuals))
    assert float(distance_VN.min(1).values.max()) == 0  # each code is a vector that was looked up
    assert len(started.unique(dim=0)) == len(started)
    assert torch.equal(codebook(module.averaged), started)
    coarse_VN = exact_distance(started, residuals[0])  # the coarse scale's few vectors have their turns
    assert int((coarse_VN.min(1).values == 0).sum()) >= len(started) // 3


def test_averages_follow_the_formula() -> None:
    """After n steps each weight is the average of its history, the first step's with weight decay^(n - 1)."""
    history: list[dict[str, torch.Tensor]] = []
    module = make_module(6, ema_decay=0.7, restart_every_steps=1000)
    train(module, 6, lambda m: history.append({name: p.detach().clone() for name, p in m.tokenizer.named_parameters()}))
    averaged = dict(module.averaged.named_parameters())
    for name, first in history[0].items():
        expected = first
        for later in history[1:]:
            expected = 0.7 * expected + 0.3 * later[name]
        assert torch.allclose(averaged[name], expected, atol=1e-6), name


def restarted_module(monkeypatch: pytest.MonkeyPatch) -> tuple[TokenizerModule, list[torch.Tensor], list[int]]:
    """Module with half of its codes far from all data; the codes that each restart moved, and when."""
    moved: list[torch.Tensor] = []
    steps: list[int] = []
    module = make_module(20, restart_every_steps=4, restart_usage=0.2)
    restart = module.tokenizer.quantizer.restart_codes

    def restart_codes(dead_V: torch.Tensor, vectors_Nc: torch.Tensor) -> torch.Tensor:
        moved.append(restart(dead_V, vectors_Nc))
        steps.append(int(module.steps))
        return moved[-1]

    monkeypatch.setattr(module.tokenizer.quantizer, "restart_codes", restart_codes)
    initialise = module._initialise_codes

    def initialise_codes(images_B3HW: torch.Tensor) -> None:
        initialise(images_B3HW)
        with torch.no_grad():
            module.tokenizer.quantizer.codebook_Vc[::2] += 100

    monkeypatch.setattr(module, "_initialise_codes", initialise_codes)
    return module, moved, steps


def test_dead_codes_move_with_fresh_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    module, moved, steps = restarted_module(monkeypatch)
    seen: list[bool] = []

    def after(module: TokenizerModule) -> None:
        optimizer = module.trainer.optimizers[0]
        state = optimizer.state[module.tokenizer.quantizer.codebook_Vc]
        if int(module.steps) == 3:  # as if all codes had been used before
            state["exp_avg"].fill_(0.1)
            state["exp_avg_sq"].fill_(1.0)
        if int(module.steps) != 4:
            return
        far_V = torch.arange(16) % 2 == 0
        assert torch.equal(moved[0] & far_V, far_V)
        assert float(codebook(module.tokenizer).abs().max()) < 50
        assert torch.equal(codebook(module.averaged)[moved[0]], codebook(module.tokenizer)[moved[0]])
        for name in ("exp_avg", "exp_avg_sq"):
            assert not state[name][moved[0]].any()
            assert state[name][~moved[0]].any()
        assert not module.usage_V.any()
        seen.append(True)

    train(module, 20, after)
    assert seen == [True]
    assert set(steps) <= {4, 8, 12, 16}  # none in the last fifth, steps 17 to 20


def test_no_restart_in_the_last_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every code counted as dead each time, codes are moved up to 80% of the training and no later."""
    module, _, steps = restarted_module(monkeypatch)
    module.settings = module.settings.model_copy(update={"restart_usage": 1e9})
    train(module, 20)
    assert steps == [4, 8, 12, 16]


def test_images_pass_unquantized_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(10, quantize_after=0.4)
    begin = codebook(module.tokenizer)
    books: list[torch.Tensor] = []
    quantized: list[bool] = []
    forward = MultiScaleTokenizer.forward

    def spy(self: MultiScaleTokenizer, images_B3HW: torch.Tensor, *, quantize: bool = True) -> Any:
        quantized.append(quantize)
        return forward(self, images_B3HW, quantize=quantize)

    monkeypatch.setattr(MultiScaleTokenizer, "forward", spy)
    train(module, 10, lambda m: books.append(codebook(m.tokenizer)))
    assert quantized == [False] * 4 + [True] * 6
    assert all(torch.equal(book, begin) for book in books[:4])
    assert not torch.equal(books[4], begin)


def test_parts_of_a_step_add_up() -> None:
    """From before the codes begin until after a restart; parts of 3, 3 and 2."""
    settings = {"quantize_after": 0.3, "restart_every_steps": 4, "restart_usage": 0.9, "lr": 1e-3}
    whole, parts = make_module(10, **settings), make_module(10, micro_batch=3, **settings)
    sizes: list[int] = []
    parts.tokenizer.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    for module in (whole, parts):
        train(module, 6)
    assert set(sizes) == {3, 2}
    assert_near(parts, whole)


def test_the_adversarial_term_in_parts() -> None:
    """Equal parts of equal images: each finds the weight that the whole finds.

    Before quantization begins: codes start as vectors of these very images, and where a gradient is zero but for
    rounding, AdamW's first steps are as large as elsewhere.
    """
    settings = {"adversarial_start": 0.0, "quantize_after": 0.5, **ADVERSARIAL}
    whole, parts = (make_module(10, **settings, micro_batch=size) for size in (0, 4))
    images = first_images(24)[:4].repeat(2, 1, 1, 1)
    for module in (whole, parts):
        fit(module, DataLoader(cast(Any, [{"images_B3HW": images}] * 2), batch_size=None))
    assert_near(parts, whole)


def test_training_that_never_quantizes_is_refused() -> None:
    with pytest.raises(ValueError, match="quantize_after"):
        make_module(10, quantize_after=0.99)


def test_images_too_small_for_the_discriminator_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"adversarial_weight: 0\.5, but the discriminator needs images of at least 24 px"
    ):
        make_module(10, adversarial_weight=0.5)


def test_losses_are_weighted_as_said() -> None:
    module = make_module(10, l1_weight=0.3, l2_weight=0.6)
    images_B3HW = first_images()
    output = module.tokenizer(images_B3HW)
    loss, figures = module._losses(images_B3HW, output)
    l1, l2 = F.l1_loss(output.reconstruction_B3HW, images_B3HW), F.mse_loss(output.reconstruction_B3HW, images_B3HW)
    assert torch.allclose(loss, 0.3 * l1 + 0.6 * l2 + output.quantizer_loss)
    assert figures.keys() == {"train_l1", "train_l2", "train_quantizer"}


def test_the_adversarial_term_sets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(10, **ADVERSARIAL, adversarial_start=0.5)
    monkeypatch.setattr(tokenizer_module, "discriminator_loss", lambda real, fake: (real - fake).mean())
    assert module.discriminator is not None
    begin = [p.detach().clone() for p in module.discriminator.parameters()]
    now = list(module.discriminator.parameters())
    changed: list[bool] = []
    train(
        module,
        10,
        lambda _: changed.append(any(not torch.equal(a, b) for a, b in zip(begin, now, strict=True))),
    )
    assert changed == [False] * 5 + [True] * 5


def test_the_adversarial_loss_is_vqgans() -> None:
    """Reconstruction + quantizer + weight · λ · (-mean logit), λ the ratio of gradients at the last layer."""
    module = make_module(10, **ADVERSARIAL, adversarial_start=0.0)
    assert module.discriminator is not None
    images_B3HW = first_images(24)
    output = module.tokenizer(images_B3HW)
    loss, figures = module._losses(images_B3HW, output)
    fake_B3HW = output.reconstruction_B3HW
    plain = 0.2 * F.l1_loss(fake_B3HW, images_B3HW) + F.mse_loss(fake_B3HW, images_B3HW)
    adversarial = -module.discriminator(fake_B3HW).mean()
    weight = module.tokenizer.decoder.output.weight
    plain_gradient, adversarial_gradient = (
        torch.autograd.grad(part, weight, retain_graph=True)[0].norm() for part in (plain, adversarial)
    )
    ratio = (plain_gradient / (adversarial_gradient + 1e-4)).detach()
    assert float(ratio) > 0
    assert torch.allclose(loss, plain + output.quantizer_loss + 0.5 * ratio * adversarial, rtol=1e-5)
    assert torch.allclose(figures["train_adversarial"], adversarial)


def test_only_matrices_decay() -> None:
    module = make_module(10, weight_decay=0.07, **ADVERSARIAL)
    tokenizer, discriminator = module.configure_optimizers()
    decayed, plain = tokenizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.07, 0)
    assert {id(p) for group in (decayed, plain) for p in group["params"]} == {
        id(p) for p in module.tokenizer.parameters() if p.requires_grad
    }
    assert all(p.ndim == 4 for p in decayed["params"])
    assert any(p is module.tokenizer.quantizer.codebook_Vc for p in plain["params"])
    assert all(p.ndim == 1 or p is module.tokenizer.quantizer.codebook_Vc for p in plain["params"])
    assert discriminator.param_groups[0]["weight_decay"] == 0


def test_a_loss_that_is_not_a_number_stops() -> None:
    module = make_module(10)
    with torch.no_grad():
        module.tokenizer.decoder.output.bias.fill_(torch.nan)
    with pytest.raises(Diverged, match="the training loss is nan after 0 images"):
        train(module, 2)


def test_learns(tmp_path: Path) -> None:
    module = make_module(60, quantize_after=0.2, ema_decay=0.9, restart_every_steps=10)
    images_B3HW = first_images()

    def error(tokenizer: MultiScaleTokenizer) -> float:
        with torch.no_grad():
            return float(F.mse_loss(tokenizer.decode(tokenizer.encode(images_B3HW)), images_B3HW))

    before = error(module.tokenizer)
    train(module, 60)
    assert error(module.averaged) < 0.6 * before
    assert int(module.steps) == 60


@pytest.fixture(autouse=True)
def same_thread_count() -> Iterator[None]:
    """Lightning leaves the number of threads as it is; say so if that changes."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
