"""Token mixers over a packed stream, each row by itself: what one row holds never reaches another.
Attention keeps q, k, v and its output for the backward pass; scores never exist as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

# T tokens of the stream, R segments, H query heads, G key/value heads, E head size

PACKED = "packed"  # the attention implementation that build.py asks transformers for


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed stream begin and end, on the device for kernels and as numbers for slicing."""

    cu_seqlens_R1: Tensor  # int32
    lengths: tuple[int, ...]


def packed_attention(
    module: Any, q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, attention_mask: None,
    scaling: float, segments: Segments, **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each segment to itself; called by transformers' attention modules.

    Flash attention over the whole stream on CUDA (half precision), else one call a segment.

    Returns:
        Output [1, T, H, E], and no weights.
    """
    if q_1HTE.is_cuda and q_1HTE.dtype != torch.float32:
        return varlen_attention(q_1HTE, k_1GTE, v_1GTE, scaling, segments), None
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(x.split(segments.lengths, dim=2) for x in (q_1HTE, k_1GTE, v_1GTE)))
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def varlen_attention(q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, scaling: float, segments: Segments) -> Tensor:
    """The same in one kernel (torch 2.11 or newer, CUDA)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (q_1HTE, k_1GTE, v_1GTE))
    num_groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(num_groups, dim=1) if num_groups > 1 else x for x in (k, v))
    longest = max(segments.lengths)
    cu = segments.cu_seqlens_R1
    # the kernel scales by 1 / sqrt(E) itself
    q = q * (scaling * q.shape[-1] ** 0.5) if abs(scaling * q.shape[-1] ** 0.5 - 1) > 1e-6 else q
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))[None]


AttentionInterface.register(PACKED, packed_attention)
