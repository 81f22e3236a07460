"""The masked family's section of an experiment, and the description of one of its transformers. No torch."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from varscale.config.section import NonNegative, Section, Whole
from varscale.families.base import Family, Reads
from varscale.families.shared.description import TransformerDescription, TransformerSection


class Decoding(Section):
    """How images are drawn; part of the model, since measures of its images depend on it."""

    sampling_steps: Annotated[Whole, Field(ge=1, le=2**16)] = 8
    """Passes in which an image's tokens are drawn, unless sampling names another number."""
    confidence_temperature: Annotated[NonNegative, Field(le=1e6)] = 4.5
    """Gumbel noise of the confidence by which tokens are kept, times this at first, falling linearly to none."""


class MaskedConfig(TransformerDescription, Decoding):
    """One transformer that fills in the masked tokens of one scale."""

    family: Literal["masked"] = "masked"
    """The family."""

    reads: ClassVar[Reads] = "scale"

    @property
    def loss_unit(self) -> str:
        """Of the tokens that are masked, given the others."""
        return "nats a masked token"

    @property
    def embedded_tokens(self) -> int:
        """All: which of them are masked is decided afterwards."""
        return self.tokens

    @property
    def masked_share(self) -> float:
        """Share of the tokens that are masked in training, on average: of ⌈L·cos(πu/2)⌉ for u in [0, 1)."""
        tokens = self.tokens
        return math.fsum(2 / math.pi * math.acos(count / tokens) for count in range(tokens)) / tokens

    def masked_counts(self, steps: int = 0) -> tuple[int, ...]:
        """How many tokens are masked before each pass: all, then ⌊L·cos(πs/2S)⌋, at least one less each time.

        Args:
            steps: Passes; 0: the model's own. Never more than there are tokens.
        """
        steps = min(steps or self.sampling_steps, self.tokens)
        counts = [self.tokens]
        for step in range(1, steps):
            wanted = math.floor(self.tokens * math.cos(math.pi / 2 * step / steps))
            counts.append(max(1, min(counts[-1] - 1, wanted)))
        return tuple(counts)

    def sampling_passes(self) -> int:
        """The model's own number, but never more than there are tokens."""
        return len(self.masked_counts())

    def sampling_flops(self, *, guidance: bool = True, cache: bool = True) -> int:
        """Sampling one image in the model's own number of passes, each over all tokens; there is no cache.

        Guidance grows from 0, so that the first pass has no branch without class.
        """
        steps = self.sampling_passes()
        branches = 2 * steps - 1 if guidance else steps
        rows = self._blocks(self.tokens) + self._attention(self.tokens**2) + self._modulation()
        rows += self.condition_flops(self.width)
        mixed = 4 * self.width**2 * (branches - steps)  # the head mixes both branches' modulated inputs
        return branches * rows + mixed + steps * (self._embedding(self.tokens) + self._head(self.tokens))

    def implementation(self) -> Family:
        """The part that needs torch."""
        from varscale.families.masked.family import MaskedFamily

        return MaskedFamily()


class MaskedSection(TransformerSection, Decoding):
    """The masked transformer; it needs a tokenizer of one scale."""

    family: Literal["masked"] = "masked"
    """Model family."""

    description = MaskedConfig


SECTION = MaskedSection
