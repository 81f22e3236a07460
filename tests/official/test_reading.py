"""Checkpoints as other people have them: nested, prefixed, of both models, damaged, or something else altogether."""

import io
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from safetensors.torch import save_file
from small_models import make_var
from torch import Tensor

from varscale.errors import CheckpointError
from varscale.families.storage import load_model, save_model
from varscale.official import export_tokenizer, export_var, load_tokenizer, load_var
from varscale.official.files import import_checkpoint, read_tokenizer
from varscale.official.reading import read_contents
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import load_tokenizer as load_ours

SCALES = (1, 2, 3)
State = dict[str, Tensor]

torch.manual_seed(0)
VAE = export_tokenizer(MultiScaleTokenizer(architecture(SCALES, 16, 4, 32, channel_multipliers=(1,))))
VAR = export_var(make_var(SCALES, 16, 4, 7, 3, 192, 3, mlp_ratio=1, shared_adaln=True))
OTHER = VAR | {"head.bias": VAR["head.bias"] + 1}
CONFIG = {"patch_nums": SCALES, "resos": (16, 32, 48), "label_smooth": 0.0, "first_prog": True}
OPTIMIZER = {"scaler": {"scale": 65536.0}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def without_levels(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "lvl_1L"}


def blocks(*kept: int) -> State:
    return {
        name: tensor
        for name, tensor in VAR.items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) in kept
    }


def trainer(**rest: Any) -> dict[str, Any]:
    return {"epoch": 9, "trainer": {"var_wo_ddp": VAR, "vae_local": VAE, "var_opt": OPTIMIZER, **rest}}


TRANSFORMERS = {
    "plain": VAR,
    "DDP": prefixed("module.", VAR),
    "compiled": prefixed("_orig_mod.", VAR),
    "both": prefixed("module._orig_mod.", VAR),
    "a module's, compiled": prefixed("model._orig_mod.var.", VAR),
    "blocks compiled one by one": {name.replace(".attn.", "._orig_mod.attn."): value for name, value in VAR.items()},
    "averaged": prefixed("module.", VAR) | {"n_averaged": torch.tensor(3)},
    "nested": {"model_state_dict": VAR, "epoch": 3},
    "nested twice": {"state": {"model": prefixed("module.", VAR)}},
    "Lightning": {"state_dict": prefixed("model.", VAR), "pytorch-lightning_version": "2.6.5", "callbacks": {}},
    "the trainer's": trainer(config=CONFIG),
    "with the tokenizer, by prefix": prefixed("var.", VAR) | prefixed("vae.", VAE),
    "with the tokenizer in it": VAR | prefixed("vae_proxy.", VAE),
    "an optimizer's, by name": {"model": VAR, "optimizer": {"state": {name: {"step": 1} for name in VAR}}},
    "without levels": without_levels(VAR),
    "in lists": {"models": [{"epoch": 3}, (prefixed("module.", VAR), None)]},
}
TOKENIZERS = {
    "plain": VAE,
    "DDP": prefixed("module.", VAE),
    "Lightning": {"state_dict": prefixed("vae.", VAE) | {"loss.discriminator.main.0.weight": torch.ones(3)}},
    "VQGAN's training": {"state_dict": VAE | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)}},
    "the trainer's": trainer(config=CONFIG),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Our file of the tokenizer."""
    torch.save(VAE, tmp_path / "vae.pth")
    (written,) = import_checkpoint(tmp_path / "vae.pth", tmp_path / "vae.safetensors", SCALES)
    return written


def stored(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_is(path: Path, state: State) -> None:
    assert_equal(export_var(load_model(path)), state)


def assert_equal(found: State, expected: State) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.to(found[name].dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_whatever_it_is_wrapped_in(name: str, tmp_path: Path) -> None:
    file = stored(tmp_path / "file.pth", TRANSFORMERS[name])
    found = read_contents(file).chosen(None, file)
    assert found.kind == "transformer"
    assert VAR.keys() - found.state.keys() <= ({"lvl_1L"} if name == "without levels" else set())
    assert_equal(found.state, {name: VAR[name] for name in found.state})


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_whatever_it_is_wrapped_in(name: str, tmp_path: Path) -> None:
    file = stored(tmp_path / "file.pth", TOKENIZERS[name])
    found = read_contents(file).chosen("tokenizer", file)
    assert found.state.keys() == VAE.keys()
    assert_equal(found.state, VAE)


@pytest.mark.parametrize(
    "content",
    [
        trainer(config=CONFIG),
        {"trainer": {"var_wo_ddp": without_levels(VAR), "vae_local": VAE}, "args": {"pn": "1_2_3"}},
        trainer(config={"patch_nums": (1, 2, 4)}),  # the tensors know better
    ],
)
def test_both_models_with_the_scales_that_the_file_has(content: Any, tmp_path: Path) -> None:
    file, out = stored(tmp_path / "ar-ckpt-last.pth", content), tmp_path / "var.safetensors"
    beside = tmp_path / "var-tokenizer.safetensors"
    assert import_checkpoint(file, out) == [beside, out]
    assert load_ours(beside).patch_nums == SCALES
    assert_equal(export_tokenizer(load_ours(beside)), VAE)
    assert_is(out, VAR)


def test_the_tokenizer_alone_of_a_file_with_both(tmp_path: Path) -> None:
    file, out = stored(tmp_path / "ar-ckpt-last.pth", trainer(config=CONFIG)), tmp_path / "vae.safetensors"
    assert import_checkpoint(file, out, entry="trainer.vae_local") == [out]
    assert load_ours(out).patch_nums == SCALES
    assert_equal(export_tokenizer(load_ours(out)), VAE)
    assert_equal(export_tokenizer(read_tokenizer(file, SCALES)), VAE)


def test_any_name_any_format_and_half_precision(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in VAR.items()}, tmp_path / "var.pth")
    import_checkpoint(tmp_path / "var.pth", out, None, tokenizer)
    assert_is(out, VAR)
    save_file(prefixed("vae.", VAE), tmp_path / "vae.bin")
    assert_equal(export_tokenizer(read_tokenizer(tmp_path / "vae.bin", SCALES)), VAE)
    import_checkpoint(stored(tmp_path / "var.safetensors", VAR), out, None, tmp_path / "vae.bin")  # PyTorch's
    assert_is(out, VAR)
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in VAR.items()}
    import_checkpoint(stored(tmp_path / "half.pth", half), out, None, tokenizer)
    assert_is(out, half)


def test_copies_are_chosen_by_name(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out.safetensors"
    for content in ({"model": VAR, "ema": OTHER}, prefixed("model.", VAR) | prefixed("ema.", OTHER)):
        file = stored(tmp_path / "file.pth", content)
        with pytest.raises(CheckpointError, match=r"holds 2 transformers \(model, ema\); import one by --entry model"):
            import_checkpoint(file, out, None, tokenizer)
        for entry, state in (("model", VAR), ("ema", OTHER)):
            found = read_contents(file).chosen(None, file, entry)
            assert_equal(found.state, state)
        with pytest.raises(CheckpointError, match=r"--entry other: there is none; it has model, ema"):
            import_checkpoint(file, out, None, tokenizer, entry="other")


def test_a_fault_of_one_copy_is_none_of_the_other(tmp_path: Path) -> None:
    file = stored(tmp_path / "file.pth", {"model": VAR, "ema": OTHER | {"decay": 0.9}})
    assert_equal(read_contents(file).chosen(None, file, "model").state, VAR)
    with pytest.raises(CheckpointError, match=r"decay \(float\) is no tensor with values"):
        read_contents(file).chosen(None, file, "ema")


def test_scales_are_compared(tmp_path: Path, tokenizer: Path) -> None:
    other, out = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    import_checkpoint(tmp_path / "vae.pth", other, (1, 2, 4))
    file = stored(tmp_path / "var.pth", VAR)
    for tokenizer_file, patch_nums in ((other, None), (tokenizer, (1, 2, 4)), (None, (1, 2, 4))):
        with pytest.raises(
            CheckpointError, match=r"patch_nums 1,2,3, but .* 1,2,4; import both with --patch-nums 1,2,3"
        ):
            import_checkpoint(file, out, patch_nums, tokenizer_file)
    with pytest.raises(ValueError, match=r"lvl_1L has patch_nums \(1, 2, 3\), but the tokenizer \(1, 2, 4\)"):
        load_var(VAR, load_tokenizer(VAE, (1, 2, 4)))
    with pytest.raises(CheckpointError, match="lvl_1L doesn't have a square number of tokens a scale"):
        import_checkpoint(stored(tmp_path / "bad.pth", VAR | {"lvl_1L": VAR["lvl_1L"][:, 2:]}), out, None, tokenizer)
    with pytest.raises(CheckpointError, match="has 3 scales; say by --patch-nums how large their token maps are"):
        import_checkpoint(tmp_path / "vae.pth", out)
    several = {"model": VAE, "config": CONFIG, "args": {"pn": "1_2_4"}}
    with pytest.raises(CheckpointError, match="states several patch_nums, 1,2,3 and 1,2,4; say by --patch-nums"):
        import_checkpoint(stored(tmp_path / "several.pth", several), out)


def test_scales_that_no_shape_tells_apart(tmp_path: Path, tokenizer: Path) -> None:
    """As many, and as many tokens: 1 + 4 + 81 = 1 + 36 + 49."""
    file = stored(tmp_path / "var.pth", export_var(make_var((1, 2, 9), 16, 4, 7, 1, 64, 1)))
    import_checkpoint(tmp_path / "vae.pth", tokenizer, (1, 6, 7))
    with pytest.raises(CheckpointError, match=r"var\.pth: was trained with .* 1,2,9, but .*vae\.safetensors has 1,6,7"):
        import_checkpoint(file, tmp_path / "out.safetensors", None, tokenizer)


def test_one_kind_where_the_other_belongs(tmp_path: Path, tokenizer: Path) -> None:
    var, out = stored(tmp_path / "var.pth", VAR), tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match=r"vae\.pth: holds a tokenizer, not a transformer; leave out --tokenizer"):
        import_checkpoint(tmp_path / "vae.pth", out, SCALES, tokenizer)
    with pytest.raises(CheckpointError, match=r"var\.pth: holds a transformer, expected a tokenizer"):
        import_checkpoint(var, out, None, var)
    with pytest.raises(CheckpointError, match=r"var\.pth: holds a transformer, expected a tokenizer"):
        read_tokenizer(var, SCALES)
    with pytest.raises(CheckpointError, match="name its imported tokenizer by --tokenizer"):
        import_checkpoint(var, out)
    with pytest.raises(CheckpointError, match="varscale's own file already"):
        import_checkpoint(tokenizer, out)
    save_model(tmp_path / "ours.pth", load_var(VAR, load_tokenizer(VAE, SCALES)), "print")
    with pytest.raises(CheckpointError, match="holds a model, expected a tokenizer"):
        import_checkpoint(var, out, None, tmp_path / "ours.pth")


def test_missing_blocks(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out.safetensors"
    for kept, missing in (((0, 2), "block 1 of 0 … 2"), ((1, 2), "block 0 of 0 … 2"), ((2,), "block 0 of 0 … 2")):
        with pytest.raises(CheckpointError, match=f"{missing} is missing; get the whole file"):
            import_checkpoint(stored(tmp_path / "hole.pth", blocks(*kept)), out, None, tokenizer)
    file = stored(tmp_path / "shallow.pth", blocks(0, 1))
    with pytest.raises(CheckpointError, match=r"has 2 blocks of width 192, where the reference has 3.*say --depth 2"):
        import_checkpoint(file, out, None, tokenizer)
    import_checkpoint(file, out, None, tokenizer, depth=2)
    assert_is(out, blocks(0, 1))
    with pytest.raises(CheckpointError, match="has 3 blocks, but --depth says 2"):
        import_checkpoint(stored(tmp_path / "whole.pth", VAR), out, None, tokenizer, depth=2)


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.txt", content)
    return buffer.getvalue()


def scripted() -> bytes:
    """What a file of TorchScript has in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("m/data.pkl", "m/code/m.py", "m/constants.pkl"):
            archive.writestr(name, b"1")
    return buffer.getvalue()


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Print:
    """Unpickled as code, it would print."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return print, ("executed",)


def damaged(content: bytes) -> bytes:
    """With zeros in its middle, where a download left a hole."""
    middle = len(content) // 2
    return content[:middle] + bytes(2000) + content[middle + 2000 :]


FOREIGN = {
    "an empty file; download it again": b"",
    "a Git LFS pointer that stands for 1,242,634,240 bytes": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1242634240\n"
    ),
    "a web page; download the file itself": b'\xef\xbb\xbf\n<!DOCTYPE html>\n<html lang="de">Stra\xc3\x9fe</html>',
    'a text that begins with \'{"error"': b'{"error": "Repository not found"}',
    "a packed archive; unpack it": b"\x1f\x8b\x08" + bytes(100),
    "a packed archive; .* the file within": b"7z\xbc\xaf\x27\x1c" + bytes(100),
    r"or a damaged one: \d of \d+ records are not what was written, such as archive/data/": damaged(saved(VAR)),
    "a model in TorchScript, which is code": scripted(),
    "cut short after 300 bytes; download it again": saved(VAR)[:300],
    r"a zip archive of something else \(a.txt, b.txt\)": zipped(a=b"1", b=b"2"),
    r"neither a tokenizer's tensors nor a transformer's \(it has weight\)": saved({"weight": torch.ones(1)}),
    "a damaged or half .safetensors file": (1000).to_bytes(8, "little") + b'{"a":' + bytes(20),
    "it holds argparse.Namespace, .* save the tensors alone": saved({**trainer(), "args": Namespace(pn="1_2_3")}),
    "it holds print, .* save the tensors alone": saved({"model": VAR, "code": Print()}),
    "or a damaged one": pickle.dumps({"model": 1, "code": Print()}),
    r"step \(int\) is no tensor with values": saved({"model": {**VAR, "step": 5}}),
    "head.bias is there with a wrapper's prefix and without": saved(VAR | {"module.head.bias": VAR["head.bias"]}),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_what_is_no_checkpoint_is_named(message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "file.pth", tmp_path / "out.safetensors"
    file.write_bytes(FOREIGN[message])
    with pytest.raises(CheckpointError, match=f"file.pth: not a checkpoint of FoundationVision/VAR.*{message}") as told:
        import_checkpoint(file, out, None, tmp_path / "vae.safetensors")
    assert "\n" not in str(told.value)
    assert not out.exists()
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head.bias": torch.full((16,), torch.inf)}, "head.bias has values that are not finite"),
        (
            {"head.bias": torch.ones(16, dtype=torch.int8)},
            "head.bias is torch.int8, .* dense floating point is expected",
        ),
        ({"head.bias": torch.ones(16).to_sparse()}, "head.bias is torch.float32, torch.sparse_coo"),
        ({"class_emb.weight": torch.ones(192)}, r"class_emb.weight has shape \(192,\); a matrix is expected"),
        ({"class_emb.weight": torch.ones(1, 192)}, "num_classes: Input should be greater than or equal to 1, not 0"),
    ],
)
def test_weights_that_no_model_can_have(changed: State, message: str, tmp_path: Path, tokenizer: Path) -> None:
    file, out = stored(tmp_path / "var.pth", VAR | changed), tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match=f"{message}[^\n]*$"):
        import_checkpoint(file, out, None, tokenizer)
    assert not out.exists()


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    circle: dict[str, Any] = {f"name{number}": {} for number in range(50)}
    for name in list(circle):
        circle[name] = circle
    assert list(read_contents(stored(tmp_path / "a.pth", {"a": circle, "b": VAR})).models) == ["b"]
