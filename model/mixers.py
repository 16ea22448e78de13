"""Attention over a packed stream, each row separately: no token ever sees another row.
Keeps q, k, v and the output for the backward pass; the matrix of all scores never exists."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from model.devices import on_gpu

# T tokens of the stream, R segments, H query heads, G key/value heads, E head size

GAP = 7  # zeros behind each segment, so that no convolution sees the segment before; Qwen3.5's looks back 3
PACKED = "packed"  # the name by which build.py asks transformers for `packed_attention`


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed stream begin and end: a device tensor for kernels, plain numbers for slicing."""

    cu_seqlens_R1: Tensor  # int32
    lengths: tuple[int, ...]

    @cached_property
    def with_gaps(self) -> tuple[Tensor, Tensor]:
        """For a stream with GAP zeros behind each segment: the new place [T] of each token, and the new bounds [R + 1]."""
        number_R1 = torch.arange(len(self.lengths) + 1, device=self.cu_seqlens_R1.device)
        number_T = number_R1[:-1].repeat_interleave(self.cu_seqlens_R1.diff(), output_size=sum(self.lengths))
        place_T = torch.arange(len(number_T), device=number_T.device) + GAP * number_T
        return place_T, self.cu_seqlens_R1 + GAP * number_R1.int()


def packed_attention(
    module: Any, q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, attention_mask: None,
    scaling: float, segments: Segments, **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment; called by transformers' attention modules.

    On a GPU in half precision one call of flash attention for the whole stream, else one call for each segment.

    Returns:
        Output [1, T, H, E], and None in place of the attention weights.
    """
    if on_gpu(q_1HTE) and q_1HTE.dtype != torch.float32:
        return varlen_attention(q_1HTE, k_1GTE, v_1GTE, scaling, segments), None
    return plain_attention(q_1HTE, k_1GTE, v_1GTE, scaling, segments.lengths), None


def plain_attention(
    q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, scaling: float, lengths: tuple[int, ...]
) -> Tensor:
    """One call of torch's attention for each segment; the reference for `varlen_attention`."""
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


AttentionInterface.register(PACKED, packed_attention)
