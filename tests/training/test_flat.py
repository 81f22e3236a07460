"""AdamW of whole parameter groups: its steps are those of the parameters apart, however gradients are cleared."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from varscale.training.flat import FlatAdamW


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def groups(trained: nn.Module) -> list[dict[str, object]]:
    weights, biases = ([p for p in trained.parameters() if p.ndim == ndim] for ndim in (2, 1))
    return [{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}]


def steps(trained: nn.Module, optimizer: Optimizer, clear: Callable[[], None]) -> list[torch.Tensor]:
    for seed in range(4):
        torch.manual_seed(seed)
        clear()
        for _ in range(2):  # gradients of a step's parts add up
            trained(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in trained.parameters()]


@pytest.mark.parametrize("by", ["optimizer", "model", "both"])
def test_steps_are_those_of_the_parameters_apart(by: str) -> None:
    apart, together = model(), model()
    plain = AdamW(groups(apart), 0.1, (0.9, 0.95))
    expected = steps(apart, plain, plain.zero_grad)
    flat = FlatAdamW(groups(together), 0.1, (0.9, 0.95))

    def clear() -> None:
        if by != "model":
            flat.zero_grad()
        if by != "optimizer":
            together.zero_grad()

    found = steps(together, flat, clear)
    for first, second, before in zip(found, expected, model().parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6)
        assert not torch.allclose(first, before, atol=0.05)


def test_values_are_shared_after_loading() -> None:
    trained, other = model(), model()
    flat = FlatAdamW(groups(trained), 0.1, (0.9, 0.95))
    with torch.no_grad():
        other[0].weight.fill_(2.0)
    trained.load_state_dict(other.state_dict())
    assert torch.equal(flat.param_groups[0]["params"][0][:35], torch.full((35,), 2.0))


def test_it_goes_on_from_its_state() -> None:
    whole, half = model(), model()
    expected = steps(whole, flat := FlatAdamW(groups(whole), 0.1, (0.9, 0.95)), flat.zero_grad)
    first = FlatAdamW(groups(half), 0.1, (0.9, 0.95))
    for seed in range(4):
        again = FlatAdamW(groups(half), 0.1, (0.9, 0.95))
        again.load_state_dict(first.state_dict())
        torch.manual_seed(seed)
        again.zero_grad()
        for _ in range(2):
            half(torch.randn(6, 5)).square().mean().backward()
        again.step()
        first = again
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), expected, strict=True))


@pytest.mark.parametrize("kinds", [(AdamW, FlatAdamW), (FlatAdamW, AdamW), (FlatAdamW, FlatAdamW)])
def test_one_goes_on_from_the_others_state(kinds: tuple[type[AdamW], type[AdamW]]) -> None:
    """As a checkpoint of a GPU serves on a CPU, and the other way."""
    straight, first = model(), model()
    optimizer = AdamW(groups(straight), 0.1, (0.9, 0.95), fused=True)
    for _ in range(2):
        expected = steps(straight, optimizer, optimizer.zero_grad)
    before = kinds[0](groups(first), 0.1, (0.9, 0.95))
    steps(first, before, before.zero_grad)
    second = model()
    second.load_state_dict(first.state_dict())
    after = kinds[1](groups(second), 0.1, (0.9, 0.95))
    after.load_state_dict(before.state_dict())
    for ours, theirs in zip(steps(second, after, after.zero_grad), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_its_state_is_adamws() -> None:
    apart, together = model(), model()
    plain, flat = AdamW(groups(apart), 0.1, (0.9, 0.95)), FlatAdamW(groups(together), 0.1, (0.9, 0.95))
    assert flat.state_dict()["state"] == {}  # before the first step
    steps(apart, plain, plain.zero_grad)
    steps(together, flat, flat.zero_grad)
    ours, theirs = flat.state_dict(), plain.state_dict()
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert state.keys() == ours["state"][number].keys()
        for name, tensor in state.items():
            assert torch.allclose(ours["state"][number][name], tensor, atol=1e-6)


def test_the_flat_state_of_earlier_versions_is_taken() -> None:
    trained, other = model(), model()
    flat, again = (FlatAdamW(groups(each), 0.1, (0.9, 0.95)) for each in (trained, other))
    steps(trained, flat, flat.zero_grad)
    again.load_state_dict(AdamW.state_dict(flat))
    assert torch.equal(
        again.state[again.param_groups[0]["params"][0]]["exp_avg"],
        flat.state[flat.param_groups[0]["params"][0]]["exp_avg"],
    )
