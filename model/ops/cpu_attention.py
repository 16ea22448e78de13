"""Attention in half precision on a CPU, by matmuls over blocks of queries that fit a core's cache.
Keeps q, k, v and the output for the backward pass, which computes the scores again; needs 6 MiB for the scores of one block."""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple

import torch
from torch import Tensor

from model.ops.compiled import Compiled, compiled

# T tokens of the stream, L of one segment, E head size, H query heads, G key/value heads, N of them in a block, R query heads
# that share one of these; M queries of a block: some positions of R heads; S keys that a block sees

BLOCK_SCORES = 2**19  # of a block, if it has more than LEAST_ROWS positions
MOST_ROWS, LEAST_ROWS = 128, 16  # positions of a block


class CpuAttention(torch.autograd.Function):
    """Causal attention within each segment: [1, T, H, E]. Scores, softmax and sums over blocks are in float32."""

    @staticmethod
    def forward(
        ctx: Any, q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, scaling: float, lengths: tuple[int, ...]
    ) -> Tensor:
        o_1HTE, room = empty_heads(q_1HTE), Room(q_1HTE, k_1GTE.shape[1])
        for q_GRLE, k_G1LE, v_G1LE, o_GRLE in by_segment(lengths, k_1GTE.shape[1], q_1HTE, k_1GTE, v_1GTE, o_1HTE):
            segment = Segment(q_GRLE, k_G1LE, v_G1LE, scaling, room)
            for block in segment.blocks():
                scores_2NMS = segment.scores(block, block.rows(q_GRLE))
                block.put(o_GRLE, torch.bmm(by_row(weights, *scores_2NMS)[0], block.seen(segment.v_GLE)))
        ctx.save_for_backward(q_1HTE, k_1GTE, v_1GTE, o_1HTE)
        ctx.scaling, ctx.lengths = scaling, lengths
        return o_1HTE.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, do_1THE: Tensor) -> tuple[Tensor | None, ...]:
        q_1HTE, k_1GTE, v_1GTE, o_1HTE = ctx.saved_tensors
        grads = [empty_heads(x) for x in (q_1HTE, k_1GTE, v_1GTE)]
        room = Room(q_1HTE, k_1GTE.shape[1])
        for q_GRLE, k_G1LE, v_G1LE, o_GRLE, do_GRLE, dq_GRLE, dk_G1LE, dv_G1LE in by_segment(
                ctx.lengths, k_1GTE.shape[1], q_1HTE, k_1GTE, v_1GTE, o_1HTE, do_1THE.transpose(1, 2), *grads):
            segment = Segment(q_GRLE, k_G1LE, v_G1LE, ctx.scaling, room)
            # the mean of each position's score gradients
            mean_GRL1 = o_GRLE.float().mul_(do_GRLE.float()).sum(3, keepdim=True).mul_(ctx.scaling)
            sums_2GLE = segment.k_GLE.new_zeros(2, *segment.k_GLE.shape, dtype=torch.float32)
            for block in segment.blocks():
                q_NME, do_NME = block.rows(q_GRLE), block.rows(do_GRLE)
                dk_NSE, dv_NSE = (block.seen(x) for x in sums_2GLE)
                dweights_2NMS = segment.product(do_NME, block.seen(segment.v_GLE), room.half_4X[2:])
                weight_NMS, dscore_NMS = by_row(
                    weights_and_dscores, *segment.scores(block, q_NME), *dweights_2NMS, block.rows(mean_GRL1))
                dv_NSE += torch.bmm(weight_NMS.transpose(1, 2), do_NME).float()
                block.put(dq_GRLE, torch.bmm(dscore_NMS, block.seen(segment.k_GLE)))
                dk_NSE += torch.bmm(dscore_NMS.transpose(1, 2), q_NME).float()
            dk_G1LE[:, 0], dv_G1LE[:, 0] = sums_2GLE
        return *grads, None, None


def empty_heads(like_1HTE: Tensor) -> Tensor:
    """Heads follow positions in memory, as the projections leave and take them."""
    return like_1HTE.new_empty(like_1HTE.transpose(1, 2).shape).transpose(1, 2)


def by_segment(lengths: tuple[int, ...], num_groups: int, *tensors_1HTE: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The segments of each tensor, [G, R, L, E]; R is 1 for keys and values."""
    return zip(*(x_1HTE[0].unflatten(0, (num_groups, -1)).split(lengths, dim=2) for x_1HTE in tensors_1HTE))


class Block(NamedTuple):
    """Some positions of all query heads that share some key/value heads."""

    heads: slice
    start: int
    stop: int

    def rows(self, x_GRLE: Tensor) -> Tensor:
        """The block's part of queries, or of what is shaped like them, [N, M, E]: positions of R heads, head by head."""
        return x_GRLE[self.heads, :, self.start : self.stop].flatten(1, 2)

    def put(self, x_GRLE: Tensor, rows_NME: Tensor) -> None:
        x_GRLE[self.heads, :, self.start : self.stop] = rows_NME.unflatten(1, (-1, self.stop - self.start))

    def seen(self, x_GLE: Tensor) -> Tensor:
        """The keys or values that the block sees, [N, S, E]."""
        return x_GLE[self.heads, : self.stop]


def positions_of_block(num_shared: int, length: int) -> int:
    return min(max(BLOCK_SCORES // (num_shared * length), LEAST_ROWS), MOST_ROWS, length)


class Room:
    """Where all blocks compute, one after another: to touch fresh memory takes longer than what is computed in it.
    Enough for a segment as long as the stream, so that memory does not depend on how rows are packed; what no block touches
    takes none.
    """

    def __init__(self, q_1HTE: Tensor, num_groups: int) -> None:
        _, num_heads, length, _ = q_1HTE.shape
        num_scores = min(num_heads * min(MOST_ROWS, length) * length,
                         max(BLOCK_SCORES, num_heads // num_groups * LEAST_ROWS * length))
        self.half_4X = q_1HTE.new_empty(4, num_scores)
        self.future = torch.ones(MOST_ROWS, MOST_ROWS, dtype=torch.bool, device=q_1HTE.device).triu_(1)


class Segment:
    """One segment in blocks."""

    def __init__(self, q_GRLE: Tensor, k_G1LE: Tensor, v_G1LE: Tensor, scaling: float, room: Room) -> None:
        self.q_GRLE, self.k_GLE, self.v_GLE = q_GRLE, k_G1LE[:, 0].contiguous(), v_G1LE[:, 0].contiguous()
        self.scaling, self.room = scaling, room

    def blocks(self) -> Iterator[Block]:
        num_groups, num_shared, length, _ = self.q_GRLE.shape
        num_rows = positions_of_block(num_shared, length)
        for start in range(0, length, num_rows):
            stop = min(start + num_rows, length)
            num_heads = max(BLOCK_SCORES // (num_shared * (stop - start) * stop), 1)
            for first in range(0, num_groups, num_heads):
                yield Block(slice(first, min(first + num_heads, num_groups)), start, stop)

    def scores(self, block: Block, q_NME: Tensor) -> tuple[Tensor, Tensor]:
        """The block's scaled scores as `product` gives them, those of later positions -inf."""
        rounded_NMS, lost_NMS = self.product(q_NME, block.seen(self.k_GLE), self.room.half_4X[:2])
        num = block.stop - block.start
        rounded_NMS.unflatten(1, (-1, num))[..., block.start :].masked_fill_(self.room.future[:num, :num], -torch.inf)
        return rounded_NMS, lost_NMS

    def product(self, x_NME: Tensor, y_NSE: Tensor, room_2X: Tensor) -> tuple[Tensor, Tensor]:
        """scaling * x y^T as a sum of two parts in half precision, until `room_2X` is used again. Matmuls round at their end;
        the second one computes what the first lost, and both together are still faster than one in float32."""
        shape = torch.Size((*x_NME.shape[:2], y_NSE.shape[1]))
        rounded, lost = (x_X[: shape.numel()].view(shape) for x_X in room_2X)
        rounded.baddbmm_(x_NME, y_NSE.transpose(1, 2), beta=0, alpha=self.scaling)
        torch.baddbmm(rounded, x_NME, y_NSE.transpose(1, 2), beta=-1, alpha=self.scaling, out=lost)
        return rounded, lost


def by_row(function: Compiled, *parts_NMX: Tensor) -> list[Tensor]:
    """The results of a function of rows, each [N, M, S]."""
    rows = [part_NMX.flatten(0, 1) for part_NMX in parts_NMX]
    plain = parts_NMX[0].shape[2] == 1  # a single key would be a case of its own
    results = (function.plain if plain else function)(*rows)
    return [result.view(parts_NMX[0].shape) for result in ([results] if isinstance(results, Tensor) else results)]


@compiled("attention", columns_vary=True)
def weights(rounded_MS: Tensor, lost_MS: Tensor) -> Tensor:
    """How much of each value a query takes."""
    return torch.softmax(rounded_MS.float() + lost_MS.float(), 1).to(rounded_MS.dtype)


@compiled("attention", columns_vary=True)
def weights_and_dscores(
    rounded_MS: Tensor, lost_MS: Tensor, drounded_MS: Tensor, dlost_MS: Tensor, mean_M1: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights and the gradients of the scores, from those of the weights and the mean of each query's score gradients."""
    weight_MS = torch.softmax(rounded_MS.float() + lost_MS.float(), 1)
    dscore_MS = (drounded_MS.float() + dlost_MS.float() - mean_M1) * weight_MS
    return weight_MS.to(rounded_MS.dtype), dscore_MS.to(rounded_MS.dtype)
