"""Attention over a packed stream, each row separately: no token ever sees another row.
Keeps q, k, v and the output for the backward pass; the matrix of all scores never exists."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.devices import OFF, ON, on_gpu
from model.ops.cpu_attention import CpuAttention

# T tokens of the stream, R segments, H query heads, G key/value heads, E head size


class Memory(Protocol):
    """What a decoder keeps of each layer from token to token (model/decode/cache.py). Takes the mixers' place."""

    def attention(
        self, layer: int, q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, scaling: float, segments: Segments
    ) -> Tensor:
        """Output [1, T, H, E], as of `stream_attention`."""

    def delta_rule(self, module: Any, qkv_1TC: Tensor, g_1TH: Tensor, beta_1TH: Tensor, segments: Segments) -> Tensor:
        """Output [1, T, H, V], as of `mixed` in model/delta_rule.py."""


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed stream begin and end: a device tensor for kernels, plain numbers for slicing."""

    cu_seqlens_R1: Tensor  # int32
    lengths: tuple[int, ...]
    memory: Memory | None = None  # only while decoding

    @cached_property
    def for_kernels(self) -> tuple[Tensor, Tensor]:
        """`cu_seqlens_R1` in int64, on its device and on the CPU. Made once: flash-linear-attention keeps what it computes
        for a tensor, and would wait for the device to read one that is not on the CPU."""
        return self.cu_seqlens_R1.long(), torch.tensor([0, *accumulate(self.lengths)])


def stream_attention(q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, scaling: float, segments: Segments) -> Tensor:
    """Causal attention within each segment: [1, T, H, E]. In half precision on a GPU one call of flash attention for the whole
    stream (the fast path "attention"), on a CPU blocks of matmuls with compiled
    code between them ("cpu_attention"); else one call for each segment."""
    if q_1HTE.dtype != torch.float32 and on_gpu(q_1HTE) and "attention" not in OFF:
        return varlen_attention(q_1HTE, k_1GTE, v_1GTE, scaling, segments)
    if q_1HTE.dtype == torch.bfloat16 and not on_gpu(q_1HTE) and "cpu_attention" not in OFF and "compiled" in ON:
        output_1THE: Tensor = CpuAttention.apply(q_1HTE, k_1GTE, v_1GTE, scaling, segments.lengths)
        return output_1THE
    return plain_attention(q_1HTE, k_1GTE, v_1GTE, scaling, segments.lengths)


def plain_attention(
    q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, scaling: float, lengths: tuple[int, ...]
) -> Tensor:
    """One call of torch's attention for each segment; the reference for both others."""
    if q_1HTE.is_cuda and q_1HTE.dtype == torch.float32:  # only attention that holds all scores takes shared heads there
        k_1GTE, v_1GTE = (x.repeat_interleave(q_1HTE.shape[1] // x.shape[1], dim=1) for x in (k_1GTE, v_1GTE))
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (q_1HTE, k_1GTE, v_1GTE)))
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def varlen_attention(q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, scaling: float, segments: Segments) -> Tensor:
    """All segments in one kernel (torch 2.11 or newer, CUDA). Repeats key/value heads only for a kernel that cannot share
    them between query heads, because the repeated heads are kept for the backward pass."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (q_1HTE, k_1GTE, v_1GTE))
    num_groups = q.shape[1] // k.shape[1]
    groups: dict[str, Any] = {}
    if num_groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        groups["enable_gqa"] = True
    elif num_groups > 1:
        k, v = (x.repeat_interleave(num_groups, dim=1) for x in (k, v))
    longest, cu = max(segments.lengths), segments.cu_seqlens_R1
    output_THE: Any = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0), **groups)
    return output_THE[None]
