"""Parameters of a group as one tensor: an optimizer's steps are those of the parameters apart."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW

from varscale.training.flat import FlatParameters


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def steps(trained: nn.Module, optimizer: AdamW, clear: Callable[[], None]) -> list[torch.Tensor]:
    for seed in range(4):
        torch.manual_seed(seed)
        clear()
        for _ in range(2):  # gradients of a step's parts add up
            trained(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
        trained.zero_grad()  # as trainers do at any time
    return [parameter.detach().clone() for parameter in trained.parameters()]


def test_steps_are_those_of_the_parameters_apart() -> None:
    apart, together = model(), model()
    plain = AdamW(apart.parameters(), 0.1, weight_decay=0.3, fused=True)
    expected = steps(apart, plain, plain.zero_grad)
    flat = FlatParameters(list(together.parameters()))
    found = steps(together, AdamW([flat.whole], 0.1, weight_decay=0.3, fused=True), flat.clear_gradients)
    for first, second, before in zip(found, expected, model().parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6)
        assert not torch.allclose(first, before, atol=0.05)


def test_values_are_shared_after_loading() -> None:
    trained, other = model(), model()
    flat = FlatParameters(list(trained.parameters()))
    with torch.no_grad():
        other[0].weight.fill_(2.0)
    trained.load_state_dict(other.state_dict())
    assert torch.equal(flat.whole[:35], torch.full((35,), 2.0))
