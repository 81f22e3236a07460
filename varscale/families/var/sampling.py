"""Drawing images from VAR, scale after scale, with a key-value cache and classifier-free guidance.

Tian et al. 2024, section 3.2 and appendix; the guidance grows linearly over the scales, as in the reference code.

Letters in tensor names: B batch, K scales, M tokens of one scale, C width, c latent channels, V vocabulary.
"""

import torch
from torch import Tensor

from varscale.families.base import SamplingOptions
from varscale.families.models import Sample, draw, evaluating
from varscale.families.var.transformer import VAR
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


def sample_scales(
    var: VAR, tokenizer: MultiScaleTokenizer, labels_B: Tensor, options: SamplingOptions, indices_B: Tensor
) -> Sample:
    """Draw one image a label; see `Family.sample`."""
    with torch.no_grad(), evaluating(var, tokenizer), torch.compiler.set_stance("force_eager"):
        predictor = ScalePredictor(var, labels_B, options.guidance, use_cache=options.use_cache)
        tokens: list[Tensor] = []
        features_hat_BChw, inputs_BMc = None, None
        for k in range(len(var.config.patch_nums)):
            logits_BMV = predictor.predict(inputs_BMc)
            uniform_BM = uniform(options.seed, "sampling", k, indices_B, logits_BMV.shape[1])
            tokens.append(draw(logits_BMV, uniform_BM, top_k=options.top_k, top_p=options.top_p))
            features_hat_BChw, inputs_BMc = tokenizer.quantizer.accumulate(features_hat_BChw, tokens[-1], k)
        assert features_hat_BChw is not None
        images_B3HW = tokenizer.decode_features(features_hat_BChw).float()
        return Sample(images_B3HW.add(1).mul(0.5), tokens)


class ScalePredictor:
    """The guided logits of one scale after the other, each from the inputs that the scale before it made.

    The guidance is that of the last scale; with 0 the branch without class is not computed.
    """

    def __init__(self, var: VAR, labels_B: Tensor, guidance: float, *, use_cache: bool = True) -> None:
        """Start at the first scale."""
        self.var, self.batch, self.guidance, self.scale = var, len(labels_B), guidance, 0
        if guidance > 0:
            labels_B = torch.cat((labels_B, torch.full_like(labels_B, var.config.num_classes)))
        self.condition_BC, self.modulation = var.condition(labels_B)
        self.embedded_BMC = self.condition_BC.new_empty(len(labels_B), 0, var.config.width)
        self.caches = var.new_caches() if use_cache else None

    def predict(self, inputs_BMc: Tensor | None) -> Tensor:
        """Guided logits (B, M, V) of the next scale, from `accumulate`'s inputs; None at the first scale."""
        begin, end = self.var.scale_bounds[self.scale]
        if inputs_BMc is None:
            x_BMC = self.var.first_input(self.condition_BC)
        else:
            x_BMC = self.var.embed(inputs_BMc).repeat(len(self.condition_BC) // self.batch, 1, 1)
        x_BMC = x_BMC + self.var.place_embedding(begin, end)
        if self.caches is None:
            x_BMC = self.embedded_BMC = torch.cat((self.embedded_BMC, x_BMC), dim=1)
        x_BMC = self.var.transform(x_BMC, self.modulation, caches=self.caches)[:, begin - end :]
        guidance = self.guidance * self.scale / max(len(self.var.config.patch_nums) - 1, 1)
        self.scale += 1
        if guidance == 0:  # the branch without class was needed for its keys and values, but not its logits
            return self.var.logits(x_BMC[: self.batch], self.condition_BC[: self.batch])
        conditional_BMV, unconditional_BMV = self.var.logits(x_BMC, self.condition_BC).chunk(2)
        return (1 + guidance) * conditional_BMV - guidance * unconditional_BMV
