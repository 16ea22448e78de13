"""Quantized experts compute what the dequantized weights would, forward and backward, in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from model.moe import experts as experts_module
from model.moe.expert_weights import MATRICES
from model.moe.experts import FrozenExperts, LoraExperts, working_bytes
from model.moe.routing import groups_of, sort_by_expert, spans

CPU = torch.device("cpu")
BASES = ("nf4", "int8", "bf16")


def make(base: str, dtype: torch.dtype, num_experts: int = 16, hidden: int = 64, intermediate: int = 48) -> FrozenExperts:
    torch.manual_seed(0)
    experts = FrozenExperts(num_experts, hidden, intermediate, base, dtype, CPU)
    for e in range(num_experts):
        experts.put(e, (torch.randn(2 * intermediate, hidden) * hidden**-0.5).bfloat16(),
                    (torch.randn(hidden, intermediate) * intermediate**-0.5).bfloat16())
    return experts


def inputs(experts: FrozenExperts, num_tokens: int, top_k: int = 4, num_hit: int | None = None) -> tuple[Tensor, ...]:
    """Hidden states, indices and weights; only every other one of the first `num_hit` experts is chosen."""
    torch.manual_seed(1)
    probabilities_TE = torch.randn(num_tokens, num_hit or experts.num_experts).softmax(-1)
    probabilities_TE[:, 1::2] *= 1 if num_hit is None else 0
    weight_TK, index_TK = probabilities_TE.topk(top_k)
    weight_TK = (weight_TK / weight_TK.sum(-1, keepdim=True)).to(experts.dtype)
    x_TD = torch.randn(num_tokens, experts.hidden).to(experts.dtype)
    return x_TD.requires_grad_(), index_TK, weight_TK.requires_grad_()


def reference(experts: FrozenExperts, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor,
              down_EDI: Tensor) -> Tensor:
    """transformers' own loop over experts (Qwen3_5MoeExperts.forward, its reference implementation)."""
    out_TD = torch.zeros_like(x_TD)
    for e in range(experts.num_experts):
        token_N, k_N = torch.where(index_TK == e)
        gate, up = F.linear(x_TD[token_N], gate_up_E2ID[e]).chunk(2, dim=-1)
        y_ND = F.linear(F.silu(gate) * up, down_EDI[e])
        out_TD = out_TD.index_add(0, token_N, y_ND * weight_TK[token_N, k_N, None])
    return out_TD


def dequantized(experts: FrozenExperts) -> tuple[Tensor, Tensor]:
    return (experts.gate_up_proj.dequantize(0, experts.num_experts),
            experts.down_proj.dequantize(0, experts.num_experts))


def difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# Storage


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (6, 10), (1, 8), (512, 128)])
def test_nf4_is_bitsandbytes_expert_by_expert(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = MATRICES["nf4"]((5, *shape), torch.bfloat16, CPU)
    weights = torch.randn(5, *shape).bfloat16()
    for e in (3, 0, 4, 1, 2):
        matrices.put(e, weights[e])
    for first, stop in ((0, 5), (1, 2), (2, 5)):
        for e, matrix in zip(range(first, stop), matrices.dequantize(first, stop)):
            packed, state = bnb.quantize_4bit(weights[e], blocksize=64, compress_statistics=True, quant_type="nf4")
            assert torch.equal(matrix, bnb.dequantize_4bit(packed, state))
            assert torch.equal(matrices.packed_EB[e, : packed.numel()], packed.flatten())
            assert torch.equal(matrices.absmax_EA[e, : len(state.absmax)], state.absmax)


def test_int8_is_bitsandbytes_row_by_row() -> None:
    weights = torch.randn(3, 32, 24).bfloat16()
    matrices = MATRICES["int8"](weights.shape, torch.float32, CPU)
    for e in range(3):
        matrices.put(e, weights[e])
        quantized, absmax, _ = bnb.int8_vectorwise_quant(weights[e].half())
        assert torch.equal(matrices.weight_EOI[e], quantized)
        assert torch.equal(matrices.dequantize(e, e + 1)[0], quantized * (absmax / 127)[:, None])


def test_bytes_a_weight() -> None:
    """At true widths: 0.5 + 1 / 64 + 4 / (64 * 256) bytes in nf4, 1 + 4 / row in int8."""
    for base, expected in (("nf4", 0.51587), ("int8", 1.00195)):
        matrices = MATRICES[base]((2, 1024, 2048), torch.bfloat16, CPU)
        num_bytes = sum(buffer.nbytes for buffer in matrices.buffers()) - (1024 if base == "nf4" else 0)
        assert num_bytes / (2 * 1024 * 2048) == pytest.approx(expected, rel=1e-3)


# Routing


def test_spans_are_runs_of_busy_experts() -> None:
    assert list(spans([0, 2, 2, 5, 6, 9, 9], group_size=2, max_rows=10)) == [(0, 1), (2, 4), (4, 5)]
    assert list(spans([0, 2, 2, 5, 6, 9, 9], group_size=9, max_rows=4)) == [(0, 1), (2, 4), (4, 5)]
    assert list(spans([0, 0, 0, 0], group_size=2, max_rows=4)) == []
    assert list(spans([0, 4, 8, 12], group_size=3, max_rows=4)) == [(0, 1), (1, 2), (2, 3)]


def test_routing_covers_every_assignment_once() -> None:
    torch.manual_seed(0)
    index_TK = torch.rand(50, 12).topk(3).indices
    order_S, bounds_E1 = sort_by_expert(index_TK, 12)
    groups = groups_of(bounds_E1, index_TK, group_size=4)
    assert order_S.sort().values.tolist() == list(range(150))
    assert bounds_E1.diff().tolist() == torch.bincount(index_TK.flatten(), minlength=12).tolist()
    for group in groups:
        expected = torch.arange(group.experts.start, group.experts.stop).repeat_interleave(torch.tensor(group.counts))
        assert torch.equal(index_TK.flatten()[order_S[group.rows]], expected)
        assert group.stops_G.tolist() == torch.tensor(group.counts).cumsum(0).tolist() and sum(group.counts) <= 50


def test_idle_experts_are_not_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make("nf4", torch.float32)
    asked: list[tuple[int, int]] = []
    dequantize = experts.down_proj.dequantize
    monkeypatch.setattr(experts.down_proj, "dequantize", lambda *span: asked.append(span) or dequantize(*span))
    x_TD, index_TK, weight_TK = inputs(experts, 40, top_k=2, num_hit=8)
    experts(x_TD, index_TK, weight_TK).sum().backward()
    assert asked == [(0, 1), (2, 3), (4, 5), (6, 7), (6, 7), (4, 5), (2, 3), (0, 1)]


# Forward and backward


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_equals_autograd_through_dequantized_weights(
        base: str, dtype: torch.dtype, limit: float, group_size: int) -> None:
    experts = make(base, dtype)
    experts.group_size = group_size
    x_TD, index_TK, weight_TK = inputs(experts, 200)
    dout_TD = torch.randn_like(x_TD)
    out_TD = experts(x_TD, index_TK, weight_TK)
    grads = torch.autograd.grad(out_TD, (x_TD, weight_TK), dout_TD)
    expected_TD = reference(experts, x_TD, index_TK, weight_TK, *dequantized(experts))
    expected = torch.autograd.grad(expected_TD, (x_TD, weight_TK), dout_TD)
    for mine, theirs in zip((out_TD, *grads), (expected_TD, *expected)):
        assert mine.dtype == theirs.dtype and difference(mine, theirs) < limit


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_adapters_equal_autograd_through_adapted_weights(dtype: torch.dtype, limit: float) -> None:
    """In bf16 the low-rank products are rounded, in the reference the adapted weights: both to 3 digits."""
    experts, rank, scaling = make("nf4", dtype), 3, 2.0
    adapted = LoraExperts(experts, torch.randn(16 * rank, 64) / 8, torch.randn(16 * rank, 48) / 8, scaling)
    parameters = [adapted.base_layer.lora_A, adapted.base_layer.lora_B, adapted.lora_A, adapted.lora_B]
    with torch.no_grad():
        for b in (adapted.lora_B, adapted.base_layer.lora_B):
            b.normal_(std=0.1)
    x_TD, index_TK, weight_TK = inputs(experts, 200, num_hit=12)
    dout_TD = torch.randn_like(x_TD)
    out_TD = adapted(x_TD, index_TK, weight_TK)
    grads = torch.autograd.grad(out_TD, (x_TD, weight_TK, *parameters), dout_TD)
    weights = []
    for weight_EOI, a, b in zip(dequantized(experts), parameters[::2], parameters[1::2]):
        delta_EOI = torch.einsum("eri,ore->eoi", a.view(16, rank, -1), b.view(b.shape[0], rank, 16))
        weights.append((weight_EOI + scaling * delta_EOI).to(dtype))
    expected_TD = reference(experts, x_TD, index_TK, weight_TK, *weights)
    expected = torch.autograd.grad(expected_TD, (x_TD, weight_TK, *parameters), dout_TD)
    for mine, theirs in zip((out_TD, *grads), (expected_TD, *expected)):
        assert mine.dtype == theirs.dtype and difference(mine, theirs) < limit
    unused_ERI = grads[2].view(16, rank, -1)[1::2]
    assert unused_ERI.abs().max() == 0  # experts without tokens


def test_gradients_by_finite_differences() -> None:
    experts = make("float32", torch.float64, num_experts=4, hidden=6, intermediate=5)
    x_TD, index_TK, weight_TK = inputs(experts, 7, top_k=2)
    assert torch.autograd.gradcheck(lambda x, w: experts(x, index_TK, w), (x_TD, weight_TK))


# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate and nothing has freed yet, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in known:
                self.live[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def peak_bytes(experts: FrozenExperts, num_tokens: int) -> tuple[int, int]:
    """Of the forward pass above inputs and output, and of the backward above inputs and gradients."""
    x_TD, index_TK, weight_TK = inputs(experts, num_tokens)
    with LiveBytes() as forward:
        out_TD = experts(x_TD, index_TK, weight_TK)
        kept = sum(forward.live.values())
    assert kept <= out_TD.nbytes + 1024  # nothing but the output outlives the forward pass
    dout_TD = torch.randn_like(out_TD)
    with LiveBytes() as backward:
        torch.autograd.grad(out_TD, (x_TD, weight_TK), dout_TD)
    return forward.peak - out_TD.nbytes, backward.peak - x_TD.nbytes - weight_TK.nbytes


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_working_memory_is_bounded_whatever_the_number_of_experts(
        base: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "GROUP_BYTES", 4 * 3 * 96 * 64 * dtype.itemsize)  # 4 experts
    peaks = {}
    for num_experts in (8, 32, 128):
        experts = make(base, dtype, num_experts, hidden=96, intermediate=64)
        peaks[num_experts] = peak_bytes(experts, num_tokens=256)
        assert max(peaks[num_experts]) <= working_bytes(experts, num_tokens=256, experts_per_token=4)
    assert max(peaks[128]) <= max(peaks[8])


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch is too old")
def test_the_grouped_kernel_is_called_as_torch_means_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own fallback stands in for the kernel here: the same arguments, on CPU."""
    experts = make("nf4", torch.bfloat16)
    x_TD, index_TK, weight_TK = inputs(experts, 200)
    dout_TD = torch.randn_like(x_TD)
    results = []
    for has_kernel in (False, True):
        monkeypatch.setattr(experts_module, "has_grouped_kernel", lambda *_, has_kernel=has_kernel: has_kernel)
        out_TD = experts(x_TD, index_TK, weight_TK)
        results.append((out_TD, *torch.autograd.grad(out_TD, (x_TD, weight_TK), dout_TD)))
    for loop, kernel in zip(*results):
        assert difference(kernel, loop) < 1e-2
