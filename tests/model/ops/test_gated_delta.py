"""The gated delta rule by hand against transformers' function, and against the recurrence itself, one position at a time."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

from loop.memory.ledger import Ledger
from model.ops import gated_delta
from model.ops.gated_delta import gated_delta_rule

MIB = 2**20
NAMES = ("output", "gradient of q, k and v", "gradient of g", "gradient of beta")


def case(rows, length, key_heads, ratio, key_size, value_size, dtype=torch.float32, seed=0):
    """Inputs as Qwen3.5's layers make them, decays from almost none to almost all, and the output's gradient."""
    torch.manual_seed(seed)
    heads = key_heads * ratio
    qkv = torch.randn(rows, length, 2 * key_heads * key_size + heads * value_size)
    g = -torch.rand(rows, length, heads) ** 4 * 3
    beta = torch.randn(rows, length, heads).sigmoid()
    do = torch.randn(rows, length, heads, value_size)
    return [x.requires_grad_() for x in (qkv.to(dtype), g, beta.to(dtype))], do.to(dtype)


def parted(qkv, heads, key_heads, key_size):
    q, k, v = F.silu(qkv).split([key_heads * key_size, key_heads * key_size, qkv.shape[2] - 2 * key_heads * key_size], dim=2)
    ratio = heads // key_heads  # repeated here, as transformers 5.17 wants it; 5.23 takes either
    q, k = (x.unflatten(2, (key_heads, key_size)).repeat_interleave(ratio, dim=2) for x in (q, k))
    return q, k, v.unflatten(2, (heads, -1))


def transformers_rule(qkv, g, beta, key_heads, key_size):
    rule = inspect.unwrap(modeling.torch_chunk_gated_delta_rule)
    q, k, v = parted(qkv, g.shape[2], key_heads, key_size)
    return rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def recurrence(qkv, g, beta, key_heads, key_size):
    """The definition, in float64."""
    q, k, v = parted(qkv.double(), g.shape[2], key_heads, key_size)
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    state, outputs = 0, []
    for t in range(qkv.shape[1]):
        state = state * g[:, t, :, None, None].double().exp() + torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[3]).double()
        told = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t].double(), k[:, t], told)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * key_size**-0.5)
    return torch.stack(outputs, dim=1)


def run(rule, inputs, do, key_heads, key_size):
    o = rule(*inputs, key_heads, key_size)
    return [o.detach(), *torch.autograd.grad(o, inputs, do.to(o.dtype))]


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("length", (1, 63, 64, 65, 200))
@pytest.mark.parametrize("rows, key_heads, ratio, key_size, value_size", (
    (1, 2, 2, 128, 128), (2, 1, 1, 16, 32), (3, 2, 3, 32, 16), (2, 1, 4, 64, 64)))
def test_float32_equals_transformers(rows, length, key_heads, ratio, key_size, value_size):
    inputs, do = case(rows, length, key_heads, ratio, key_size, value_size)
    found, expected = (run(rule, inputs, do, key_heads, key_size) for rule in (gated_delta_rule, transformers_rule))
    for name, mine, theirs in zip(NAMES, found, expected):
        assert mine.shape == theirs.shape and relative(mine, theirs) < 2e-6, name


def test_float32_equals_the_definition():
    inputs, do = case(2, 150, 2, 2, 32, 16)
    found, expected = (run(rule, inputs, do, 2, 32) for rule in (gated_delta_rule, recurrence))
    for name, mine, truth in zip(NAMES, found, expected):
        assert relative(mine, truth) < 2e-6, name


@pytest.mark.parametrize("block_chunks, block", ((1, 1), (2, 12), (3, 1000)))
def test_blocks_change_nothing(monkeypatch, block_chunks, block):
    """Whatever the blocks are: of few heads, few chunks, and the last one shorter."""
    inputs, do = case(2, 300, 3, 2, 16, 16)
    whole = run(gated_delta_rule, inputs, do, 3, 16)
    monkeypatch.setattr(gated_delta, "BLOCK_CHUNKS", block_chunks)
    monkeypatch.setattr(gated_delta, "BLOCK", block)
    for name, mine, expected in zip(NAMES, run(gated_delta_rule, inputs, do, 3, 16), whole):
        assert relative(mine, expected) < 1e-6, name


@pytest.mark.parametrize("kind", ("keys alike, nothing decays", "all decays at once", "nothing is written"))
def test_extremes_are_as_close_to_the_definition_as_transformers(kind):
    (qkv, g, beta), do = case(1, 200, 1, 2, 32, 32)
    with torch.no_grad():
        if kind.startswith("keys"):
            qkv[:, :, 32:64] = qkv[:, :1, 32:64] + 0.01 * qkv[:, :, 32:64]
            g.mul_(1e-3)
            beta.fill_(1)
        elif kind.startswith("all"):
            g[:, ::7] = -1e4
        else:
            beta[:, 20:150] = 0
    found, theirs, truth = (
        run(rule, (qkv, g, beta), do, 1, 32) for rule in (gated_delta_rule, transformers_rule, recurrence))
    for name, mine, other, exact in zip(NAMES, found, theirs, truth):
        assert mine.isfinite().all() and relative(mine, exact) < 1e-6 + 2 * relative(other, exact), name


def test_bf16_is_as_close_to_the_definition_as_transformers():
    errors = torch.zeros(2, len(NAMES), dtype=torch.float64)
    for seed in range(6):
        inputs, do = case(2, 130, 2, 2, 32, 32, torch.bfloat16, seed)
        truth = run(recurrence, [x.detach().double().requires_grad_() for x in inputs], do, 2, 32)
        for number, rule in enumerate((gated_delta_rule, transformers_rule)):
            found = run(rule, inputs, do, 2, 32)
            assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
            errors[number] += torch.tensor([relative(x, exact) for x, exact in zip(found, truth)])
    assert (errors[0] < 1.01 * errors[1]).all(), errors


@pytest.mark.parametrize("rows", (1, 2, 3))
def test_memory_is_bounded(rows):
    """8,192 tokens of Qwen3.5-35B-A3B, on fake tensors."""
    ledger = Ledger(with_sites=False)
    with FakeTensorMode(), ledger:
        length, key_heads, heads, size = 8192 // rows, 16, 32, 128
        qkv = torch.empty(rows, length, (2 * key_heads + heads) * size, dtype=torch.bfloat16, requires_grad=True)
        g = torch.empty(rows, length, heads, requires_grad=True)
        beta = torch.empty(rows, length, heads, dtype=torch.bfloat16, requires_grad=True)
        before = ledger.current
        o = gated_delta_rule(qkv, g, beta, key_heads, size)
        before += o.nbytes
        assert ledger.current - before < 16 * MIB  # kept
        assert ledger.peak - before < 170 * MIB
        do = torch.empty_like(o)
        before = ledger.peak = ledger.current
        grads = torch.autograd.grad(o, (qkv, g, beta), do)
        assert ledger.peak - before - sum(x.nbytes for x in grads) < 260 * MIB
