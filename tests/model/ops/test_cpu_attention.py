"""Attention by matmuls over blocks of queries against torch's own in float64; in bf16 it errs no more than torch's kernel."""

import pytest
import torch

from model.devices import taking
from model.mixers import plain_attention
from model.ops import cpu_attention
from model.ops.cpu_attention import CpuAttention
from tests.model.moe.test_experts import LiveBytes
from tests.model.test_mixers import case, relative, run

LENGTHS = ((300,), (40, 150, 1, 7), (129,), (16, 16), (1,))


def both(lengths, heads, size, spread=1.0):
    """Output and gradients of q, k, v: by torch's kernel, by ours, and in float64."""
    stream, do = case(lengths, torch.bfloat16, heads, size, spread)
    exact = [x.detach().double().requires_grad_() for x in stream]
    return (run(plain_attention, stream, do, lengths), run(CpuAttention.apply, stream, do, lengths),
            run(plain_attention, exact, do.double(), lengths))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads, size", [((6, 2), 32), ((4, 4), 16), ((8, 1), 64)], ids=str)
@pytest.mark.parametrize("block_scores", [2**20, 2**12], ids=["one block or few", "many blocks"])
def test_equals_attention_in_float64(monkeypatch, lengths, heads, size, block_scores):
    monkeypatch.setattr(cpu_attention, "BLOCK_SCORES", block_scores)
    _, ours, truth = both(lengths, heads, size)
    for found, exact in zip(ours, truth, strict=True):
        assert found.dtype == torch.bfloat16 and found.shape == exact.shape
        if exact.norm() > 1e-9:
            assert relative(found, exact) < 0.005
        else:  # one position has no choice: its queries and keys have no gradient, but what rounding leaves of it
            assert sum(lengths) == 1 and found.norm() < 0.005 * truth[3].norm() * found.numel() ** 0.5


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_errs_no_more_than_torchs_kernel(spread):
    """Over output and gradients together: the output errs somewhat more, the gradients of keys and values much less."""
    plain, ours, truth = both((300, 84), (6, 2), 64, spread)
    mine, theirs = ([relative(x, exact) for x, exact in zip(results, truth)] for results in (ours, plain))
    assert sum(mine) < sum(theirs) and max(mine) < max(theirs), (mine, theirs)


def test_scores_are_as_exact_as_in_float32():
    """The second matmul computes what rounding the first to half precision lost."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 32).bfloat16() for _ in range(2))
    room = cpu_attention.Room(q, 2)
    (block,) = room.blocks((64,))
    later = room.future_MS[:64, :64]
    product = sum(part.double() for part in room.scores(block, q[0], k[0], 0.3)).masked_fill(later, 0)
    exact = (0.3 * q[0].double() @ k[0].double().transpose(1, 2)).masked_fill(later, 0)
    assert relative(product, exact) < 1e-5 < 100e-5 < relative(exact.bfloat16(), exact)


def test_what_is_kept_and_what_is_needed_at_most():
    """No more than torch's: q, k, v, the output; and a few MiB for one block, however long the segment is."""
    stream, do = case((3000,), torch.bfloat16, (8, 2), 16)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with taking("compiled"), hooks, LiveBytes() as forward:
        o = CpuAttention.apply(*stream, 0.25, (3000,))
    outside = {x.untyped_storage().data_ptr() for x in (*stream, o)}
    assert len(kept) == 4 and {x.untyped_storage().data_ptr() for x in kept} == outside
    with taking("compiled"), LiveBytes() as backward:
        torch.autograd.grad(o, stream, do)
    for live in (forward, backward):
        assert live.peak < 10 * 2**20 + 8 * sum(x.nbytes for x in stream)


def test_compiled_code_is_as_exact_and_serves_all_lengths():
    for function in (cpu_attention.weights, cpu_attention.weights_and_dscores):
        function.code.clear()
    with taking("compiled"):
        for lengths in ((300, 84), (17, 1, 200), (640,)):
            _, ours, truth = both(lengths, (6, 2), 32)
            assert max(relative(found, exact) for found, exact in zip(ours, truth, strict=True)) < 0.005
    assert len(cpu_attention.weights.code) == len(cpu_attention.weights_and_dscores.code) == 1
