"""Compiled functions compute what the plain ones do, at any length, and are one operation to whatever counts operations."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, Qwen3_5MoeTextConfig, Qwen3Config

from loop.memory.ledger import Ledger
from loop.memory.without_values import without_values
from loop.paths import compare
from model.devices import OFF, ON
from model.ops import compiled as module
from model.ops.compiled import ALL
from model.ops.cpu_attention import weights, weights_and_dscores
from model.ops.fused import SwiGlu, swiglu, swiglu_backward
from model.ops.gates import delta_gates, delta_gates_backward, gated, gated_backward
from model.ops.heads import norm_and_rotate, norm_and_rotate_backward, rotate_heads
from model.ops.loss import cross_entropy, cross_entropy_and_gradient
from model.ops.norms import FusedNorm, add_norm, gated_norm, gated_norm_backward, norm, norm_backward
from model.ops.work import DECLARED
from model.sizes import Sizes

CPU = torch.device("cpu")
D, H, G, E = 96, 6, 2, 32


@pytest.fixture(autouse=True)
def compiling():
    ON.add("compiled")
    yield
    ON.clear()
    OFF.clear()


def cases(dtype, length):
    """Each function with arguments."""
    torch.manual_seed(0)

    def some(*shape):
        return torch.randn(*shape).to(dtype)

    x, dy, dx, weight, rstd = some(length, D), some(length, D), some(length, D), some(D), torch.rand(length, 1)
    q, k, dq, dk = (some(length, heads, E) for heads in (H, G, H, G))
    wide = some(length, H, 2 * E)[..., :E]  # beside a gate
    tables = [some(length, E // 4).repeat(1, 2) for _ in range(2)]  # half of each head is rotated
    rates = [torch.rand(length, heads, 1) for heads in (H, G)]
    head_weights, a, b = (some(E), some(E)), some(length, H), some(length, H)
    log_rate, bias = torch.rand(H).to(dtype), some(H)
    return [
        (norm, x, weight, 1e-6, False), (norm, x, weight, 1e-6, True), (add_norm, x, dx, weight, 1e-6, False),
        (norm_backward, x, rstd, weight, dy, dx, True), (norm_backward, x, rstd, weight, dy, None, False),
        (gated_norm, x, dx, weight, 1e-6), (gated_norm_backward, x, dx, rstd, weight, dy),
        (swiglu, x, dx), (swiglu_backward, dy, x, dx),
        (rotate_heads, q, k, *tables, False), (rotate_heads, dq, dk, *tables, True),
        (norm_and_rotate, wide, k, *head_weights, *tables, 1e-6, False),
        (norm_and_rotate_backward, dq, dk, wide, k, *rates, *tables, *head_weights, True),
        (gated, x, some(length, 1), dx), (gated, wide, q, None),
        (gated_backward, dy, x, some(length, 1)), (gated_backward, dq, wide, q),
        (delta_gates, a, b, log_rate, bias), (delta_gates_backward, a.float(), b, b, a, log_rate, bias),
        (weights, x, dy), (weights_and_dscores, x, dy, dx),
        *[(function, x, torch.randint(D, (length, 1))) for function in (cross_entropy, cross_entropy_and_gradient)],
    ]


def in_float64(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def several(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_every_compiled_function_is_compared_here():
    assert {function.name for function, *_ in cases(torch.float32, 3)} == {function.name for function in ALL}


@pytest.mark.parametrize("dtype, number", [(dtype, i) for dtype in (torch.float32, torch.bfloat16) for i in range(23)])
def test_compiled_equals_plain_at_every_length_with_the_same_code(dtype, number):
    function, *arguments = cases(dtype, 200)[number]
    function(*arguments)
    known = len(function.code)
    for length in (2, 37, 200):
        function, *arguments = cases(dtype, length)[number]
        found, plain = several(function(*arguments)), several(function.plain(*arguments))
        exact = several(function.plain(*map(in_float64, arguments)))
        for mine, theirs, truth in zip(found, plain, exact, strict=True):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.is_contiguous()
            if dtype == torch.float32:
                assert relative(mine, theirs) < 1e-6
            else:  # fewer roundings
                assert relative(mine, truth) <= 1.02 * relative(theirs, truth) + 1e-6
        assert all(torch.equal(a, b) for a, b in zip(found, several(function(*arguments))))
    assert len(function.code) == known


def test_compiled_code_runs_under_a_ledger_and_after_it():
    """One call of torch.compile's function under such a mode switches that function off, silently (torch 2.13)."""
    gate, up = (torch.randn(50, 40).requires_grad_() for _ in range(2))

    def step():
        y = SwiGlu.apply(gate, up)
        torch.autograd.grad(y, (gate, up), torch.ones_like(y))

    def events():
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step()
        return [event.name for event in profiled.events()]

    step()
    ledger = Ledger()
    with ledger:
        counted = events()
    plain = events()
    for names in (counted, plain):
        assert {"coach::swiglu", "coach::swiglu_backward"} <= set(names)
        assert sum("CompiledFxGraph" in name for name in names) == 2 and not {"aten::silu", "aten::mul_"} & set(names)
    made = [made for made in ledger.allocations if "test_compiled" not in made.frames[0][0].co_filename]
    assert [made.num_bytes for made in made] == 3 * [50 * 40 * 4]  # the output and two gradients, and nothing beside
    ON.clear()
    assert not any("CompiledFxGraph" in name for name in events())


def test_a_plan_for_a_gpu_sees_one_operation_and_its_results(monkeypatch):
    ON.clear()
    monkeypatch.setattr(module, "compile_for", None)  # nothing is compiled for tensors without values
    fused = FusedNorm(torch.ones(D), 1e-6)
    with without_values("cuda"), Ledger() as ledger:
        x, h = (torch.empty(1, 50, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        known = len(ledger.allocations)
        fused.of_sum(x, h)
        assert [made.num_bytes for made in ledger.allocations[known:]] == [50 * D * 2, 50 * D * 2, 50 * 4]
    category, work = DECLARED["coach::add_norm"]
    arguments = (torch.empty(50, D), torch.empty(50, D), torch.empty(D), 1e-6, False)
    assert category == "elementwise" and work(arguments, add_norm.plain(*arguments)).launches == 1
    assert work(arguments, add_norm.plain(*arguments)).num_bytes == 4 * (4 * 50 * D + D + 50)
    heads = (torch.empty(50, H, E), torch.empty(50, G, E), torch.empty(E))
    assert DECLARED["coach::norm_and_rotate"][1](heads, ()) == (0, 4 * (2 * 50 * (H + G) * E + E), 4)


@pytest.mark.parametrize("config", [LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96),
                                    Qwen3Config(hidden_size=64, num_attention_heads=4, intermediate_size=96),
                                    Qwen3_5MoeTextConfig(hidden_size=64, num_attention_heads=4)], ids=["llama", "4b", "35b"])
def test_the_path_proves_itself_at_the_models_own_sizes(config, monkeypatch):
    ON.clear()
    found = compare("compiled", Sizes.of(config, 64), torch.bfloat16, CPU)
    assert not found["problem"] and found["error"] <= 1.02 * found["plain_error"] and not ON
    run = swiglu.code.copy()
    monkeypatch.setattr(swiglu, "code", {key: lambda *x, code=code: code(*x) * 1.02 for key, code in run.items()})
    assert "differ by" in compare("compiled", Sizes.of(config, 64), torch.bfloat16, CPU)["problem"]


def test_switched_off_or_on_a_cpu_unasked_the_plain_function_runs(monkeypatch):
    monkeypatch.setattr(swiglu, "operator", None)
    x = torch.randn(5, 8)
    OFF.add("compiled")
    assert torch.equal(swiglu(x, x), swiglu.plain(x, x))
    OFF.clear(), ON.clear()
    assert torch.equal(swiglu(x, x), swiglu.plain(x, x))
