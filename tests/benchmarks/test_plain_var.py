"""With equal weights the benchmark's plain VAR and ours are the same function and take the same training steps.

Letters: B batch, L tokens of an image.
"""

import pytest
import torch
from small_models import make_module, tokenizer_for, var_config

from benchmarks.plain_var import AttentionBy, PlainTraining, PlainVAR
from benchmarks.trainings import BareTraining
from varscale.families.var.transformer import VAR
from varscale.generation.sampling import sample

PATCH_NUMS = (1, 2, 3, 5)


def training_and_batch() -> tuple[BareTraining, VAR, dict[str, torch.Tensor]]:
    description = var_config(PATCH_NUMS, 40, 6, 3, 3, 24, 3, adaln_gamma_init=0.5, head_init=1.0, label_dropout=0.0)
    module = make_module(description, {"lr": 1e-2, "lr_batch_size": 4, "batch_size": 4})
    torch.manual_seed(0)
    for parameter in module.model.parameters():  # biases begin at zero and would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    assert isinstance(module.model, VAR)
    batch = {
        "tokens_BL": torch.randint(0, 40, (4, description.tokens)),
        "labels_B": torch.tensor([0, 1, 2, 3]),
        "sample_index_B": torch.arange(4),
    }
    return BareTraining(module, tokenizer_for(description), "float32"), module.model, batch


@pytest.mark.parametrize("images_at_once", [0, 3])
@pytest.mark.parametrize("by", ["products", "library"])
def test_losses_agree_over_training_steps(by: AttentionBy, images_at_once: int) -> None:
    ours, var, batch = training_and_batch()
    ours.module.images_at_once = images_at_once
    optim, plain = ours.module.optim, PlainVAR(var, ours.tokenizer.quantizer, by, label_dropout=0.0)
    plain_training = PlainTraining(plain, lr=optim.lr, weight_decay=optim.weight_decay, grad_clip=optim.grad_clip)

    losses = [(plain_training.step(batch), ours.step(batch)) for _ in range(4)]

    for plain_loss, our_loss in losses:
        assert plain_loss == pytest.approx(our_loss, abs=1e-4)
    assert losses[-1][0] < losses[0][0] - 0.1


def test_inputs_of_each_scale_agree() -> None:
    ours, var, batch = training_and_batch()
    plain = PlainVAR(var, ours.tokenizer.quantizer, "products", label_dropout=0.0)
    expected = ours.tokenizer.next_scale_inputs(batch["tokens_BL"].split(var.config.groups, dim=1))
    torch.testing.assert_close(plain.next_scale_inputs(batch["tokens_BL"]), expected, atol=1e-5, rtol=1e-5)


def test_a_dropped_label_is_no_class() -> None:
    ours, var, batch = training_and_batch()
    always, never = (PlainVAR(var, ours.tokenizer.quantizer, "library", label_dropout=rate) for rate in (1.0, 0.0))
    unlabelled = {**batch, "labels_B": torch.full((4,), 3)}
    dropped = always.loss(batch["tokens_BL"], batch["labels_B"])
    torch.testing.assert_close(dropped, never.loss(unlabelled["tokens_BL"], unlabelled["labels_B"]))


@pytest.mark.parametrize("by", ["products", "library"])
def test_greedy_samples_agree(by: AttentionBy, monkeypatch: pytest.MonkeyPatch) -> None:
    _, var, _ = training_and_batch()
    tokenizer = tokenizer_for(var.config)
    monkeypatch.setattr(torch, "multinomial", lambda weights, _: weights.argmax(-1, keepdim=True))
    labels_B = torch.arange(3)
    features_BChw, tokens_BL = PlainVAR(var, tokenizer.quantizer, by, 0.0).sample(labels_B, 1.5)
    ours = sample(var, tokenizer, labels_B, cfg=1.5, top_k=1)
    assert torch.equal(tokens_BL, torch.cat(ours.tokens, 1))
    torch.testing.assert_close((tokenizer.decode_features(features_BChw) + 1) / 2, ours.images, atol=1e-4, rtol=0)
