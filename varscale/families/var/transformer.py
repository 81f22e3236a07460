"""VAR: a class-conditional transformer that predicts the next scale of an image's tokens.

Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", section 3.2.
All tokens of a scale are predicted at once, from the scales before it.
"""

from varscale.families.shared.transformer import TokenTransformer
from varscale.families.var.config import VARConfig


class VAR(TokenTransformer):
    """Next-scale transformer over the tokens of a `MultiScaleTokenizer`."""

    config: VARConfig
