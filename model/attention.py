"""Self-attention in the place of transformers' modules: projections, norms of the heads, rotary positions, attention, output.
Keeps for the backward pass the input, the heads before their norms, q, k, v, the output, and the gate where there is one."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from model.matmul import project
from model.mixers import Segments, stream_attention
from model.ops.gates import SigmoidGate
from model.ops.heads import PlaceHeads
from model.ops.norms import FusedNorm

# T tokens of the stream, D hidden size, H query heads, G key/value heads, E head size, S of it rotated, X heads side by side

ATTENTIONS = ("LlamaAttention", "Qwen3Attention", "Qwen3MoeAttention")
GATED_ATTENTIONS = ("Qwen3_5MoeAttention",)  # q_proj also gives each head's gate, after its query


class Attention(nn.Module):
    """Causal attention within each segment, with the parameters and names of a module of transformers.

    Its four linears may be quantized and adapted. Heads are normed where the module has `q_norm` and `k_norm`.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: FusedNorm
    k_norm: FusedNorm

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.layer_idx, self.head_size, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.is_gated = type(attention).__name__ in GATED_ATTENTIONS
        for name, child in attention.named_children():
            self.add_module(name, child)

    def forward(self, x_1TD: Tensor, rotary: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """The output [1, T, D] from normed hidden states and the rotary tables, cosines and sines [1, T, S]."""
        q, k, v = project(x_1TD, self.q_proj, self.k_proj, self.v_proj)
        q_1THE, k_1TGE, v_1TGE = (x.unflatten(2, (-1, size)) for x, size in (
            (q, self.head_size * (1 + self.is_gated)), (k, self.head_size), (v, self.head_size)))
        q_1THE, *gate = q_1THE.split(self.head_size, dim=3)
        norms = (self.q_norm, self.k_norm) if hasattr(self, "q_norm") else None
        q_THE, k_TGE = PlaceHeads.apply(q_1THE.flatten(0, 1), k_1TGE.flatten(0, 1), norms, *(x.flatten(0, 1) for x in rotary))
        q_1HTE, k_1GTE = q_THE.transpose(0, 1)[None], k_TGE.transpose(0, 1)[None]
        attend = stream_attention if segments.memory is None else partial(segments.memory.attention, self.layer_idx)
        o_1THE = attend(q_1HTE, k_1GTE, v_1TGE.transpose(1, 2), self.scaling, segments)
        if self.is_gated:
            o_1THE = SigmoidGate.apply(o_1THE.flatten(0, 1), gate[0].flatten(0, 1), None)[None]
        y_1TD: Tensor = self.o_proj(o_1THE.flatten(2))
        return y_1TD
