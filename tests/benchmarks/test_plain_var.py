"""With equal weights the benchmark's plain VAR and ours are the same function and take the same training steps.

Letters: B batch, L tokens of an image.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture

from benchmarks.plain_var import PlainTraining, PlainVAR
from benchmarks.trainings import BareTraining
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import save_tokenizer
from varscale.training.module import TokenModelModule

PATCH_NUMS = (1, 2, 3, 5)


def module_and_batch(folder: Path) -> tuple[TokenModelModule, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(
        architecture(
            PATCH_NUMS, 40, 6, 4, channel_multipliers=(1, 2), residual_blocks=1, attention=False, norm_groups=2
        )
    )
    torch.nn.init.normal_(tokenizer.quantizer.codebook_Vc)
    save_tokenizer(folder / "tokenizer.safetensors", tokenizer, "print")
    module = TokenModelModule(
        str(folder / "tokenizer.safetensors"), 3, 3, 24, 3, batch_size=4, lr=1e-2, label_dropout=0.0,
        adaln_gamma_init=0.5, head_init=1.0, log_every_steps=10**9,
    )  # fmt: skip
    for parameter in module.var.parameters():  # biases begin at zero and would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    batch = {
        "tokens_BL": torch.randint(0, 40, (4, sum(side**2 for side in PATCH_NUMS))),
        "labels_B": torch.tensor([0, 1, 2, 3]),
        "sample_index_B": torch.arange(4),
    }
    return module, batch


@pytest.mark.parametrize("by", ["products", "library"])
def test_losses_agree_over_training_steps(tmp_path: Path, by: Any) -> None:
    module, batch = module_and_batch(tmp_path)
    plain = PlainVAR(module.var, module._quantizer[0], by, label_dropout=0.0)
    plain_training = PlainTraining(plain, lr=module.lr, weight_decay=module.weight_decay, grad_clip=module.grad_clip)
    ours = BareTraining(module, "float32")

    losses = [(plain_training.step(batch), ours.step(batch)) for _ in range(4)]

    for plain_loss, our_loss in losses:
        assert plain_loss == pytest.approx(our_loss, abs=1e-4)
    assert losses[-1][0] < losses[0][0] - 0.1


def test_inputs_of_each_scale_agree(tmp_path: Path) -> None:
    module, batch = module_and_batch(tmp_path)
    plain = PlainVAR(module.var, module._quantizer[0], "products", label_dropout=0.0)
    torch.testing.assert_close(
        plain.next_scale_inputs(batch["tokens_BL"]), module._inputs(batch["tokens_BL"]), atol=1e-5, rtol=1e-5
    )


def test_a_dropped_label_is_no_class(tmp_path: Path) -> None:
    module, batch = module_and_batch(tmp_path)
    always = PlainVAR(module.var, module._quantizer[0], "library", label_dropout=1.0)
    never = PlainVAR(module.var, module._quantizer[0], "library", label_dropout=0.0)
    unlabelled = {**batch, "labels_B": torch.full((4,), 3)}
    dropped = always.loss(batch["tokens_BL"], batch["labels_B"])
    torch.testing.assert_close(dropped, never.loss(unlabelled["tokens_BL"], unlabelled["labels_B"]))
