import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from requirements import require_program
from small_models import PAPER, make_module, make_var, var_config, var_inputs
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from varscale.families.var.family import VARFamily
from varscale.families.var.transformer import VAR

PAPER_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


# gates as large as the other modulation, so that the blocks matter from the start
LIVELY = {"adaln_gamma_init": 1.0, "init_std": 0.3}


def small(depth: int = 3, **settings: object) -> VAR:
    torch.manual_seed(0)
    return make_var(depth=depth, **{**LIVELY, **settings})


@pytest.fixture
def compile_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets what a training compiles be compiled by another backend, as quickly as that goes."""
    original = nn.Module.compile

    def by(backend: str) -> None:
        monkeypatch.setattr(nn.Module, "compile", lambda self, **how: original(self, **how, backend=backend))

    torch._dynamo.reset()
    return by


def compiled(depth: int, **settings: object) -> VAR:
    """As in training."""
    torch.manual_seed(0)
    model = make_module(var_config(depth=depth, **{**LIVELY, **settings}), compiled=True).model
    assert isinstance(model, VAR)
    return model


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (6, 18_492_580),
        (8, 41_315_904),
        (10, 78_367_716),
        (12, 133_186_960),
        (16, 310_283_520),
        (20, 600_917_136),
        (24, 1_033_399_360),
        (30, 2_010_020_356),
    ],
)
def test_reference_sizes(depth: int, expected: int) -> None:
    with torch.device("meta"):
        var = make_var(PAPER, 4096, 32, 1000, depth, 64 * depth, depth)
    assert sum(parameter.numel() for parameter in var.parameters()) == expected


def test_reference_size_with_shared_modulation() -> None:
    with torch.device("meta"):
        var = make_var(PAPER_512, 4096, 32, 1000, 36, 64 * 36, 36, shared_adaln=True)
    assert sum(parameter.numel() for parameter in var.parameters()) == 2_353_893_904


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("depth", "width"), [(2, 16), (8, 64)])
def test_first_loss_is_that_of_guessing(shared: bool, depth: int, width: int) -> None:
    torch.manual_seed(0)
    var = make_var((1, 2, 3, 4), 512, 8, 3, depth, width, 2, shared_adaln=shared)
    logits = var(*var_inputs(var, 8))
    assert logits.dtype == torch.float32
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(512, (8 * 30,)))
    assert loss.item() == pytest.approx(math.log(512), rel=0.01)


@pytest.mark.parametrize("normalise", [True, False])
def test_logits_see_the_scales_before_and_no_other(normalise: bool) -> None:
    # the input of scale k is made of the tokens of scales < k, so scale k may depend on inputs up to its own
    var = small(normalise_queries_keys=normalise)
    labels, inputs = var_inputs(var)
    inputs.requires_grad_()
    logits = var(labels, inputs)
    for begin, end in var.scale_bounds:
        (gradient,) = torch.autograd.grad(logits[:, begin:end].square().sum(), inputs, retain_graph=True)
        seen = gradient.abs().sum((0, 2)) > 0
        assert seen[: max(end - 1, 0)].all()
        assert not seen[end - 1 :].any()
    # each single logit of scale k changes with each input of scales ≤ k
    for token, vocabulary in ((1, 3), (7, 0), (13, 31)):
        (gradient,) = torch.autograd.grad(logits[0, token, vocabulary], inputs, retain_graph=True)
        end = next(end for begin, end in var.scale_bounds if begin <= token < end)
        assert (gradient[0].abs().sum(1) > 0).tolist() == [place < end - 1 for place in range(var.config.tokens - 1)]
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize(
    "settings", [{}, {"shared_adaln": True}, {"normalise_queries_keys": False}, {"block": "modern"}]
)
def test_cached_passes_equal_one_teacher_forced_pass(settings: dict[str, object]) -> None:
    var = small(**settings)
    labels, inputs = var_inputs(var, 3)
    with torch.no_grad():
        expected = var(labels, inputs)
        condition, modulation = var.condition(labels)
        caches = var.new_caches()
        for begin, end in var.scale_bounds:
            x = var.first_input(condition) if begin == 0 else var.embed(inputs[:, begin - 1 : end - 1])
            x = var.transform(x + var.place_embedding(begin, end), modulation, caches=caches)
            torch.testing.assert_close(var.logits(x, condition), expected[:, begin:end], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "width", [12, 16]
)  # of which only the latter is whole vectors, so that blocks are one operator
@pytest.mark.parametrize("normalised", [True, False])
def test_library_and_native_kernels_agree(width: int, normalised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    require_program("c++")
    var = small(width=width, normalise_queries_keys=normalised)
    labels, inputs = var_inputs(var)
    results = []
    for native in ("0", "1"):
        monkeypatch.setenv("VARSCALE_NATIVE", native)
        var.zero_grad()
        logits = var(labels, inputs)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in var.parameters() if p.grad is not None)])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_stochastic_depth_is_given_from_outside() -> None:
    var = small(depth=4, drop_path_rate=0.3)
    assert var.config.drop_path_rates == pytest.approx((0.0, 0.1, 0.2, 0.3))
    labels, inputs = var_inputs(var)
    plain = var(labels, inputs)
    assert torch.equal(plain, var(labels, inputs, keep_D2B=torch.ones(4, 2, 2)))
    # with every branch dropped only the embeddings reach the head
    condition, _ = var.condition(labels)
    embedded = torch.cat((var.first_input(condition), var.embed(inputs)), 1) + var.place_embedding(0, var.config.tokens)
    dropped = var(labels, inputs, keep_D2B=torch.zeros(4, 2, 2))
    torch.testing.assert_close(dropped, var.logits(embedded, condition))
    # a sample's multipliers touch that sample alone
    keep = torch.ones(4, 2, 2)
    keep[2, 1, 1] = 0
    mixed = var(labels, inputs, keep_D2B=keep)
    torch.testing.assert_close(mixed[0], plain[0])
    assert (mixed[1] - plain[1]).abs().max() > 1e-3


def test_one_compilation_serves_all_blocks(compile_by: Callable[[str], None]) -> None:
    torch._dynamo.utils.counters.clear()
    compile_by("aot_eager")
    var = compiled(12)
    plain = small(depth=12)
    plain.load_state_dict(var.state_dict())  # under the same names
    labels, inputs = var_inputs(var)
    expected = plain(labels, inputs)
    logits = var(labels, inputs)
    logits.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        var(labels, inputs)


def test_one_process_compiles_every_size_of_a_sweep(compile_by: Callable[[str], None]) -> None:
    """A worker trains one size after the other, each with a smaller last part of its steps."""
    compile_by("eager")
    for depth in range(1, 13):
        var = compiled(depth, width=8 * depth, heads=depth)
        for batch in (2, 3):
            assert var(*var_inputs(var, batch)).shape == (batch, 14, 32)


def test_compiled_model_equals_the_eager_one() -> None:
    require_program("c++")
    torch._dynamo.reset()
    var, by_inductor = small(depth=2), compiled(2)
    by_inductor.load_state_dict(var.state_dict())
    labels, inputs = var_inputs(var)
    keep = torch.ones(2, 2, 2)
    for model in (var, by_inductor):
        model(labels, inputs, keep_D2B=keep).square().mean().backward()
    for (name, eager), ours in zip(var.named_parameters(), by_inductor.parameters(), strict=True):
        assert eager.grad is not None
        torch.testing.assert_close(ours.grad, eager.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_bfloat16_autocast_keeps_float32_logits() -> None:
    var = small()
    labels, inputs = var_inputs(var)
    with torch.autocast("cpu", torch.bfloat16):
        logits = var(labels, inputs)
    assert logits.dtype == torch.float32
    exact = var(labels, inputs)
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in var.parameters())


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_and_sharding_give_the_same_gradients() -> None:
    labels, inputs = var_inputs(small())
    plain, replicated = small(), torch.nn.parallel.DistributedDataParallel(small())
    with torch.device("meta"):
        sharded = make_var(depth=3)
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded.to_empty(device="cpu")
    sharded.initialise()
    with torch.no_grad():
        for ours, source in zip(sharded.parameters(), plain.parameters(), strict=True):
            ours.to_local().copy_(source)
    gradients = []
    for model in (plain, replicated, sharded):
        model(labels, inputs).square().mean().backward()
        gradients.append([p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()])
    for plain_one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(other, plain_one)


def test_meta_model_initialises_like_any_other() -> None:
    var = small()
    with torch.device("meta"):
        empty = make_var(depth=3, **LIVELY)
    empty.to_empty(device="cpu")
    empty.initialise(torch.Generator().manual_seed(1))
    var.initialise(torch.Generator().manual_seed(1))
    for (name, ours), other in zip(var.named_parameters(), empty.parameters(), strict=True):
        assert torch.equal(ours, other), name
    labels, inputs = var_inputs(var)
    assert torch.equal(var(labels, inputs), empty(labels, inputs))


def test_initial_statistics() -> None:
    torch.manual_seed(0)
    var = make_var((1, 2, 4), 64, 4, 5, 4, 128, 2, adaln_gamma_init=1e-3)
    std = math.sqrt(1 / (3 * 128))
    block = var.blocks[1]
    expected = {
        block.attention.queries_keys_values.weight: std,
        block.attention.projection.weight: std / math.sqrt(8),
        block.feedforward.expand.weight: std,
        block.feedforward.contract.weight: std / math.sqrt(8),
        block.modulation.weight[:256]: std * 1e-3,
        block.modulation.weight[256:]: std * 0.5,
        var.head.weight: std * 0.02,
        var.head_modulation.weight: std * 0.5,
        var.class_embedding.weight: std,
        var.position_LC: std,
    }
    for tensor, deviation in expected.items():
        assert tensor.std().item() == pytest.approx(deviation, rel=0.1)
    assert block.attention.log_scale_H.tolist() == pytest.approx([math.log(4)] * 2)
    assert all((p == 0).all() for name, p in var.named_parameters() if "bias" in name)


def test_names_without_weight_decay() -> None:
    names = VARFamily().names_without_decay(small(shared_adaln=True))
    assert {"start_MC", "position_LC", "level_KC", "head.bias", "blocks.0.modulation_offset_6C"} <= names
    assert {"blocks.2.attention.log_scale_H", "blocks.2.attention.query_bias_C"} <= names
    assert not any(name.endswith("weight") for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth\n  Input should be greater than or equal to 1"),
        ({"heads": 3}, "width 16 must be a multiple of heads 3"),
        ({"patch_nums": (2, 2)}, r"patch_nums \(2, 2\) must grow strictly"),
        ({"patch_nums": ()}, r"patch_nums \(\) must grow strictly"),
        ({"drop_path_rate": 1.0}, "drop_path_rate\n  Input should be less than 1"),
        ({"mlp_ratio": 0.01}, "mlp_ratio 0.01 leaves width 16 no hidden channel"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        var_config(**change)
