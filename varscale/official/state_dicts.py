"""Checkpoints of the reference implementation (github.com/FoundationVision/VAR), in and out.

Every size is read from the tensors. Buffers (masks, level indices, usage counters, the zero key bias) may be absent:
they hold nothing that cannot be computed.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from varscale.config.tokenizer import TokenizerArchitecture
from varscale.families.shared.attention import block_causal_mask, level_of_tokens
from varscale.families.var.config import VARConfig
from varscale.families.var.transformer import VAR
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

BUFFERS = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")
# fixed in the reference's code, so not in its tensors
NORM_GROUPS = 32
PHI_RATIO = 0.5
HEAD_CHANNELS = 64

State = Mapping[str, Tensor]

TOKENIZER_NAMES = (
    (r"^before_quantizer\.", "quant_conv."),
    (r"^after_quantizer\.", "post_quant_conv."),
    (r"^quantizer\.codebook_Vc$", "quantize.embedding.weight"),
    (r"\.input\.", ".conv_in."),
    (r"\.output\.", ".conv_out."),
    (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.attn_1."),
    (r"\.middle\.2\.", ".mid.block_2."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^(encoder\.down\.\d+)\.resample\.convolution\.", r"\1.downsample.conv."),
    (r"^(decoder\.levels\.\d+)\.resample\.convolution\.", r"\1.upsample.conv."),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.convolution_([12])\.", r".conv\1."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.queries_keys_values\.", ".qkv."),
    (r"\.projection\.", ".proj_out."),
)

VAR_NAMES = (
    (r"^word_embedding\.", "word_embed."),
    (r"^class_embedding\.", "class_emb."),
    (r"^start_MC$", "pos_start"),
    (r"^position_LC$", "pos_1LC"),
    (r"^level_KC$", "lvl_embed.weight"),
    (r"^shared_modulation\.", "shared_ada_lin.1."),
    (r"^head_modulation\.", "head_nm.ada_lin.1."),
    (r"\.modulation\.", ".ada_lin.1."),
    (r"\.modulation_offset_6C$", ".ada_gss"),
    (r"\.attention\.queries_keys_values\.", ".attn.mat_qkv."),
    (r"\.attention\.query_bias_C$", ".attn.q_bias"),
    (r"\.attention\.value_bias_C$", ".attn.v_bias"),
    (r"\.attention\.log_scale_H$", ".attn.scale_mul_1H11"),
    (r"\.attention\.projection\.", ".attn.proj."),
    (r"\.feedforward\.expand\.", ".ffn.fc1."),
    (r"\.feedforward\.contract\.", ".ffn.fc2."),
)

# parameters to which the reference gives axes of length 1
VAR_AXES: dict[str, Any] = {
    "pos_start": (None,),
    "pos_1LC": (None,),
    "ada_gss": (None, None),
    "scale_mul_1H11": (None, slice(None), None, None),
}


def load_tokenizer(state_dict: State, patch_nums: Sequence[int]) -> MultiScaleTokenizer:
    """Build the tokenizer that a reference checkpoint (such as vae_ch160v4096z32.pth) holds.

    Args:
        state_dict: The reference's keys; φ convolutions as `qresi_ls.i`, one `qresi`, or a plain list.
        patch_nums: Side of each scale's token map, which no tensor tells.

    Raises:
        ValueError: If keys are missing, left over, or have the wrong shape; names them.
    """
    vocab_size, latent_channels = _matrix(state_dict, "quantize.embedding.weight").shape
    base_channels = len(_required(state_dict, "encoder.conv_in.weight"))
    levels = _count(state_dict, r"encoder\.down\.(\d+)\.")
    channels = [len(_required(state_dict, f"encoder.down.{level}.block.0.conv1.weight")) for level in range(levels)]
    if any(count % base_channels for count in channels):
        raise ValueError(f"the checkpoint's channels {channels} are not multiples of encoder.conv_in's {base_channels}")
    architecture = TokenizerArchitecture(
        patch_nums=tuple(patch_nums),
        vocab_size=vocab_size,
        latent_channels=latent_channels,
        base_channels=base_channels,
        channel_multipliers=tuple(count // base_channels for count in channels),
        residual_blocks=_count(state_dict, r"encoder\.down\.0\.block\.(\d+)\."),
        attention="encoder.mid.attn_1.norm.weight" in state_dict,
        norm_groups=NORM_GROUPS,
        phi_count=max(1, _count(state_dict, r"quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)\.")),
        phi_ratio=PHI_RATIO,
    )
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(architecture)
    phi_prefix = next(
        (name for name in ("qresi_ls.0.", "qresi.", "0.") if f"quantize.quant_resi.{name}weight" in state_dict), ""
    )
    _fill(tokenizer, state_dict, lambda name: _tokenizer_name(name, tokenizer, phi_prefix), {})
    return tokenizer.eval()


def load_var(
    state_dict: State, tokenizer: MultiScaleTokenizer, *, heads: int | None = None, drop_path_rate: float = 0.0
) -> VAR:
    """Build the transformer that a reference checkpoint (such as var_d16.pth) holds.

    Args:
        state_dict: The reference's keys; own (`blocks.i.ada_lin.1`) or shared AdaLN (`shared_ada_lin.1`, `ada_gss`).
        tokenizer: Gives patch_nums, vocabulary and latent channels.
        heads: Number of attention heads; needed only where neither normalised queries and keys tell it nor the
            reference's 64 channels a head fit.
        drop_path_rate: For further training; no tensor tells it.

    Raises:
        ValueError: If keys are missing, left over, or have the wrong shape; names them.
    """
    classes, width = _matrix(state_dict, "class_emb.weight").shape
    scales_1H11 = state_dict.get("blocks.0.attn.scale_mul_1H11")
    if heads is None:
        heads = scales_1H11.numel() if scales_1H11 is not None else width // HEAD_CHANNELS
        if heads < 1 or width % heads:
            raise ValueError(
                f"the number of heads is not in the checkpoint, and the width {width} is not a multiple of 64"
            )
    scales = scales_of_levels(state_dict)
    if scales not in (None, tokenizer.patch_nums):
        raise ValueError(f"lvl_1L has patch_nums {scales}, but the tokenizer {tokenizer.patch_nums}")
    config = VARConfig(
        patch_nums=tokenizer.patch_nums,
        vocab_size=tokenizer.vocab_size,
        latent_channels=tokenizer.latent_channels,
        num_classes=classes - 1,
        depth=_depth(state_dict),
        width=width,
        heads=heads,
        mlp_ratio=len(_required(state_dict, "blocks.0.ffn.fc1.weight")) / width,
        drop_path_rate=drop_path_rate,
        shared_adaln="shared_ada_lin.1.weight" in state_dict,
        normalise_queries_keys=scales_1H11 is not None,
    )
    with torch.device("meta"):
        var = VAR(config)
    _fill(var, state_dict, _var_name, VAR_AXES)
    return var.eval()


def scales_of_levels(state_dict: State) -> tuple[int, ...] | None:
    """The patch_nums that a transformer was trained with, from its buffer `lvl_1L`; None where it has none.

    Raises:
        ValueError: The buffer doesn't have a square number of tokens a scale, one scale after the other.
    """
    if "lvl_1L" not in state_dict:
        return None
    levels, counts = state_dict["lvl_1L"].flatten().long().unique_consecutive(return_counts=True)
    sides = tuple(math.isqrt(count) for count in counts.tolist())
    if levels.tolist() != [*range(len(sides))] or [side**2 for side in sides] != counts.tolist():
        raise ValueError("lvl_1L doesn't have a square number of tokens a scale, one scale after the other")
    return sides


def export_tokenizer(tokenizer: MultiScaleTokenizer) -> dict[str, Tensor]:
    """The tokenizer as the reference's state dict, with the buffers that its own strict loading asks for.

    Raises:
        ValueError: If the tokenizer has settings that the reference cannot express.
    """
    architecture = tokenizer.architecture
    for name, fixed in (("quantizer", "codebook"), ("norm_groups", NORM_GROUPS), ("phi_ratio", PHI_RATIO)):
        if (value := getattr(architecture, name)) != fixed:
            raise ValueError(f"the reference's code has {name} {fixed}; a tokenizer with {value} cannot be exported")
    prefix = "qresi." if architecture.phi_count == 1 else "qresi_ls.0."
    state = {
        _tokenizer_name(name, tokenizer, prefix): tensor.detach().clone()
        for name, tensor in tokenizer.state_dict().items()
    }
    state["quantize.ema_vocab_hit_SV"] = torch.zeros(len(tokenizer.patch_nums), tokenizer.vocab_size)
    return state


def export_var(var: VAR) -> dict[str, Tensor]:
    """The transformer as the reference's state dict, with the buffers that its own strict loading asks for.

    Raises:
        ValueError: If the transformer's parametrization, blocks or classifier are none of the reference's.
    """
    if var.config.modern:
        raise ValueError("the reference's code has no modern block; such a model cannot be exported")
    if var.config.text_width is not None:
        raise ValueError("the reference's models are told classes, not captions; such a model cannot be exported")
    if var.config.classifier == "bits":
        raise ValueError("the reference's code has no classifier of bits; such a model cannot be exported")
    if (parametrization := var.config.parametrization) != "paper":
        raise ValueError(f"the reference's code has no factors of {parametrization}; such a model cannot be exported")
    state = {}
    for name, tensor in var.state_dict().items():
        theirs = _var_name(name)
        state[theirs] = tensor.detach().clone()[VAR_AXES.get(theirs.rsplit(".", 1)[-1], ...)]
    cpu = torch.device("cpu")
    state["lvl_1L"] = level_of_tokens(var.config.patch_nums, cpu).clone()[None]
    state["attn_bias_for_masking"] = block_causal_mask(var.config.patch_nums, cpu).clone()[None, None]
    for index in range(var.config.depth):
        state[f"blocks.{index}.attn.zero_k_bias"] = torch.zeros(var.config.width)
    return state


def _tokenizer_name(name: str, tokenizer: MultiScaleTokenizer, phi_prefix: str) -> str:
    """The reference's name of one of our parameters."""
    for pattern, replacement in TOKENIZER_NAMES:
        name = re.sub(pattern, replacement, name)
    # the reference numbers the decoder's levels from fine to coarse, against the order of computation
    last = len(tokenizer.architecture.channel_multipliers) - 1
    name = re.sub(r"^decoder\.levels\.(\d+)\.", lambda match: f"decoder.up.{last - int(match[1])}.", name)
    return re.sub(
        r"^quantizer\.phi\.(\d+)\.", lambda match: "quantize.quant_resi." + phi_prefix.replace("0", match[1]), name
    )


def _var_name(name: str) -> str:
    for pattern, replacement in VAR_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _required(state: State, name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the checkpoint has no {name}; its keys begin with {sorted(state)[:3]}")
    return state[name]


def _matrix(state: State, name: str) -> Tensor:
    matrix = _required(state, name)
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}; a matrix is expected")
    return matrix


def _depth(state: State) -> int:
    """How many blocks there are, if none between them is missing."""
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    missing = sorted(set(range(max(blocks, default=0))) - blocks)
    if missing:
        raise ValueError(f"block {missing[0]} of 0 … {max(blocks)} is missing; get the whole file")
    return len(blocks)


def _count(state: State, pattern: str) -> int:
    """How many different numbers stand at a place in the keys."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _fill(model: nn.Module, state: State, rename: Callable[[str], str], axes: Mapping[str, Any]) -> None:
    """Give a model on the meta device its weights, after checking that they are exactly what it needs."""
    names = {name: rename(name) for name in model.state_dict()}
    missing = sorted(set(names.values()) - set(state))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} keys: {_listed(missing)}")
    unknown = sorted(name for name in set(state) - set(names.values()) if not name.endswith(BUFFERS))
    if unknown:
        raise ValueError(f"the checkpoint has {len(unknown)} keys that the model does not: {_listed(unknown)}")
    weights = {}
    for ours, parameter in model.state_dict().items():
        theirs = names[ours]
        expected = tuple(parameter[axes.get(theirs.rsplit(".", 1)[-1], ...)].shape)
        if tuple(state[theirs].shape) != expected:
            raise ValueError(f"{theirs} has shape {tuple(state[theirs].shape)}; the model needs {expected}")
        if not state[theirs].is_floating_point() or state[theirs].layout != torch.strided:
            kind = f"{state[theirs].dtype}, {state[theirs].layout}"
            raise ValueError(f"{theirs} is {kind}, as of a compressed model; dense floating point is expected")
        if not state[theirs].to(torch.float32).isfinite().all():
            raise ValueError(f"{theirs} has values that are not finite: it diverged, or went beyond its precision")
        weights[ours] = state[theirs].detach().to(torch.float32).reshape(parameter.shape).clone()
    model.load_state_dict(weights, assign=True)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
