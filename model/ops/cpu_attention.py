"""Attention in half precision on a CPU, by matmuls over blocks of queries, so that not all scores exist at once.
Keeps q, k, v and the output for the backward pass, which computes the scores again; needs 10 MiB for one block."""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple

import torch
from torch import Tensor

from model.ops.compiled import Compiled, compiled

# T tokens of the stream, E head size, H query heads, G key/value heads, R query heads that share one of these; X rows: the R
# heads of each position one after another. Of a block: N key/value heads, M rows of each, S keys that they see

BLOCK_SCORES = 2**20  # of a block, if it has more than LEAST_ROWS positions
MOST_ROWS, LEAST_ROWS = 128, 16  # positions of a block


class CpuAttention(torch.autograd.Function):
    """Causal attention within each segment: [1, T, H, E]. Scores, softmax and sums over blocks are in float32."""

    @staticmethod
    def forward(
        ctx: Any, q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, scaling: float, lengths: tuple[int, ...]
    ) -> Tensor:
        room = Room(q_1HTE, k_1GTE.shape[1])
        q_GXE, k_GTE, v_GTE = (by_key_head(x, k_1GTE.shape[1]) for x in (q_1HTE, k_1GTE, v_1GTE))
        o_GXE = torch.empty_like(q_GXE)
        for block in room.blocks(lengths):
            scores_2NMS = room.scores(block, q_GXE, k_GTE, scaling)
            o_GXE[block.rows] = torch.bmm(by_row(weights, *scores_2NMS)[0], v_GTE[block.keys])
        o_1THE = by_position(o_GXE, q_1HTE)
        ctx.save_for_backward(q_1HTE, k_1GTE, v_1GTE, o_1THE)
        ctx.scaling, ctx.lengths = scaling, lengths
        return o_1THE

    @staticmethod
    def backward(ctx: Any, do_1THE: Tensor) -> tuple[Tensor | None, ...]:
        q_1HTE, k_1GTE, v_1GTE, o_1THE = ctx.saved_tensors
        room = Room(q_1HTE, num_groups := k_1GTE.shape[1])
        q_GXE, k_GTE, v_GTE = (by_key_head(x, num_groups) for x in (q_1HTE, k_1GTE, v_1GTE))
        # one more column subtracts, before the matmul rounds, about what the gradients of a query's weights are on average:
        # what is left of them is as exact as the score gradients made of it are passed on
        mean_1TH1 = (o_1THE.float() * do_1THE).sum(3, keepdim=True).to(do_1THE.dtype)
        do_GXK = by_key_head(torch.cat([do_1THE, mean_1TH1.neg_()], 3).transpose(1, 2), num_groups)
        v_GTK = torch.cat([v_GTE, torch.ones_like(v_GTE[..., :1])], 2)
        dq_GXE = torch.empty_like(q_GXE)
        dk_GTE, dv_GTE = k_GTE.new_zeros(2, *k_GTE.shape, dtype=torch.float32)
        for block in room.blocks(ctx.lengths):
            q_NME, do_NME = q_GXE[block.rows], do_GXK[block.rows][..., : q_GXE.shape[2]]
            scores_2NMS = room.scores(block, q_GXE, k_GTE, ctx.scaling)
            dweights_NMS = product(room.half_3X[2], do_GXK[block.rows], v_GTK[block.keys], ctx.scaling)
            weight_NMS, dscore_NMS = by_row(weights_and_dscores, *scores_2NMS, dweights_NMS)
            dv_GTE[block.keys] += torch.bmm(weight_NMS.transpose(1, 2), do_NME).float()
            dq_GXE[block.rows] = torch.bmm(dscore_NMS, k_GTE[block.keys])
            dk_GTE[block.keys] += torch.bmm(dscore_NMS.transpose(1, 2), q_NME).float()
        dq_1HTE, dk_1GTE, dv_1GTE = (by_position(x, q_1HTE).transpose(1, 2) for x in (dq_GXE, dk_GTE, dv_GTE))
        return dq_1HTE, dk_1GTE, dv_1GTE, None, None


def by_key_head(x_1HTE: Tensor, num_groups: int) -> Tensor:
    """[G, X, E] in that order in memory, so that the rows of a block are one piece of it; of keys and values [G, T, E]."""
    return x_1HTE[0].unflatten(0, (num_groups, -1)).transpose(1, 2).flatten(1, 2).contiguous()


def by_position(x_GXE: Tensor, like_1HTE: Tensor) -> Tensor:
    """[1, T, H, E] in that order in memory, as the projections leave and take it: the inverse of `by_key_head`."""
    x_TGRE = x_GXE.unflatten(1, (like_1HTE.shape[2], -1)).transpose(0, 1)
    return x_TGRE.to(like_1HTE.dtype, memory_format=torch.contiguous_format).flatten(1, 2)[None]


class Block(NamedTuple):
    """Some positions of all query heads that share some key/value heads, and what they see, as indices."""

    rows: tuple[slice, slice]  # of [G, X, E]
    keys: tuple[slice, slice]  # of [G, T, E]
    num_positions: int


class Room:
    """Where all blocks compute, one after another: to touch fresh memory takes longer than what is computed in it.
    Enough for a segment as long as the stream, so that memory does not depend on how rows are packed; what no block touches
    takes none.
    """

    def __init__(self, q_1HTE: Tensor, num_groups: int) -> None:
        _, num_heads, length, _ = q_1HTE.shape
        self.num_groups, self.num_shared = num_groups, num_heads // num_groups
        num_scores = min(num_heads * min(MOST_ROWS, length) * length, max(BLOCK_SCORES, self.num_shared * LEAST_ROWS * length))
        self.half_3X = q_1HTE.new_empty(3, num_scores)
        future = torch.ones(MOST_ROWS, MOST_ROWS, dtype=torch.bool, device=q_1HTE.device).triu_(1)
        self.future_MS = future.repeat_interleave(self.num_shared, 0)

    def blocks(self, lengths: tuple[int, ...]) -> Iterator[Block]:
        """The blocks of all segments, in order."""
        begin = 0
        for length in lengths:
            step = min(max(BLOCK_SCORES // (self.num_shared * length), LEAST_ROWS), MOST_ROWS, length)
            for start in range(begin, begin + length, step):
                stop = min(start + step, begin + length)
                num_heads = max(BLOCK_SCORES // (self.num_shared * (stop - start) * (stop - begin)), 1)
                for first in range(0, self.num_groups, num_heads):
                    heads = slice(first, min(first + num_heads, self.num_groups))
                    rows = slice(start * self.num_shared, stop * self.num_shared)
                    yield Block((heads, rows), (heads, slice(begin, stop)), stop - start)
            begin += length

    def scores(self, block: Block, q_GXE: Tensor, k_GTE: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """The block's scaled scores as a sum of two parts in half precision; those of later positions are -inf. Matmuls round
        at their end; a second one computes what the first lost, and both are still faster than one in float32."""
        q_NME, k_NSE = q_GXE[block.rows], k_GTE[block.keys]
        rounded_NMS = product(self.half_3X[0], q_NME, k_NSE, scaling)
        lost_NMS = product(self.half_3X[1], q_NME, k_NSE, scaling, less=rounded_NMS)
        num = block.num_positions
        rounded_NMS[..., -num:].masked_fill_(self.future_MS[: rounded_NMS.shape[1], :num], -torch.inf)
        return rounded_NMS, lost_NMS


def product(room_X: Tensor, x_NME: Tensor, y_NSE: Tensor, scaling: float, less: Tensor | None = None) -> Tensor:
    """scaling * x y^T, less another tensor if one is given, in `room_X`."""
    shape = torch.Size((*x_NME.shape[:2], y_NSE.shape[1]))
    result_NMS = room_X[: shape.numel()].view(shape)
    if less is not None:
        result_NMS.copy_(less)
    return result_NMS.baddbmm_(x_NME, y_NSE.transpose(1, 2), beta=0 if less is None else -1, alpha=scaling)


def by_row(function: Compiled, *parts_NMS: Tensor) -> list[Tensor]:
    """The results of a function of rows, each [N, M, S]."""
    rows = [part_NMS.flatten(0, 1) for part_NMS in parts_NMS]
    plain = parts_NMS[0].shape[2] == 1  # a single key would be a case of its own
    results = (function.plain if plain else function)(*rows)
    return [result.view(parts_NMS[0].shape) for result in ([results] if isinstance(results, Tensor) else results)]


@compiled("attention", columns_vary=True)
def weights(rounded_MS: Tensor, lost_MS: Tensor) -> Tensor:
    """How much of each value a query takes."""
    return torch.softmax(rounded_MS.float() + lost_MS.float(), 1).to(rounded_MS.dtype)


@compiled("attention", columns_vary=True)
def weights_and_dscores(rounded_MS: Tensor, lost_MS: Tensor, dweights_MS: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the gradients of the scores, from those of the weights less any number by row."""
    weight_MS, dweights_MS = torch.softmax(rounded_MS.float() + lost_MS.float(), 1), dweights_MS.float()
    dscore_MS = weight_MS * (dweights_MS - (weight_MS * dweights_MS).sum(1, keepdim=True))
    return weight_MS.to(rounded_MS.dtype), dscore_MS.to(rounded_MS.dtype)
