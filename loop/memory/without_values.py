"""Takes the memory of weights and of a kernel for tensors without values: what cannot run on them, and what need not be read.
Costs some kilobytes a tensor, whatever its shape."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any, Iterator
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from loop.memory.counter import note
from model import bnb, delta_rule
from model.build import Weights
from model.devices import planning_for
from model.ops.gated_delta import CHUNK
from model.ops.work import Work
from model.quant import nf4_tables
from model.weights.shards import Weight

DELTA_RULE_LAUNCHES = 10


@contextmanager
def without_values(device_type: str, card: int | None = None, mode: FakeTensorMode | None = None) -> Iterator[None]:
    """While the context lasts, new tensors have shapes and no values, and take the code path of `device_type`.

    Args:
        card: the generation of the card, as in model/devices.py; on such a card the kernels of the extra [gpu] are taken.
        mode: of the tensors that are used again from an earlier context, else a new one.
    """
    nf4_tables()  # which are kept from their first use on, with values
    is_there = patch.object(delta_rule, "why_no_kernel", lambda generation: "") if card else nullcontext()
    # bitsandbytes keeps its 8-bit type for the next tensor that is quantized, here a type without values
    with (patch.dict(bnb.name2qmap), planning_for(device_type, card), is_there,
          patch.object(delta_rule, "kernel", fake_kernel), mode or FakeTensorMode(allow_non_fake_inputs=True)):
        yield


class FakeDeltaRule(torch.autograd.Function):
    """Takes and keeps the memory of flash-linear-attention's rule (0.6.0), which cannot run on tensors without values."""

    @staticmethod
    def forward(
        ctx: Any, q_1TGK: Tensor, k_1TGK: Tensor, v_1THV: Tensor, g_1TH: Tensor, beta_1TH: Tensor, num_chunks: int
    ) -> Tensor:
        contiguous = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_1TGK, k_1TGK)]
        # kept: q and k normalized, with their norms; v in order of memory; the sums of g; a matrix [64, 64] a chunk
        q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_1TGK, k_1TGK, v_1THV))
        norms = [x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q, k)]
        inverse_1THC = v.new_empty(*v.shape[:3], CHUNK)
        ctx.save_for_backward(q, k, v, *norms, torch.empty_like(g_1TH), beta_1TH, inverse_1THC)
        ctx.num_chunks = num_chunks
        working = delta_rule_results(k, v, num_chunks)  # kept until the outputs are computed
        output_1THV = torch.empty_like(v)
        note("delta rule", "fla::chunk_gated_delta_rule", q.dtype, delta_rule_work(
            [*contiguous, q, k, v, *norms, inverse_1THC, *working, output_1THV], k, v, times=1))
        del working, contiguous
        return output_1THV

    @staticmethod
    def backward(ctx: Any, do_1THV: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _, g_1TH, beta_1TH, _ = ctx.saved_tensors
        working = delta_rule_results(k, v, ctx.num_chunks)  # again
        dstates = delta_rule_results(k, v, ctx.num_chunks)[-1]
        wide = [v.new_empty(*v.shape[:3], k.shape[3]) for _ in range(3)]  # gradients of v, w, and k for each value head
        grads = tuple(torch.empty_like(x) for x in (q, k, v, g_1TH, beta_1TH))
        note("delta rule", "fla::chunk_gated_delta_rule_backward", q.dtype, delta_rule_work(
            [q, k, v, do_1THV, *working, dstates, *wide, *grads], k, v, times=3))
        del working, dstates, wide
        return *grads, None


def delta_rule_results(k_1TGK: Tensor, v_1THV: Tensor, num_chunks: int) -> list[Tensor]:
    """w, u, the new values, and the state before each chunk."""
    length, heads, size = v_1THV.shape[1:]
    w_1THK = v_1THV.new_empty(1, length, heads, k_1TGK.shape[3])
    states_NHKV = v_1THV.new_empty(num_chunks, heads, k_1TGK.shape[3], size)
    return [w_1THK, torch.empty_like(v_1THV), torch.empty_like(v_1THV), states_NHKV]


def delta_rule_work(tensors: list[Tensor], k_1TGK: Tensor, v_1THV: Tensor, times: int) -> Work:
    """Each tensor written or read twice in all, and `times` the matmuls of a forward pass, by some ten kernels."""
    key, value = k_1TGK.shape[3], v_1THV.shape[3]
    flops = v_1THV.shape[1] * v_1THV.shape[2] * (6 * key * value + 4 * CHUNK * (key + value))
    return Work(times * flops, 2 * sum(x.nbytes for x in tensors), DELTA_RULE_LAUNCHES)


def fake_kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, segments: Any) -> Tensor:
    """In place of `model.delta_rule.kernel`."""
    return FakeDeltaRule.apply(q, k, v, g, beta, sum(-(-length // CHUNK) for length in segments.lengths))


def put_nothing(weights: Weights) -> None:
    """Gives every weight its storage. The experts of a layer are alike, so that one shows what quantizing all takes."""
    for item in weights.wanted:
        if isinstance(item, Weight):
            item.put(0, torch.empty(item.shape, dtype=torch.bfloat16))
        else:
            gate_up_2ID = torch.empty(2 * item.intermediate, item.hidden, dtype=torch.bfloat16)
            item.put(0, gate_up_2ID, torch.empty(item.hidden, item.intermediate, dtype=torch.bfloat16))
