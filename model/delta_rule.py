"""The gated delta rule over a packed stream, each row by itself: a causal convolution, then a recurrent state.
Costs what transformers' module costs where flash-linear-attention is; elsewhere keeps q, k and v after the convolution,
the gate, and the outputs of rule and norm, of a third more positions at most, as batches are padded."""

from __future__ import annotations

import inspect
import sys
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from model.devices import on_gpu
from model.gated_delta import CHUNK, gated_delta_rule
from model.mixers import GAP, Segments

# T tokens of the stream, D hidden size, R segments, X positions of the stream with gaps; of a padded batch: B rows,
# L positions, C channels of queries, keys and values side by side, H value heads, V their size, W width of the convolution

PADDED_SHARE = 0.75  # no segment of a padded batch is shorter than this share of the longest


def packed_delta_rule(module: Any, x_1TD: Tensor, segments: Segments) -> Tensor:
    """transformers' gated delta rule, each segment to itself: [1, T, D].

    On CUDA with flash-linear-attention in one run of transformers' module over the stream, else in padded batches of
    segments, by this project's own kernels.
    """
    if on_gpu(x_1TD) and has_delta_kernels():
        return delta_rule_with_gaps(module, x_1TD, segments)
    return delta_rule_in_batches(module, x_1TD, segments)


def delta_rule_with_gaps(module: Any, x_1TD: Tensor, segments: Segments) -> Tensor:
    """One run over the stream, with zeros behind each segment.

    The kernel keeps the recurrent state of segments apart, but not every convolution that transformers may choose
    does. So each segment, as the kernel sees it, ends in zeros, as many as the convolution looks back or more: to the
    next segment's convolution they are what padding would be, and what they get themselves is dropped.
    """
    assert module.conv_kernel_size <= GAP + 1
    place_T, cu_seqlens_R1 = segments.with_gaps
    wide_1XD = x_1TD.new_zeros(1, x_1TD.shape[1] + GAP * len(segments.lengths), x_1TD.shape[2])
    wide_1XD = module(wide_1XD.index_copy(1, place_T, x_1TD), cu_seq_lens_q=cu_seqlens_R1)
    return wide_1XD.index_select(1, place_T)


def delta_rule_in_batches(module: Any, x_1TD: Tensor, segments: Segments) -> Tensor:
    """Right-padded batches of segments of similar length; what pads a row comes after it, and nothing looks ahead."""
    x_RD = x_1TD[0].split(segments.lengths)
    outputs: list[Tensor] = list(x_RD)
    for batch in similar(segments.lengths):
        y_BLD = padded_delta_rule(module, pad_sequence([x_RD[r] for r in batch], batch_first=True))
        for r, y_LD in zip(batch, y_BLD):
            outputs[r] = y_LD[: segments.lengths[r]]
    return torch.cat(outputs)[None]


def padded_delta_rule(module: Any, x_BLD: Tensor) -> Tensor:
    """What transformers' module computes from its linears, its norm and its parameters, with lean backward passes."""
    assert module.activation == "silu" and module.conv1d.bias is None
    qkv_BLC = CausalConvolution.apply(module.in_proj_qkv(x_BLD), module.conv1d.weight)
    z_BLHV = module.in_proj_z(x_BLD).unflatten(2, (module.num_v_heads, module.head_v_dim))
    beta_BLH = module.in_proj_b(x_BLD).sigmoid()
    g_BLH = -module.A_log.float().exp() * F.softplus(module.in_proj_a(x_BLD).float() + module.dt_bias)
    o_BLHV = gated_delta_rule(qkv_BLC, g_BLH, beta_BLH, module.num_k_heads, module.head_k_dim)
    return module.out_proj(module.norm(o_BLHV, z_BLHV).flatten(2))


class CausalConvolution(torch.autograd.Function):
    """Each channel by itself, with a frozen weight, looking back. Keeps nothing, where torch keeps its input."""

    @staticmethod
    def forward(ctx: Any, x_BLC: Tensor, weight_C1W: Tensor) -> Tensor:
        ctx.save_for_backward(weight_C1W)
        return convolve(x_BLC, weight_C1W)[:, : x_BLC.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLC: Tensor) -> tuple[Tensor, None]:
        (weight_C1W,) = ctx.saved_tensors
        return convolve(dy_BLC, weight_C1W.flip(2))[:, weight_C1W.shape[2] - 1 :], None


def convolve(x_BLC: Tensor, weight_C1W: Tensor) -> Tensor:
    """With as many positions more as the weight looks back: [B, L + W - 1, C]."""
    num_channels, _, width = weight_C1W.shape
    return F.conv1d(x_BLC.transpose(1, 2), weight_C1W, padding=width - 1, groups=num_channels).transpose(1, 2)


def similar(lengths: tuple[int, ...]) -> list[list[int]]:
    """The numbers of the segments, in batches of similar length: at most a third of the positions is padding."""
    batches: list[list[int]] = []
    for r in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if not batches or lengths[r] < PADDED_SHARE * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(r)
    return batches


def padded_positions(lengths: tuple[int, ...]) -> int:
    """Positions of all these batches together, padded as the rule pads them: to whole chunks."""
    return sum(len(batch) * -(-max(lengths[r] for r in batch) // CHUNK) * CHUNK for batch in similar(lengths))


@cache
def has_delta_kernels() -> bool:
    """Whether flash-linear-attention can be imported, which transformers then uses too."""
    try:
        return hasattr(import_module("fla.ops.gated_delta_rule"), "chunk_gated_delta_rule")
    except Exception:  # as transformers does: whatever triton or the driver raise, the reference is there
        return False


def use_reference_on_cpu(model: Any) -> None:
    """Makes transformers compute with torch alone, also where flash-linear-attention is installed: that needs a GPU.

    transformers chooses once, when it is imported, for all devices. Its own modules still run where text is generated.
    """
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            modeling = sys.modules[type(layer.linear_attn).__module__]
            for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
                setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))
