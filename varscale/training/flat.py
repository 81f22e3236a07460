"""Many parameters as one tensor: narrow, deep models have hundreds of small ones, each a call for an optimizer."""

from collections.abc import Sequence

import torch
from torch import nn


class FlatParameters:
    """Parameters of one device and precision that are views of one, whose gradients are views of its gradient.

    An optimizer that works element by element takes `whole` in their place, and gives the same numbers. A parameter
    that a loss does not reach has gradient zero, not None.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move the parameters' values into one tensor."""
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self.whole = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        self._gradient = torch.zeros_like(self.whole)
        self._gradients = [
            part.view_as(parameter) for part, parameter in zip(self._gradient.split(sizes), parameters, strict=True)
        ]
        for part, parameter in zip(self.whole.detach().split(sizes), parameters, strict=True):
            parameter.data = part.view_as(parameter)

    def clear_gradients(self) -> None:
        """Set all gradients to zero, and share them again: trainers set them to None, which parts them."""
        self.whole.grad = self._gradient.zero_()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
