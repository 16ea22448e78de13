"""The gated delta rule over a packed stream, each row separately: a causal convolution, then a recurrent state.
Keeps q, k and v after the convolution, the gate, and the output of the rule for the backward pass. With flash-linear-attention
on a GPU also its normalized copies; without, in this project's own functions, padding makes q, k and v up to a third larger.
"""

from __future__ import annotations

import inspect
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from model.devices import OFF, on_gpu
from model.matmul import project
from model.mixers import Segments
from model.ops.gated_delta import (
    CHUNK,
    gated_delta_rule,
    gated_delta_rule_with_state,
)
from model.ops.gates import DeltaGates

# T tokens of the stream, D hidden size, R segments; of a padded batch: B rows, L positions; C channels of queries, keys and
# values side by side, H value heads, G key heads, V and K their sizes, W width of the convolution, N positions near a bound

PADDED_SHARE = 0.75  # no segment of a padded batch is shorter than this share of the longest
FIRST_FLA = Version("0.6.0")  # older kernels race on Blackwell
HOPPER, WRONG_ON_HOPPER = 9, (Version("3.4.0"), Version("3.7.1"))  # from, and before: Triton's gradients are wrong there


def packed_delta_rule(module: Any, x_1TD: Tensor, segments: Segments) -> Tensor:
    """The output [1, T, D] of transformers' gated delta rule, computed with its parameters for each segment separately.

    On a GPU with flash-linear-attention by one kernel over the whole stream (the fast path "delta_rule"), else by this
    project's own functions over padded batches of segments, the reference.
    """
    assert module.activation == "silu" and module.conv1d.bias is None
    qkv_1TC, z_1TX = project(x_1TD, module.in_proj_qkv, module.in_proj_z)
    a_TH, b_TH = (linear(x_1TD).flatten(0, 1) for linear in (module.in_proj_a, module.in_proj_b))
    g_1TH, beta_1TH = (x[None] for x in DeltaGates.apply(a_TH, b_TH, module.A_log, module.dt_bias))
    if segments.memory is not None:
        o_1THV = segments.memory.delta_rule(module, qkv_1TC, g_1TH, beta_1TH, segments)
    else:
        o_1THV = mixed(qkv_1TC, g_1TH, beta_1TH, module.conv1d.weight, module.num_k_heads, module.head_k_dim, segments)
    return module.out_proj(module.norm(o_1THV, z_1TX.view(o_1THV.shape)).flatten(2))


def mixed(
    qkv_1TC: Tensor, g_1TH: Tensor, beta_1TH: Tensor, weight_C1W: Tensor, key_heads: int, key_size: int, segments: Segments
) -> Tensor:
    """Convolution and rule: [1, T, H, V] from queries, keys and values side by side, log decays and betas."""
    rule = rule_over_stream if takes_kernel(qkv_1TC) else rule_in_batches
    return rule(qkv_1TC, g_1TH, beta_1TH, weight_C1W, key_heads, key_size, segments)


def rule_in_batches(
    qkv_1TC: Tensor, g_1TH: Tensor, beta_1TH: Tensor, weight_C1W: Tensor, key_heads: int, key_size: int, segments: Segments
) -> Tensor:
    """Convolution and rule over batches of segments of similar length: [1, T, H, V]. Padding follows a row, and no position
    looks ahead to it."""
    stream_RLX = [x[0].split(segments.lengths) for x in (qkv_1TC, g_1TH, beta_1TH)]
    outputs: list[Any] = [None] * len(segments.lengths)
    for batch in similar(segments.lengths):
        qkv_BLC, g_BLH, beta_BLH = (pad_sequence([x[r] for r in batch], batch_first=True) for x in stream_RLX)
        o_BLHV = gated_delta_rule(CausalConvolution.apply(qkv_BLC, weight_C1W), g_BLH, beta_BLH, key_heads, key_size)
        for r, o_LHV in zip(batch, o_BLHV):
            outputs[r] = o_LHV[: segments.lengths[r]]
    return torch.cat(outputs)[None]


def rule_with_states(
    qkv_1TC: Tensor, g_1TH: Tensor, beta_1TH: Tensor, weight_C1W: Tensor, key_heads: int, key_size: int, segments: Segments
) -> tuple[Tensor, list[Tensor]]:
    """As `rule_in_batches`, without a backward pass, and the state after each segment: R times [H, K, V] in float32."""
    stream_RLX = [x[0].split(segments.lengths) for x in (qkv_1TC, g_1TH, beta_1TH)]
    outputs: list[Any] = [None] * len(segments.lengths)
    states: list[Any] = [None] * len(segments.lengths)
    for batch in similar(segments.lengths):
        qkv_BLC, g_BLH, beta_BLH = (pad_sequence([x[r] for r in batch], batch_first=True) for x in stream_RLX)
        qkv_BLC = CausalConvolution.apply(qkv_BLC, weight_C1W)
        # padding has decay 1 and beta 0, so that it leaves the state as the row's last position left it
        o_BLHV, state_BHKV = gated_delta_rule_with_state(qkv_BLC, g_BLH, beta_BLH, key_heads, key_size)
        for r, o_LHV, state_HKV in zip(batch, o_BLHV, state_BHKV):
            outputs[r], states[r] = o_LHV[: segments.lengths[r]], state_HKV
    return torch.cat(outputs)[None], states


def rule_over_stream(
    qkv_1TC: Tensor, g_1TH: Tensor, beta_1TH: Tensor, weight_C1W: Tensor, key_heads: int, key_size: int, segments: Segments
) -> Tensor:
    """Convolution and rule over the whole stream; both know where segments begin: [1, T, H, V]."""
    qkv_1TC = F.silu(StreamConvolution.apply(qkv_1TC, weight_C1W, segments.cu_seqlens_R1))
    num_keys = key_heads * key_size
    q, k, v = qkv_1TC.split([num_keys, num_keys, qkv_1TC.shape[2] - 2 * num_keys], dim=2)
    q_1TGK, k_1TGK = (x.unflatten(2, (key_heads, key_size)) for x in (q, k))
    return kernel(q_1TGK, k_1TGK, v.unflatten(2, (g_1TH.shape[2], -1)), g_1TH, beta_1TH, segments)


def kernel(
    q_1TGK: Tensor, k_1TGK: Tensor, v_1THV: Tensor, g_1TH: Tensor, beta_1TH: Tensor, segments: Segments
) -> Tensor:
    """The rule by flash-linear-attention, called directly: transformers' choice of an implementation has no say here."""
    os.environ.setdefault("FLA_FLASH_QLA", "0")  # else another package, where installed, would take over in evaluations
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    assert inspect.unwrap(chunk_gated_delta_rule).__module__.startswith("fla.ops."), "another function took the kernel's place"
    cu_seqlens_R1, on_cpu_R1 = segments.for_kernels
    output_1THV: Tensor = chunk_gated_delta_rule(
        q_1TGK, k_1TGK, v_1THV, g_1TH, beta_1TH, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens_R1,
        cu_seqlens_cpu=on_cpu_R1)[0]
    return output_1THV


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


class StreamConvolution(torch.autograd.Function):
    """CausalConvolution of each segment of a stream. The whole stream is convolved at once, and the few positions whose
    window reaches into another segment are computed again without the part that lies there."""

    @staticmethod
    def forward(ctx: Any, x_1TC: Tensor, weight_C1W: Tensor, cu_seqlens_R1: Tensor) -> Tensor:
        ctx.save_for_backward(weight_C1W, cu_seqlens_R1)
        back = weight_C1W.shape[2] - 1
        y_1TC = convolve(x_1TC, weight_C1W)[:, : x_1TC.shape[1]]
        start_R1, stop_R1 = cu_seqlens_R1[:-1, None], cu_seqlens_R1[1:, None]
        place_RN = torch.minimum(start_R1 + torch.arange(back, device=x_1TC.device), stop_R1 - 1)  # the first of each segment
        return within(y_1TC, x_1TC, weight_C1W, place_RN, place_RN[..., None] - back, start_R1, stop_R1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_1TC: Tensor) -> tuple[Tensor, None, None]:
        weight_C1W, cu_seqlens_R1 = ctx.saved_tensors
        flipped_C1W, back = weight_C1W.flip(2), weight_C1W.shape[2] - 1
        dx_1TC = convolve(dy_1TC, flipped_C1W)[:, back:]
        start_R1, stop_R1 = cu_seqlens_R1[:-1, None], cu_seqlens_R1[1:, None]
        place_RN = torch.maximum(stop_R1 - 1 - torch.arange(back, device=dy_1TC.device), start_R1)  # the last of each segment
        return within(dx_1TC, dy_1TC, flipped_C1W, place_RN, place_RN[..., None], start_R1, stop_R1), None, None


def within(
    y_1TC: Tensor, x_1TC: Tensor, weight_C1W: Tensor, place_RN: Tensor, first_RN1: Tensor, start_R1: Tensor, stop_R1: Tensor
) -> Tensor:
    """Computes the positions `place_RN` of y again, each from the part of its window, which begins at `first_RN1`, that lies
    in its own segment. A place may occur twice, and then has the same value twice."""
    source_RNW = first_RN1 + torch.arange(weight_C1W.shape[2], device=x_1TC.device)
    inside_RNW = (source_RNW >= start_R1[..., None]) & (source_RNW < stop_R1[..., None])
    x_RNWC = x_1TC[0][source_RNW.clamp(0, x_1TC.shape[1] - 1)] * inside_RNW[..., None]
    y_RNC = (x_RNWC.float() * weight_C1W[:, 0].T.float()).sum(2).to(y_1TC.dtype)
    return y_1TC.index_copy_(1, place_RN.flatten().long(), y_RNC.flatten(0, 1)[None])


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


def takes_kernel(tensor: Tensor) -> bool:
    """Whether `rule_over_stream` is taken."""
    return "delta_rule" not in OFF and on_gpu(tensor) and not why_no_kernel(
        torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else None)


@cache
def why_no_kernel(generation: int | None) -> str:
    """Why flash-linear-attention cannot be used on a GPU, in words; "" if it can.

    Args:
        generation: the first number of the card's compute capability, such as 9 for Hopper; None for a card that is not here.
    """
    try:
        fla, triton = Version(version("fla-core")), Version(version("triton"))
    except PackageNotFoundError as error:
        return f"{error.name} is not installed"
    if fla < FIRST_FLA:
        return f"flash-linear-attention is {fla}, at least {FIRST_FLA} is needed"
    if generation == HOPPER and WRONG_ON_HOPPER[0] <= triton < WRONG_ON_HOPPER[1]:
        return f"Triton {triton} computes wrong gradients on this card; {WRONG_ON_HOPPER[1]} or later is needed"
    return ""
