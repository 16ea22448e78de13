"""The routed experts of a layer by Triton kernels over all experts at once, on cards for which torch has no grouped matmul.
Needs two tensors [S, I] in the backward pass, one in the forward pass, and one [T, D] in both, however tokens are routed.

The plain loop in experts.py is the reference. Nothing here waits for the device, and a layer takes some 20 launches each way.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor, library

from model.devices import PLANNED, generation, on_gpu
from model.moe.expert_weights import ExpertMatrices, Int8Matrices, Nf4Matrices
from model.ops.work import Work, declare

# T tokens, K experts a token, S = T * K assignments, E experts, D hidden size, I intermediate size, X either,
# C some columns of D

STORED = {1: "plain", len(Int8Matrices.PARTS): "int8", len(Nf4Matrices.PARTS): "nf4"}
TILE = 64  # sizes of matrices are multiples of it


class Shape(NamedTuple):
    """What a program of a kernel computes, for cards with 99 KB of shared memory a block.

    A stage of the pipeline holds what a step of DEPTH reads; most is read from weights that are stored in bf16. `hidden`:
    64 * (128 + 2 * 64) * 2 bytes = 32 KB, `columns`: 64 * (128 + 64) * 2 = 24 KB, `hidden_backward`:
    32 * (2 * 128 + 3 * 64) * 2 = 28 KB. Two stages and a dequantized tile of 8 KB fit. Sums take 32 registers a thread and
    product, of which `hidden_backward` has three. More rows would dequantize less often, and fill up more: an expert has
    256 of 65,536 assignments.
    """

    ROWS: int = 128
    COLUMNS: int = TILE
    DEPTH: int = 64
    num_warps: int = 8
    num_stages: int = 3


SHAPES = {"hidden": Shape(), "columns": Shape(), "hidden_backward": Shape(DEPTH=32)}


def fits(x_TD: Tensor, hidden: int, intermediate: int) -> bool:
    """Whether a card computes such experts by the kernels: not Hopper and data-center Blackwell, where torch has its own.

    A plan for a card takes Triton for granted, since torch's builds for CUDA bring it.
    """
    return (on_gpu(x_TD) and generation(x_TD) not in (9, 10, None) and x_TD.dtype == torch.bfloat16
            and hidden % TILE == intermediate % TILE == 0 and (bool(PLANNED) or has_triton()))


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


# Forward and backward


def forward(
    x_TD: Tensor, weight_TK: Tensor, order_S: Tensor, bounds_E1: Tensor, gate_up: ExpertMatrices, down: ExpertMatrices
) -> Tensor:
    """[T, D], from the sorted assignments and each expert's bounds among them, as of `routing.sort_by_expert`."""
    h_SI = hidden(x_TD.contiguous(), order_S, bounds_E1, gate_up.parts(), down.shape_EOI[2], weight_TK.shape[1])
    return summed(h_SI, weight_TK, order_S, bounds_E1, down.parts(), x_TD.shape[1], backward=False)


def backward(
    x_TD: Tensor, weight_TK: Tensor, dout_TD: Tensor, order_S: Tensor, bounds_E1: Tensor, gate_up: ExpertMatrices,
    down: ExpertMatrices, needs_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of hidden states and routing weights."""
    dgate_up_S2I, dweight_CS = hidden_backward(
        x_TD.contiguous(), dout_TD.contiguous(), weight_TK.contiguous(), order_S, bounds_E1, gate_up.parts(), down.parts(),
        down.shape_EOI[2])
    dweight_TK = dweight_CS.sum(0).to(weight_TK.dtype).view(weight_TK.shape)
    if not needs_dx:
        return None, dweight_TK
    return summed(dgate_up_S2I, weight_TK, order_S, bounds_E1, gate_up.parts(), x_TD.shape[1], backward=True), dweight_TK


def summed(
    rows_SX: Tensor, weight_TK: Tensor, order_S: Tensor, bounds_E1: Tensor, matrices: list[Tensor], hidden: int, backward: bool
) -> Tensor:
    """[T, D]: the sum over each token's experts of its rows times their matrices; as many columns of D at a time as take
    the memory of the result."""
    num_tokens, top_k = weight_TK.shape
    out_TD = rows_SX.new_empty(num_tokens, hidden)
    num = max(hidden // top_k // TILE, 1) * TILE
    for first in range(0, hidden, num):
        y_SC = columns(rows_SX, weight_TK.contiguous(), order_S, bounds_E1, matrices, hidden, first,
                       min(num, hidden - first), backward)
        torch.sum(y_SC.unflatten(0, (num_tokens, top_k)), dim=1, out=out_TD[:, first : first + num])
        del y_SC  # before the next columns
    return out_TD


# The kernels as operators, which a plan counts without running them. Each has a function for its empty results.


def empty_hidden(x_TD: torch.Tensor, order_S: torch.Tensor, bounds_E1: torch.Tensor, gate_up: list[torch.Tensor],
                 intermediate: int, top_k: int) -> torch.Tensor:
    return x_TD.new_empty(len(order_S), intermediate)


def empty_hidden_backward(
    x_TD: torch.Tensor, dout_TD: torch.Tensor, weight_TK: torch.Tensor, order_S: torch.Tensor, bounds_E1: torch.Tensor,
    gate_up: list[torch.Tensor], down: list[torch.Tensor], intermediate: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (x_TD.new_empty(len(order_S), 2 * intermediate),
            x_TD.new_empty(intermediate // SHAPES["hidden_backward"].COLUMNS, len(order_S), dtype=torch.float32))


def empty_columns(
    x_SX: torch.Tensor, weight_TK: torch.Tensor, order_S: torch.Tensor, bounds_E1: torch.Tensor, matrices: list[torch.Tensor],
    hidden: int, first: int, num: int, backward: bool,
) -> torch.Tensor:
    return x_SX.new_empty(len(x_SX), num)


@library.custom_op("coach::experts_hidden", mutates_args=())
def hidden(x_TD: torch.Tensor, order_S: torch.Tensor, bounds_E1: torch.Tensor, gate_up: list[torch.Tensor],
           intermediate: int, top_k: int) -> torch.Tensor:
    h_SI = empty_hidden(x_TD, order_S, bounds_E1, gate_up, intermediate, top_k)
    start("hidden", intermediate, bounds_E1, h_SI, x_TD, order_S, bounds_E1, gate_up, D=x_TD.shape[1], INNER=intermediate,
          K=top_k)
    return h_SI


@library.custom_op("coach::experts_hidden_backward", mutates_args=())
def hidden_backward(
    x_TD: torch.Tensor, dout_TD: torch.Tensor, weight_TK: torch.Tensor, order_S: torch.Tensor, bounds_E1: torch.Tensor,
    gate_up: list[torch.Tensor], down: list[torch.Tensor], intermediate: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    results = empty_hidden_backward(x_TD, dout_TD, weight_TK, order_S, bounds_E1, gate_up, down, intermediate)
    start("hidden_backward", intermediate, bounds_E1, *results, x_TD, dout_TD, weight_TK, order_S, bounds_E1, gate_up, down,
          len(order_S), D=x_TD.shape[1], INNER=intermediate, K=weight_TK.shape[1])
    return results


@library.custom_op("coach::experts_columns", mutates_args=())
def columns(
    x_SX: torch.Tensor, weight_TK: torch.Tensor, order_S: torch.Tensor, bounds_E1: torch.Tensor, matrices: list[torch.Tensor],
    hidden: int, first: int, num: int, backward: bool,
) -> torch.Tensor:
    y_SC = empty_columns(x_SX, weight_TK, order_S, bounds_E1, matrices, hidden, first, num, backward)
    start("columns", num, bounds_E1, y_SC, x_SX, weight_TK, order_S, bounds_E1, matrices, first, num, D=hidden,
          X=x_SX.shape[1], BACKWARD=backward)
    return y_SC


def start(name: str, num_columns: int, bounds_E1: Tensor, *arguments: Any, **sizes: int) -> None:
    """Starts a kernel for all tiles that there can be; the device alone knows how many there are."""
    from model.moe import expert_kernel

    shape, num_experts, dtype = SHAPES[name], len(bounds_E1) - 1, arguments[0].dtype
    num_rows = len(arguments[0])
    num_tiles = num_rows // shape.ROWS + min(num_experts, num_rows)
    parts = next(a for a in arguments if isinstance(a, list))
    # Triton's interpreter multiplies bf16 as if its bits were an integer's
    operand = torch.float32 if os.environ.get("TRITON_INTERPRET") == "1" else dtype
    if num_tiles:
        getattr(expert_kernel, name)[num_columns // shape.COLUMNS, num_tiles](
            *(tuple(a) if isinstance(a, list) else a for a in arguments), **sizes, **shape._asdict(), E=num_experts,
            EXPERTS=1 << (num_experts - 1).bit_length(), STORED=STORED[len(parts)],
            OPERAND=getattr(expert_kernel.tl, str(operand).removeprefix("torch.")))


for operator, empty in ((hidden, empty_hidden), (hidden_backward, empty_hidden_backward), (columns, empty_columns)):
    operator.register_fake(empty)


def rows_of(order_S: Tensor, bounds_E1: Tensor, kernel: str) -> float:
    """The rows that a kernel multiplies: on average half of each expert's last tile is filled up."""
    return len(order_S) + min(len(bounds_E1) - 1, len(order_S)) * SHAPES[kernel].ROWS / 2


def moved(results: Sequence[Tensor], *read: Tensor, share: float = 1.0, stored: Sequence[Tensor]) -> float:
    """Bytes: a row of each of `read` for each assignment, weights in their stored form, each once, and results."""
    return (sum(len(results[0]) * x.shape[1] * x.element_size() for x in read) + share * sum(x.nbytes for x in stored)
            + sum(x.nbytes for x in results))


declare("coach::experts_hidden", "experts", lambda a, r: Work(
    4 * rows_of(a[1], a[2], "hidden") * a[0].shape[1] * a[4], moved(r, a[0], stored=a[3])))
declare("coach::experts_hidden_backward", "experts", lambda a, r: Work(
    6 * rows_of(a[3], a[4], "hidden_backward") * a[0].shape[1] * a[7], moved(r, a[0], a[1], stored=[*a[5], *a[6]])))
declare("coach::experts_columns", "experts", lambda a, r: Work(
    2 * rows_of(a[2], a[3], "columns") * a[0].shape[1] * a[7], moved(r, a[0], share=a[7] / a[5], stored=a[4])))
