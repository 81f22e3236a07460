"""The transformer's LightningModule: parameter groups, stateless randomness, clipping, losses, precision, compilation.

Letters: B batch, L tokens of an image, V vocabulary.
"""

import math
from typing import Any

import pytest
import small_models
import torch
from lightning.pytorch import Trainer
from small_models import var_config
from tiny_training import PATCH_NUMS, TOKENS, VOCAB_SIZE, make_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.data import DataLoader

from varscale.data.loading import EvaluationBatches, StepBatches
from varscale.data.tokens.store import TokenStore
from varscale.errors import Diverged
from varscale.families.shared.family import _kept_branches
from varscale.families.var.transformer import VAR
from varscale.training.module import ModelModule
from varscale.training.runs import Inputs
from varscale.training.trainer import Loader


def make_module(optim: dict[str, Any] | None = None, **changes: Any) -> ModelModule:
    """A training on the tokens of `tiny_training`; `changes` are of the model or of how it is carried out."""
    settings = {name: changes.pop(name) for name in ("seed", "compiled", "images_at_once", "log_every_steps")
                if name in changes}  # fmt: skip
    model = {"num_classes": 3, "adaln_gamma_init": 0.1, "label_dropout": 0.1, **changes}
    description = var_config(PATCH_NUMS, VOCAB_SIZE, **model)
    return small_models.make_module(description, {"batch_size": 8, **RATE, **(optim or {})}, **settings)


RATE = {"lr": 5e-3, "lr_batch_size": 8}


def make_batch(images: int = 8, first: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(first)
    return {
        "tokens_BL": torch.randint(0, VOCAB_SIZE, (images, TOKENS), generator=generator),
        "labels_B": torch.randint(0, 3, (images,), generator=generator),
        "sample_index_B": torch.arange(first, first + images),
    }


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def mean_loss(module: ModelModule, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As in training."""
    losses = module.family.losses(module.model, module._tokenizer[0], batch, module.seed)
    assert losses.loss_BL.shape == batch["tokens_BL"].shape
    return losses.loss_BL.mean()


def loss_of(module: ModelModule, batch: dict[str, torch.Tensor]) -> float:
    return float(mean_loss(module, batch).detach())


def quiet_trainer(**settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, **settings,
    )  # fmt: skip


def take_steps(module: ModelModule, *batches: dict[str, torch.Tensor], **settings: Any) -> dict[str, float]:
    """Train on these batches; what was logged."""
    trainer = quiet_trainer(**settings)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return {name: float(value) for name, value in trainer.logged_metrics.items()}


STILL = {"lr": 1e-30}


def part(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: values[rows] for name, values in batch.items()}


def test_loss_before_training_is_that_of_guessing() -> None:
    module = make_module(adaln_gamma_init=1e-3, width=64)
    assert loss_of(module, make_batch(32)) == pytest.approx(math.log(VOCAB_SIZE), rel=0.01)


def test_only_matrices_decay() -> None:
    """A step without gradients and with a rate of 1 takes 7% of what decays, and nothing of the rest."""
    module = make_module({"weight_decay": 0.07})
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.fill_(1.0)
    optimizer = module.configure_optimizers()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    values = {name: float(p.detach().mean()) for name, p in module.model.named_parameters()}
    decayed_names = {name for name, value in values.items() if value == pytest.approx(0.93)}
    plain_names = {name for name, value in values.items() if value == pytest.approx(1.0)}
    assert decayed_names | plain_names == set(values)
    tables = ("start_MC", "position_LC", "level_KC", "log_scale_H")
    for name, parameter in module.model.named_parameters():
        is_table = any(word in name for word in tables)
        assert (name in plain_names) == (is_table or parameter.ndim < 2 or name.endswith("bias")), name
    for expected in tables:
        assert any(expected in name for name in plain_names), expected
    assert any("attention" in name for name in decayed_names)


@pytest.mark.parametrize("changes", [{"label_dropout": 0.5}, {"drop_path_rate": 0.6, "label_dropout": 0.0}])
def test_random_numbers_belong_to_samples(changes: dict[str, Any]) -> None:
    """The loss of a batch is the mean of its halves' losses; other sample numbers give another loss."""
    module = make_module(**changes)
    batch = make_batch(16)
    whole = loss_of(module, batch)
    halves = [loss_of(module, part(batch, rows)) for rows in (slice(0, 8), slice(8, 16))]
    assert whole == pytest.approx(sum(halves) / 2, rel=1e-6)
    assert loss_of(module, batch) == whole
    assert loss_of(module, batch | {"sample_index_B": torch.arange(100, 116)}) != whole
    module.seed = 1
    assert loss_of(module, batch) != whole


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_parts_of_a_step_add_up(precision: Any) -> None:
    """Gradients and logged losses of a step in parts of 3, 3 and 2 images are those of the whole step."""
    gradients, logged = [], []
    for images_at_once in (0, 3):
        module = make_module(
            STILL, images_at_once=images_at_once, drop_path_rate=0.3, label_dropout=0.3, log_every_steps=1
        )
        logged.append(take_steps(module, make_batch(), precision=precision))
        gradients.append({name: gradient_of(value).clone() for name, value in module.model.named_parameters()})
    whole, parts = gradients
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-3, atol=1e-6 if precision == "32-true" else 1e-3), name
    assert logged[1] == pytest.approx(logged[0], rel=1e-5 if precision == "32-true" else 1e-2)
    assert len(logged[0]) > 4


def test_labels_are_dropped_as_often_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(label_dropout=0.25)
    seen: list[torch.Tensor] = []

    def forward(self: VAR, labels_B: torch.Tensor, inputs_BMc: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(labels_B)
        return self.head.bias.expand(len(labels_B), TOKENS, VOCAB_SIZE)

    monkeypatch.setattr(VAR, "forward", forward)
    take_steps(module, make_batch(2000))
    assert float((seen[0] == 3).float().mean()) == pytest.approx(0.25, abs=0.03)
    module.validation_step(make_batch(200), 0)
    assert int(seen[1].max()) < 3  # evaluation keeps all labels


def test_stochastic_depth_keeps_the_mean() -> None:
    keep_D2B = _kept_branches(torch.arange(4000), var_config(depth=4, drop_path_rate=0.3), seed=0)
    assert keep_D2B is not None
    assert keep_D2B.shape == (4, 2, 4000)
    for block, rate in enumerate((0.0, 0.1, 0.2, 0.3)):
        values = keep_D2B[block]
        assert torch.allclose(values.unique(), torch.tensor([0, 1 / (1 - rate)] if rate else [1.0]))
        assert float((values == 0).float().mean()) == pytest.approx(rate, abs=0.03)
    assert not torch.equal(keep_D2B[3, 0], keep_D2B[3, 1])
    assert _kept_branches(torch.arange(4), var_config(), seed=0) is None


def test_gradients_are_clipped_to_the_norm() -> None:
    before, after = [], []
    for clip, gradients in ((1e9, before), (0.01, after)):
        module = make_module({**STILL, "grad_clip": clip}, log_every_steps=1)
        logged = take_steps(module, make_batch())
        gradients += [gradient_of(parameter) for parameter in module.model.parameters()]
    whole, clipped = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (before, after))
    assert float(whole.norm()) > 0.01
    assert logged["gradient_norm"] == pytest.approx(float(whole.norm()), rel=1e-4)  # as it was
    assert torch.allclose(clipped, whole * 0.01 / whole.norm(), rtol=1e-4)


def test_a_loss_that_is_not_a_number_stops() -> None:
    module = make_module()
    torch.nn.init.constant_(module.model.head.bias, math.nan)
    with pytest.raises(Diverged, match="the training loss is nan after 0 images"):
        take_steps(module, make_batch())


def test_images_are_counted_on_from_a_checkpoint() -> None:
    module = make_module()
    take_steps(module, make_batch(), make_batch(first=8))
    assert (module.images_seen, int(module.steps)) == (16, 2)
    again = make_module()
    state = {"state_dict": module.state_dict()}
    again.load_state_dict(state["state_dict"])
    again.on_load_checkpoint(state)
    assert again.images_seen == 16
    assert not any(name.startswith("_tokenizer") for name in state["state_dict"])  # read from its own file


def test_the_seed_decides_the_weights_whatever_was_drawn_before() -> None:
    states = []
    for drawn, seed in ((0, 3), (5, 3), (0, 4)):
        torch.rand(drawn)
        states.append(make_module(seed=seed).model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not all(torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), 4096)


@pytest.mark.filterwarnings("ignore")
def test_learns_more_than_how_often_tokens_are(inputs: Inputs) -> None:
    """Below the entropy of each position's own distribution, which needs attention and inputs to beat."""
    module = make_module()
    store = TokenStore.open(inputs.tokens.train)
    quiet_trainer().fit(module, Loader(StepBatches(store, seed=0, batch_size=32, start_step=0, num_steps=120)))
    quiet_trainer().validate(module, Loader(EvaluationBatches(TokenStore.open(inputs.tokens.validation),
                                                              batch_size=16)), verbose=False)  # fmt: skip
    tokens_NL = store.tokens(torch.arange(store.num_samples)).tokens_BL
    share_LV = F.one_hot(tokens_NL, VOCAB_SIZE).double().mean(0)
    entropy = float(torch.special.entr(share_LV).sum(1).mean())
    figures = module.prediction.compute()
    assert figures["validation_images"] == 40
    assert figures["loss"] < entropy - 0.05
    assert int(module.steps) == 120


def test_validation_equals_a_plain_computation(inputs: Inputs) -> None:
    module = make_module(drop_path_rate=0.5, label_dropout=0.9).eval()
    store = TokenStore.open(inputs.tokens.validation)
    for number, batch in enumerate(EvaluationBatches(store, batch_size=7)):
        module.validation_step(batch, number)
    tokens_BL, labels_B = store.tokens(torch.arange(40))
    inputs_BMc = module._tokenizer[0].next_scale_inputs(tokens_BL.split(module.model.config.groups, dim=1))
    with torch.no_grad():
        logits_BLV = module.model(labels_B, inputs_BMc)
    assert module.prediction.compute()["loss"] == pytest.approx(
        float(F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL)), rel=1e-5
    )


def test_bfloat16_is_near_float32() -> None:
    module = make_module(width=32, adaln_gamma_init=0.5, head_init=1.0)
    batch = make_batch(32)
    exact = mean_loss(module, batch)
    exact.backward()
    gradient = gradient_of(module.model.head.weight).clone()
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = mean_loss(module, batch)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert float(rounded.detach()) == pytest.approx(float(exact.detach()), rel=5e-3)
    assert float(rounded.detach()) != float(exact.detach())  # it did compute in bfloat16
    similarity = F.cosine_similarity(gradient_of(module.model.head.weight).flatten(), gradient.flatten(), dim=0)
    assert float(similarity) > 0.99


def test_compiled_blocks_share_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    counter: Any = CompileCounterWithBackend("aot_eager")
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: original(self, **how, backend=counter))
    eager, compiled = (make_module(depth=4, drop_path_rate=0.3, compiled=on, log_every_steps=1) for on in (False, True))
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    batches = [make_batch(first=8 * step) for step in range(3)]
    logged = [take_steps(module, *batches) for module in (eager, compiled)]
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
    for (name, ours), theirs in zip(eager.model.named_parameters(), compiled.model.parameters(), strict=True):
        assert torch.allclose(gradient_of(ours), gradient_of(theirs), rtol=1e-3, atol=1e-6), name
    assert counter.frame_count == 1
    for module in (eager, compiled):
        module.eval()
        with torch.no_grad():
            module.validation_step(make_batch(5), 0)  # a last batch of another size compiles nothing
    assert counter.frame_count == 1
    assert eager.prediction.compute() == pytest.approx(compiled.prediction.compute(), rel=1e-4)
