"""The gated delta rule over a packed stream, each row separately: a causal convolution, then a recurrent state.
With flash-linear-attention the rule takes the memory of transformers' module. Without, the backward pass keeps q, k and v after
the convolution, the gate, and the outputs of rule and norm; padding makes each of these up to a third larger."""

from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from model.mixers import GAP, Segments
from model.ops.gated_delta import CHUNK, gated_delta_rule

# T tokens of the stream, D hidden size, R segments, X positions of the stream with gaps; of a padded batch: B rows,
# L positions, C channels of queries, keys and values side by side, H value heads, V their size, W width of the convolution

PADDED_SHARE = 0.75  # no segment of a padded batch is shorter than this share of the longest


def packed_delta_rule(module: Any, x_1TD: Tensor, segments: Segments) -> Tensor:
    """transformers' gated delta rule, applied to each segment separately: [1, T, D].

    On CUDA with flash-linear-attention transformers' module runs once over the whole stream. Otherwise this project's
    own functions run over padded batches of segments.
    """
    if x_1TD.is_cuda and has_delta_kernels():
        return delta_rule_with_gaps(module, x_1TD, segments)
    return delta_rule_in_batches(module, x_1TD, segments)


def delta_rule_with_gaps(module: Any, x_1TD: Tensor, segments: Segments) -> Tensor:
    """Runs transformers' module once over the stream, with GAP zeros behind each segment.

    The kernel starts a new recurrent state at each segment, but some convolutions that transformers may choose look
    back into the segment before. The convolution looks back at most GAP positions, so at the head of a segment it sees
    zeros, as it would see padding. The outputs at the zeros are dropped.
    """
    assert module.conv_kernel_size <= GAP + 1
    place_T, cu_seqlens_R1 = segments.with_gaps
    wide_1XD = x_1TD.new_zeros(1, x_1TD.shape[1] + GAP * len(segments.lengths), x_1TD.shape[2])
    wide_1XD = module(wide_1XD.index_copy(1, place_T, x_1TD), cu_seq_lens_q=cu_seqlens_R1)
    return wide_1XD.index_select(1, place_T)


def delta_rule_in_batches(module: Any, x_1TD: Tensor, segments: Segments) -> Tensor:
    """Runs over batches of segments of similar length. Padding follows a row, and no position looks ahead to it."""
    x_RD = x_1TD[0].split(segments.lengths)
    outputs: list[Tensor] = list(x_RD)
    for batch in similar(segments.lengths):
        y_BLD = padded_delta_rule(module, pad_sequence([x_RD[r] for r in batch], batch_first=True))
        for r, y_LD in zip(batch, y_BLD):
            outputs[r] = y_LD[: segments.lengths[r]]
    return torch.cat(outputs)[None]


def padded_delta_rule(module: Any, x_BLD: Tensor) -> Tensor:
    """The output of transformers' module, computed with its parameters, but with less kept for the backward pass."""
    assert module.activation == "silu" and module.conv1d.bias is None
    qkv_BLC = CausalConvolution.apply(module.in_proj_qkv(x_BLD), module.conv1d.weight)
    z_BLHV = module.in_proj_z(x_BLD).unflatten(2, (module.num_v_heads, module.head_v_dim))
    beta_BLH = module.in_proj_b(x_BLD).sigmoid()
    g_BLH = -module.A_log.float().exp() * F.softplus(module.in_proj_a(x_BLD).float() + module.dt_bias)
    o_BLHV = gated_delta_rule(qkv_BLC, g_BLH, beta_BLH, module.num_k_heads, module.head_k_dim)
    return module.out_proj(module.norm(o_BLHV, z_BLHV).flatten(2))


class CausalConvolution(torch.autograd.Function):
    """Convolves each channel with its own frozen weight, looking back only. Does not keep its input, as torch would."""

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
    """Convolves each channel after padding both ends with W - 1 zeros: [B, L + W - 1, C]."""
    num_channels, _, width = weight_C1W.shape
    return F.conv1d(x_BLC.transpose(1, 2), weight_C1W, padding=width - 1, groups=num_channels).transpose(1, 2)


def similar(lengths: tuple[int, ...]) -> list[list[int]]:
    """The segments' numbers in batches of similar length, which padding makes at most a third larger."""
    batches: list[list[int]] = []
    for r in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if not batches or lengths[r] < PADDED_SHARE * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(r)
    return batches


def padded_positions(lengths: tuple[int, ...]) -> int:
    """The number of positions of all batches of `similar`, each row padded to whole chunks as in the rule."""
    return sum(len(batch) * -(-max(lengths[r] for r in batch) // CHUNK) * CHUNK for batch in similar(lengths))


@cache
def has_delta_kernels() -> bool:
    """Whether flash-linear-attention can be imported; if so, transformers uses it too."""
    try:
        return hasattr(import_module("fla.ops.gated_delta_rule"), "chunk_gated_delta_rule")
    except Exception:  # as in transformers: triton or the driver may raise anything
        return False


@contextmanager
def reference_on_cpu(model: Any) -> Iterator[None]:
    """Lets transformers' modules of a model on a CPU compute with torch alone, so that they can generate text. Where
    flash-linear-attention is installed, transformers chooses it on import for all devices, although it needs a GPU."""
    modules = {sys.modules[type(layer.linear_attn).__module__] for layer in model.model.layers if hasattr(layer, "linear_attn")}
    chosen = [(module, name, getattr(module, name)) for module in modules if not next(model.parameters()).is_cuda
              for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn", "torch_recurrent_gated_delta_rule",
                           "causal_conv1d_update") if hasattr(module, name)]
    for module, name, function in chosen:
        setattr(module, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for module, name, function in chosen:
            setattr(module, name, function)
