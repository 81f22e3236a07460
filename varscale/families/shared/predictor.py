"""The logits of one map of tokens after the other, with a key-value cache and classifier-free guidance.

Tian et al. 2024, section 3.2 and appendix; by default guidance grows linearly over the scales, as in the reference.

Where this speaks of scales, families other than VAR have their own maps (`TransformerDescription.pass_sides`).

Letters in tensor names: B batch, M tokens of one scale, C width, c latent channels, V vocabulary.
"""

import torch
from torch import Tensor

from varscale.config.section import GuidanceSchedule
from varscale.families.base import SamplingOptions
from varscale.families.models import with_unconditional
from varscale.families.shared.transformer import TokenTransformer


class ScalePredictor:
    """The guided logits of one scale after the other, each from the inputs that the scale before it made.

    With guidance 0 the branch without class is not computed.
    """

    def __init__(
        self,
        var: TokenTransformer,
        labels_B: Tensor,
        guidance: float,
        *,
        schedule: GuidanceSchedule = "ramp",
        use_cache: bool = True,
    ) -> None:
        """Start at the first scale."""
        self.var, self.batch, self.scale = var, len(labels_B), 0
        self.options = SamplingOptions(guidance, guidance_schedule=schedule)
        if guidance > 0:
            labels_B = with_unconditional(labels_B, var.config)
        self.condition_BC, self.modulation = var.condition(labels_B)
        if var.config.modulates_once:
            self.modulation = var.modulations(self.modulation)
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
        guidance = self.options.guidance_at(self.scale, len(self.var.config.patch_nums))
        self.scale += 1
        if guidance == 0:  # the branch without class was needed for its keys and values, but not its logits
            return self.var.logits(x_BMC[: self.batch], self.condition_BC[: self.batch])
        return self.var.logits(x_BMC, self.condition_BC, guidance=guidance)
