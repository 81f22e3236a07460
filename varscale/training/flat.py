"""AdamW for models of many small parameters: narrow, deep ones have hundreds, each a call for an optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW


class FlatAdamW(AdamW):
    """AdamW that updates each parameter group as one tensor, with the same numbers (to rounding) in far fewer calls.

    `param_groups` hold one parameter each, of which the model's own are views; so are their gradients. A parameter that
    a loss does not reach has gradient zero, not None.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        """Take groups of parameters of one device and precision, with their own options, such as the weight decay."""
        self._flat = [_FlatParameters(group["params"]) for group in groups]
        whole = [{**group, "params": [flat.whole]} for group, flat in zip(groups, self._flat, strict=True)]
        super().__init__(whole, lr, betas, fused=True)
        self.register_step_pre_hook(lambda *_: self._share_gradients())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero; they are shared with the model's parameters from now on."""
        for flat in self._flat:
            flat.clear_gradients()

    def _share_gradients(self) -> None:
        for flat in self._flat:
            flat.share_gradients()


class _FlatParameters:
    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self.whole = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        self._gradient = torch.zeros_like(self.whole)
        parts = zip(self._gradient.split(sizes), parameters, strict=True)
        self._gradients = [part.view_as(parameter) for part, parameter in parts]
        for part, parameter in zip(self.whole.detach().split(sizes), parameters, strict=True):
            parameter.data = part.view_as(parameter)

    def clear_gradients(self) -> None:
        self.whole.grad = self._gradient.zero_()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def share_gradients(self) -> None:
        """Take over gradients that are no views of ours: a trainer set them to None, and others were made."""
        self.whole.grad = self._gradient
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is None:
                gradient.zero_()
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
