"""AdamW for models of many small parameters: narrow, deep ones have hundreds, each a call for an optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW


class FlatAdamW(AdamW):
    """AdamW that updates each parameter group as one tensor, with the same numbers (to rounding) in far fewer calls.

    `param_groups` hold one parameter each, of which the model's own are views; so are their gradients. A parameter that
    a loss does not reach has gradient zero, not None. Its state is written as AdamW's, parameter by parameter, so that
    a checkpoint serves on any device.
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

    def state_dict(self) -> dict[str, Any]:
        """AdamW's of the same groups; its tensors are views of ours."""
        whole = super().state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        groups = []
        for number, (flat, group) in enumerate(zip(self._flat, whole["param_groups"], strict=True)):
            parts = flat.divided(whole["state"].get(number, {}))
            groups.append({**group, "params": list(range(len(state), len(state) + len(parts)))})
            state |= enumerate(parts, len(state))
        return {"state": {number: part for number, part in state.items() if part}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """AdamW's of the same groups; or of one flat parameter a group, as earlier versions of varscale wrote it."""
        state, groups = state_dict["state"], state_dict["param_groups"]
        parts = [[state[number] for number in group["params"] if number in state] for group in groups]
        whole = {number: _joined(own) for number, own in enumerate(parts) if own}
        groups = [{**group, "params": [number]} for number, group in enumerate(groups)]
        super().load_state_dict({"state": whole, "param_groups": groups})

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

    def divided(self, state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The state of each parameter."""
        sizes = [parameter.numel() for parameter in self._parameters]
        parts: list[dict[str, Tensor]] = [{} for _ in sizes]
        for name, tensor in state.items():
            # AdamW counts each parameter's steps in a tensor of its own
            split = [tensor.clone() for _ in sizes] if tensor.dim() == 0 else tensor.split(sizes)
            for part, own, parameter in zip(parts, split, self._parameters, strict=True):
                part[name] = own if own.dim() == 0 else own.view_as(parameter)
        return parts

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


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of all parameters of a group as one; they all took the same number of steps."""
    first = parts[0]
    return {
        name: first[name] if first[name].dim() == 0 else torch.cat([part[name].flatten() for part in parts])
        for name in first
    }
