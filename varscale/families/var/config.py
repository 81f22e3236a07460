"""Parameters, FLOPs and memory of the transformer, in closed form, from shapes alone.

FLOPs are 2 × multiply-adds of all matrix products and convolutions, for one image. The forward pass counts all L × L
pairs of tokens, whatever a kernel skips, so that a budget is the same on every device; it equals what
`torch.utils.flop_counter` counts with the math kernel. Executed FLOPs, only for utilisation, leave out hidden pairs.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Any, Self

FLOAT32_BYTES = 4
# weights, gradients and AdamW's two moments
TRAINING_COPIES = 4


class _Shape:
    @classmethod
    def of(cls, model: Any) -> Self:
        """The shape of a model that has attributes of these names, as the models of this package do."""
        return cls(**{field.name: getattr(model, field.name) for field in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class VARShape(_Shape):
    """What the size of a VAR transformer depends on; see `varscale.families.var.transformer.VAR` for the meaning."""

    patch_nums: tuple[int, ...]
    vocab_size: int
    latent_channels: int
    num_classes: int
    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    shared_adaln: bool = False
    normalise_queries_keys: bool = True

    @property
    def tokens(self) -> int:
        """L, the tokens of an image over all scales."""
        return sum(side**2 for side in self.patch_nums)

    @property
    def hidden(self) -> int:
        """Channels between the two feed-forward layers."""
        return round(self.width * self.mlp_ratio)

    def parameters(self) -> int:
        """All trainable parameters."""
        width = self.width
        modulation = 6 * width * (width + 1)
        modulations = modulation + 6 * width * self.depth if self.shared_adaln else modulation * self.depth
        tables = self.num_classes + 1 + self.patch_nums[0] ** 2 + self.tokens + len(self.patch_nums)
        return self.active_parameters() + modulations + tables * width + 2 * width * (width + 1)

    def active_parameters(self, *, head: bool = True) -> int:
        """N = depth·(12C² + 8C + H) + (c + 1)·C + (C + 1)·V: blocks without modulation, input and head.

        Args:
            head: Count the output layer's (C + 1)·V.
        """
        width, hidden = self.width, self.hidden
        scales = self.heads if self.normalise_queries_keys else 0
        block = 4 * width**2 + 2 * width * hidden + 4 * width + hidden + scales
        output = (width + 1) * self.vocab_size if head else 0
        return self.depth * block + (self.latent_channels + 1) * width + output

    def forward_flops(self) -> int:
        """One teacher-forced pass of one image, with all L × L pairs."""
        return self._products() + self._attention(self.tokens**2)

    def training_flops(self) -> int:
        """Forward and backward pass of one image: 3 × forward."""
        return 3 * self.forward_flops()

    def executed_forward_flops(self) -> int:
        """One teacher-forced pass of one image, with only the pairs that a block-causal kernel computes."""
        ends = itertools.accumulate(side**2 for side in self.patch_nums)
        pairs = sum(side**2 * end for side, end in zip(self.patch_nums, ends, strict=True))
        return self._products() + self._attention(pairs)

    def executed_training_flops(self) -> int:
        """Forward and backward pass of one image as it is computed: 3 × the executed forward pass."""
        return 3 * self.executed_forward_flops()

    def sampling_flops(self, *, guidance: bool = True, cache: bool = True) -> int:
        """Sampling one image in K passes, without the tokenizer's decoder.

        Args:
            guidance: Also compute the branch without class (at the first scale without its output layer).
            cache: Keep keys and values; else each pass computes all scales so far anew.
        """
        branches = 2 if guidance else 1
        total, end = (branches * self._modulation() if self.shared_adaln else 0), 0
        for index, side in enumerate(self.patch_nums):
            added = side**2
            end += added
            rows = added if cache else end
            blocks = self._blocks(rows) + self._attention(rows * end)
            blocks += 0 if self.shared_adaln else self._modulation()
            predictions = branches if index else 1
            total += branches * blocks + predictions * self._head(added) + (self._embedding(added) if index else 0)
        return total

    def activation_bytes(self, batch: int, *, element_bytes: int = FLOAT32_BYTES) -> int:
        """An estimate, to within a third, of what a training step keeps for its backward pass.

        Of each token a block keeps 12 rows of C (stream, normalised, modulated and branch twice, joint queries, keys
        and values, attention's output) and 2 of the hidden layer; the output layer 3 of C and the logits twice. Under
        bfloat16 6 of the 12 stay float32 (stream, normalised, queries and keys), and there are copies: 10 of 2 bytes.

        Args:
            batch: Images at once.
            element_bytes: Of the products' inputs: 4, or 2 under bfloat16.
        """
        rows = 12 * FLOAT32_BYTES if element_bytes == FLOAT32_BYTES else 6 * FLOAT32_BYTES + 10 * element_bytes
        block = rows * self.width + 2 * self.hidden * element_bytes + self.heads * FLOAT32_BYTES
        output = (3 * self.width + 2 * self.vocab_size) * FLOAT32_BYTES
        return batch * self.tokens * (self.depth * block + output)

    def training_state_bytes(self) -> int:
        """Float32 weights, gradients and AdamW's two moments."""
        return self.parameters() * TRAINING_COPIES * FLOAT32_BYTES

    def checkpoint_bytes(self) -> int:
        """Of a checkpoint that training goes on from: float32 weights and AdamW's two moments."""
        return self.parameters() * (TRAINING_COPIES - 1) * FLOAT32_BYTES

    def weights_bytes(self) -> int:
        """Of the float32 weights alone."""
        return self.parameters() * FLOAT32_BYTES

    def step_bytes(self, images: int, *, element_bytes: int = FLOAT32_BYTES) -> int:
        """What a training step needs with so many images at once; compiled blocks need up to a third less."""
        return self.training_state_bytes() + self.activation_bytes(images, element_bytes=element_bytes)

    def _products(self) -> int:
        later = self.tokens - self.patch_nums[0] ** 2
        return self._embedding(later) + self._blocks(self.tokens) + self._modulation() + self._head(self.tokens)

    def _embedding(self, tokens: int) -> int:
        return 2 * tokens * self.latent_channels * self.width

    def _blocks(self, tokens: int) -> int:
        return self.depth * tokens * (8 * self.width**2 + 4 * self.width * self.hidden)

    def _modulation(self) -> int:
        return 12 * self.width**2 * (1 if self.shared_adaln else self.depth)

    def _attention(self, pairs: int) -> int:
        return self.depth * 4 * pairs * self.width

    def _head(self, tokens: int) -> int:
        return 4 * self.width**2 + 2 * tokens * self.width * self.vocab_size
