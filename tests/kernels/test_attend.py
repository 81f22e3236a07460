import itertools
from collections.abc import Iterator

import pytest
import torch
from requirements import require_program
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from varscale.families.shared.attention import block_causal_mask
from varscale.kernels import attention as native
from varscale.kernels import building
from varscale.kernels.attend import masked_attention, query_slices, sliced_attention

PATCH_NUMS = (1, 2, 3, 5)
TOKENS = 39
OLDER_PROCESSORS = ("x86-64", "haswell") if "AVX" in torch.backends.cpu.get_cpu_capability() else ()


@pytest.fixture
def compiler() -> None:
    require_program("c++")
    assert native.available(8)


needs_compiler = pytest.mark.usefixtures("compiler")


def naive(queries: Tensor, keys: Tensor, values: Tensor, patch_nums: tuple[int, ...]) -> Tensor:
    """Each query by itself over what it may see; (B, H, L, d)."""
    level = [k for k, side in enumerate(patch_nums) for _ in range(side**2)]
    rows = []
    for i, own in enumerate(level):
        seen = [j for j, other in enumerate(level) if other <= own]
        weights = torch.softmax(torch.einsum("bhd,bhnd->bhn", queries[:, :, i], keys[:, :, seen]), -1)
        rows.append(torch.einsum("bhn,bhnd->bhd", weights, values[:, :, seen]))
    return torch.stack(rows, 2)


def ends_of(patch_nums: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(side**2 for side in patch_nums))


def test_slices() -> None:
    assert query_slices((1, 5, 14, 30, 66, 130, 230)) == ((0, 130), (130, 230))
    assert query_slices((256, 656)) == ((0, 256), (256, 656))


@pytest.mark.parametrize("patch_nums", [(1, 2, 3), (1, 2, 3, 4, 6, 8, 9), (13,)])
def test_library_kernels_equal_the_definition(patch_nums: tuple[int, ...]) -> None:
    ends = ends_of(patch_nums)
    tokens = ends[-1]
    queries, keys, values = torch.randn(3, 2, 2, tokens, 6)
    mask = block_causal_mask(patch_nums, torch.device("cpu"))
    expected = naive(queries, keys, values, patch_nums)
    dense = masked_attention(queries, keys, values, mask)
    sliced = sliced_attention(queries, keys, values, mask, query_slices(ends))
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sliced, expected, atol=1e-5, rtol=1e-5)
    if len(patch_nums) > 1:  # and for the first scales alone
        end = ends[-2]
        parts = (part[:, :, :end] for part in (queries, keys, values))
        prefix = sliced_attention(*parts, mask[:end, :end], query_slices(ends))
        torch.testing.assert_close(prefix, expected[:, :, :end], atol=1e-5, rtol=1e-5)


def defined(joint: Tensor, scale: Tensor, patch_nums: tuple[int, ...], *, normalised: bool) -> Tensor:
    batch, tokens, _ = joint.shape
    queries, keys, values = joint.view(batch, tokens, 3, len(scale), -1).permute(2, 0, 3, 1, 4)
    if normalised:
        queries, keys = (torch.nn.functional.normalize(each, dim=-1) for each in (queries, keys))
    out = naive(queries * scale[:, None, None], keys, values, patch_nums)
    return out.transpose(1, 2).reshape(batch, tokens, -1)


@pytest.fixture
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles as for this kind of processor, whose vectors may be narrower than this one's."""
    monkeypatch.setattr(building, "FLAGS", [flag.replace("=native", f"={request.param}") for flag in building.FLAGS])
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    ("head_channels", "processor"),
    [(channels, "native") for channels in (1, 3, 4, 8, 16, 24, 32, 48, 64)]
    + [(channels, older) for channels in (8, 64) for older in OLDER_PROCESSORS],
    indirect=["processor"],
)
@pytest.mark.parametrize(("patch_nums", "normalised"), [(PATCH_NUMS, True), ((4,), True), (PATCH_NUMS, False)])
@pytest.mark.usefixtures("processor")
def test_native_kernel_equals_the_definition(head_channels: int, patch_nums: tuple[int, ...], normalised: bool) -> None:
    heads = 3
    ends = ends_of(patch_nums)
    torch.manual_seed(0)  # one channel near zero has a direction that float32 knows badly
    joint = torch.randn(2, ends[-1], 3 * heads * head_channels, dtype=torch.float64)
    scale = torch.tensor([0.5, 4.0, 100.0], dtype=torch.float64)
    if not normalised:
        scale = scale / 100  # of products of lengths near √d
    weights = torch.randn(2, ends[-1], heads * head_channels, dtype=torch.float64)
    results = []
    for dtype in (torch.float64, torch.float32):
        inputs = (joint.to(dtype).requires_grad_(), scale.to(dtype).requires_grad_())
        exact = dtype == torch.float64
        if exact:
            out = defined(*inputs, patch_nums, normalised=normalised)
        else:
            out = native.native_attention(*inputs, ends, normalised=normalised)
        gradients = torch.autograd.grad((out * weights.to(dtype)).sum(), inputs)
        results.append([out, *gradients])
    for name, exact, ours in zip(("output", "joint gradient", "scale gradient"), *results, strict=True):
        worst = (exact - ours).abs().max() / exact.abs().max().clamp_min(1e-3)
        assert worst < 2e-4, name


@needs_compiler
@pytest.mark.parametrize("head_channels", [8, 64])
def test_last_queries_of_a_cache_equal_those_of_all(head_channels: int) -> None:
    scale = torch.tensor([2.0, 5.0])
    cache = torch.randn(2, TOKENS + 3, 3 * 2 * head_channels)
    joint = cache[:, :TOKENS]
    everything = native.native_attention(joint, scale, [TOKENS])
    for queries in (1, 13, TOKENS):
        torch.testing.assert_close(
            native.native_attention_to_all(joint, scale, queries=queries),
            everything[:, -queries:],
            atol=1e-6,
            rtol=1e-5,
        )


@needs_compiler
def test_native_kernel_survives_extremes() -> None:
    joint = torch.zeros(1, TOKENS, 3 * 8, requires_grad=True)
    out = native.native_attention(joint, torch.tensor([100.0]), [1, 5, 14, 39])
    out.sum().backward()
    assert out.abs().max() == 0
    assert joint.grad is not None
    assert joint.grad.isfinite().all()
    # opposite directions under the largest scale: every weight but the best one's is e^-200
    joint = torch.ones(1, 2, 3)
    joint[0, 0, 1] = -1
    assert native.native_attention(joint, torch.tensor([100.0]), [2])[0, 1, 0] == 1


@needs_compiler
def test_native_kernel_gives_the_same_bits_on_any_number_of_threads() -> None:
    joint, scale = torch.randn(4, TOKENS, 3 * 16), torch.tensor([4.0, 5.0])
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(native.native_attention(joint, scale, [1, 5, 14, 39]))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_compiler
def test_native_kernel_counts_flops_of_all_pairs() -> None:
    joint = torch.randn(2, TOKENS, 3 * 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        native.native_attention(joint, torch.tensor([4.0, 5.0]), [1, 5, 14, 39]).sum().backward()
    forward = 2 * 2 * 2 * TOKENS**2 * 16
    assert counter.get_total_flops() == 3 * forward
