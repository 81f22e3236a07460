"""VAR's classifiers of bits: their loss, which is a likelihood of the tokens, and the choice of bits.

Han et al. 2024, "Infinity" (arXiv 2412.04431), section 3.3. Given the coarser scales, bits are independent of each
other, within a token as between tokens.

Letters in tensor names: B batch, L tokens of an image, M tokens of one scale, d bits.
"""

from torch import Tensor
from torch.nn import functional as F

from varscale.families.base import TokenLosses
from varscale.numerics.bits import bits_of, tokens_of


class BitLosses(TokenLosses):
    """Of classifiers of bits: `logits_BLV` holds a logit for each bit."""

    @property
    def wrong(self) -> Tensor:
        """Whether the likeliest token, that of each bit's likelier value, is another one, (B, L)."""
        assert self.logits_BLV is not None
        assert self.tokens_BL is not None
        return tokens_of(self.logits_BLV.detach() > 0).ne(self.tokens_BL)


def bit_losses(logits_BLd: Tensor, tokens_BL: Tensor) -> BitLosses:
    """Of every token the sum of its bits' binary cross-entropies, float32 nats: minus the token's log-likelihood."""
    bits_BLd = bits_of(tokens_BL, logits_BLd.shape[-1]).float()
    loss_BLd = F.binary_cross_entropy_with_logits(logits_BLd.float(), bits_BLd, reduction="none")
    return BitLosses(loss_BLd.sum(-1), tokens_BL, logits_BLd)


def draw_bits(logits_BMd: Tensor, uniform_BMd: Tensor, *, greedy: bool = False, temperature: float = 1.0) -> Tensor:
    """Draw tokens (B, M), bit by bit.

    Args:
        logits_BMd: A logit for each bit.
        uniform_BMd: float32 in [0, 1).
        greedy: Take each bit's likelier value.
        temperature: What the logits are divided by first.
    """
    return tokens_of(logits_BMd > 0 if greedy else uniform_BMd < (logits_BMd / temperature).sigmoid())
