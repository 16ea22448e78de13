"""The gated delta rule in plain PyTorch, forward and backward by hand, where flash-linear-attention is not available.
Keeps the inputs and a state every 1,024 positions (14 MiB at 8,192 of Qwen3.5-35B-A3B). Needs 170 MiB forward and 260
MiB backward, because it runs block by block (gated_delta_block.py): some heads of all rows in some neighbouring chunks.
The backward pass recomputes each block from the state before the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.gated_delta_block import Block, input_gradients, output_gradients

# B rows, L positions, X channels of q, k and v side by side, G key heads, H value heads, K key size, V value size,
# C positions of a chunk, P pairs of a row and a value head in a block, N chunks of each pair, Z = N * P chunks of a block

CHUNK = 64  # positions, as in transformers and flash-linear-attention
BLOCK_CHUNKS = 16  # most neighbouring chunks of a block
BLOCK = 512  # largest Z, except where one key head exceeds it; a float32 tensor of 128 channels then takes 16 MiB


def gated_delta_rule(qkv_BLX: Tensor, g_BLH: Tensor, beta_BLH: Tensor, key_heads: int, key_size: int) -> Tensor:
    """`torch_chunk_gated_delta_rule` of transformers, applied to SiLU(q), SiLU(k) and SiLU(v): [B, L, H, V].

    Computed in float32 and rounded at the end to the dtype of `qkv_BLX`.

    Args:
        qkv_BLX: q, k and v side by side, after the convolution and before SiLU.
        g_BLH: logarithms of the decays, 0 or less.
        beta_BLH: the share of an old value that the new value replaces.
        key_heads, key_size: number and size of the heads of q and of k; each serves equally many neighbouring heads of v.
    """
    return GatedDeltaRule.apply(qkv_BLX, g_BLH, beta_BLH, key_heads, key_size)


@torch.no_grad()
def gated_delta_rule_with_state(
    qkv_BLX: Tensor, g_BLH: Tensor, beta_BLH: Tensor, key_heads: int, key_size: int
) -> tuple[Tensor, Tensor]:
    """As `gated_delta_rule`, without a backward pass, and the state after the last position: [B, H, K, V] in float32."""
    inputs = Heads.of(qkv_BLX, g_BLH, beta_BLH, key_heads, key_size)
    o_BLHV = torch.empty_like(inputs.v_BLHV, memory_format=torch.contiguous_format)
    states: list[Tensor] = []
    for spans in inputs.blocks():
        state_PKV = None
        for span in spans:
            state_PKV = forward_block(inputs.part(span), state_PKV, span.of(o_BLHV, inputs.ratio))
        assert state_PKV is not None
        states.append(state_PKV.unflatten(0, (len(qkv_BLX), -1)))  # of this block's heads
    return o_BLHV, torch.cat(states, dim=1)


class GatedDeltaRule(torch.autograd.Function):
    """Runs block by block: forward in order, passing the state on; backward in reverse, passing the state's gradient on."""

    @staticmethod
    def forward(ctx: Any, qkv_BLX: Tensor, g_BLH: Tensor, beta_BLH: Tensor, key_heads: int, key_size: int) -> Tensor:
        inputs = Heads.of(qkv_BLX, g_BLH, beta_BLH, key_heads, key_size)
        o_BLHV = torch.empty_like(inputs.v_BLHV, memory_format=torch.contiguous_format)
        states: list[Tensor] = []  # the state before each block, except each head's first block
        for spans in inputs.blocks():
            state_PKV = None
            for span in spans:
                if state_PKV is not None:
                    states.append(state_PKV)
                state_PKV = forward_block(inputs.part(span), state_PKV, span.of(o_BLHV, inputs.ratio))
        ctx.save_for_backward(qkv_BLX, g_BLH, beta_BLH, *states)
        ctx.key_heads, ctx.key_size = key_heads, key_size
        return o_BLHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BLHV: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BLX, g_BLH, beta_BLH, *states = ctx.saved_tensors
        inputs = Heads.of(qkv_BLX, g_BLH, beta_BLH, ctx.key_heads, ctx.key_size)
        dqkv_BLX, dg_BLH, dbeta_BLH = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (qkv_BLX, g_BLH, beta_BLH))
        dinputs = Heads.of(dqkv_BLX, dg_BLH, dbeta_BLH, ctx.key_heads, ctx.key_size)
        for spans in reversed(inputs.blocks()):
            dstate_PKV = None
            for span in reversed(spans):
                state_PKV = states.pop() if span.positions.start > 0 else None
                dstate_PKV = backward_block(
                    inputs.part(span), state_PKV, span.of(do_BLHV, inputs.ratio), dstate_PKV, dinputs.part(span))
        torch.ops.aten.silu_backward.grad_input(dqkv_BLX, qkv_BLX, grad_input=dqkv_BLX)
        return dqkv_BLX, dg_BLH, dbeta_BLH, None, None


def forward_block(heads: Heads, state_PKV: Tensor | None, o_BLHV: Tensor) -> Tensor:
    """Writes a block's outputs, and returns the state after it."""
    block = heads.in_chunks()
    states_NPKV = block.states(state_PKV)[0]
    del block.write_ZCK  # makes room for the outputs, which are as large
    from_chunks(block.outputs(states_NPKV[:-1].flatten(0, 1)), o_BLHV)
    return states_NPKV[-1].clone()  # a copy, so that the states before it are freed


def backward_block(
    heads: Heads, state_PKV: Tensor | None, do_BLHV: Tensor, dstate_PKV: Tensor | None, dheads: Heads
) -> Tensor:
    """Writes the gradients of a block's SiLU(q), SiLU(k), SiLU(v), g and beta; returns that of the state before the block."""
    block = heads.in_chunks()
    grads, dstate_PKV = output_gradients(block, state_PKV, to_chunks(do_BLHV), dstate_PKV)
    outs = (dheads.q_BLGK, dheads.k_BLGK, dheads.v_BLHV, dheads.g_BLH[..., None], dheads.beta_BLH[..., None])
    for grad, out in zip(input_gradients(block, grads), outs):
        from_chunks(grad, out)
    return dstate_PKV


# Blocks


@dataclass(frozen=True)
class Span:
    """The positions and key heads of a block."""

    positions: slice
    key_heads: slice

    def of(self, x_BLHV: Tensor, ratio: int) -> Tensor:
        """The block's part of a tensor with `ratio` heads for each key head."""
        return x_BLHV[:, self.positions, self.key_heads.start * ratio : self.key_heads.stop * ratio]


@dataclass(frozen=True)
class Heads:
    """Views of the inputs, or of their gradients, for some heads at some positions."""

    q_BLGK: Tensor
    k_BLGK: Tensor
    v_BLHV: Tensor
    g_BLH: Tensor
    beta_BLH: Tensor
    ratio: int  # value heads for each key head

    @classmethod
    def of(cls, qkv_BLX: Tensor, g_BLH: Tensor, beta_BLH: Tensor, key_heads: int, key_size: int) -> Heads:
        num_keys, heads = key_heads * key_size, g_BLH.shape[2]
        q, k, v = qkv_BLX.split([num_keys, num_keys, qkv_BLX.shape[2] - 2 * num_keys], dim=2)
        q, k = (x.unflatten(2, (key_heads, key_size)) for x in (q, k))
        return cls(q, k, v.unflatten(2, (heads, -1)), g_BLH, beta_BLH, heads // key_heads)

    def blocks(self) -> list[list[Span]]:
        """All blocks: one list for each set of heads, ordered by position."""
        rows, length, key_heads, _ = self.k_BLGK.shape
        chunks = min(-(-length // CHUNK), BLOCK_CHUNKS)
        heads = max(BLOCK // (chunks * rows * self.ratio), 1)
        positions = [slice(t, min(t + chunks * CHUNK, length)) for t in range(0, length, chunks * CHUNK)]
        return [[Span(p, slice(h, min(h + heads, key_heads))) for p in positions] for h in range(0, key_heads, heads)]

    def part(self, span: Span) -> Heads:
        q, k = span.of(self.q_BLGK, 1), span.of(self.k_BLGK, 1)
        v, g, beta = (span.of(x, self.ratio) for x in (self.v_BLHV, self.g_BLH, self.beta_BLH))
        return Heads(q, k, v, g, beta, self.ratio)

    def in_chunks(self) -> Block:
        q, k, v = (to_chunks(F.silu(x)) for x in (self.q_BLGK, self.k_BLGK, self.v_BLHV))
        g, beta = (to_chunks(x[..., None]) for x in (self.g_BLH, self.beta_BLH))
        return Block(q, k, v, g, beta, self.g_BLH.shape[0] * self.g_BLH.shape[2], self.ratio)


def to_chunks(x_BLHV: Tensor) -> Tensor:
    """[B, L, H, V] to [Z, C, V] in float32, chunk by chunk for all rows and heads, zeros behind the last position."""
    if x_BLHV.shape[1] % CHUNK:
        x_BLHV = F.pad(x_BLHV, (0, 0, 0, 0, 0, -x_BLHV.shape[1] % CHUNK))
    x_NBHCV = x_BLHV.unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4)
    return x_NBHCV.to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 2)


def from_chunks(x_ZCV: Tensor, out_BLHV: Tensor) -> None:
    """The inverse of `to_chunks`, written into `out_BLHV`."""
    rows, length, heads, size = out_BLHV.shape
    x_BNCHV = x_ZCV.view(-1, rows, heads, CHUNK, size).permute(1, 0, 3, 2, 4)
    out_BLHV.copy_(x_BNCHV.to(out_BLHV.dtype, memory_format=torch.contiguous_format).flatten(1, 2)[:, :length])
