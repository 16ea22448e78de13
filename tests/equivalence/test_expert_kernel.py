"""The kernels over all experts equal the loop over groups, are planned for the cards that take them, and compile for these.

Triton's interpreter runs kernels on a CPU, but only in a process that asks for it before it imports Triton: this file is run
once more in such a process. The interpreter shows which numbers a kernel reads, multiplies and writes, not whether and how fast
it runs on a card. It rounds float32 to bf16 towards zero, hence the wide limit there.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from transformers import Qwen3_5MoeTextConfig

from loop.memory.ledger import Ledger
from loop.memory.without_values import without_values
from loop.paths import Sizes, compare
from model.devices import OFF, without
from model.moe import by_kernel
from model.moe import experts as experts_module
from model.moe import routing
from model.moe.experts import FrozenExperts, LoraExperts
from model.ops.work import DECLARED
from tests.model.moe.test_experts import LiveBytes, difference, inputs, make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BASES = ("nf4", "int8", "bf16")
CPU = torch.device("cpu")
MIB = 2**20
pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, see the last test")
compiled = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled, nor run without values")


@pytest.fixture
def always(monkeypatch):
    """On this CPU, and in every dtype."""
    monkeypatch.setattr(experts_module, "takes_kernel", lambda *_: "expert_kernel" not in OFF)


def both_ways(experts, x_TD, index_TK, weight_TK):
    """Outputs and gradients by the kernels, and by the loop."""
    dout_TD = torch.randn_like(x_TD)

    def results():
        out_TD = experts(x_TD, index_TK, weight_TK)
        return out_TD, *torch.autograd.grad(out_TD, (x_TD, weight_TK), dout_TD)

    found = results()
    with without("expert_kernel"):
        return list(zip(found, results()))


@interpreted
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-6), (torch.float16, 1e-3), (torch.bfloat16, 2e-2)])
def test_equals_the_loop(always, base, dtype, limit):
    experts = make(base, dtype, num_experts=6, hidden=128, intermediate=64)
    for found, expected in both_ways(experts, *inputs(experts, 75, top_k=3)):
        assert found.dtype == expected.dtype and difference(found, expected) < limit


ROUTED = {  # tokens, experts a token, number of experts, and the experts that are chosen
    "ragged": (150, 2, 5, range(5)), "one expert has all": (300, 1, 6, [4]), "whole tiles": (128, 2, 4, [1, 2]),
    "one token": (1, 3, 7, range(7)), "most are empty": (33, 2, 19, [0, 9, 18]), "one expert": (5, 1, 1, [0])}


@interpreted
@pytest.mark.parametrize("routing, hidden, intermediate", [*((name, 64, 128) for name in ROUTED), ("ragged", 320, 64)])
def test_any_routing_equals_the_loop(always, routing, hidden, intermediate):
    """Tiles have 128 rows. 320 columns for 2 experts a token are computed as 128, 128 and 64."""
    num_tokens, top_k, num_experts, chosen = ROUTED[routing]
    experts = make("int8", torch.float32, num_experts, hidden, intermediate)
    experts.tokens_E = torch.zeros(num_experts, dtype=torch.int64)
    x_TD, index_TK, weight_TK = inputs(experts, num_tokens, top_k, num_experts)
    index_TK = torch.tensor(chosen)[torch.rand(num_tokens, len(chosen)).argsort(dim=1)[:, :top_k]]
    for found, expected in both_ways(experts, x_TD, index_TK, weight_TK):
        assert difference(found, expected) < 3e-6
    assert experts.tokens_E.tolist() == (2 * index_TK.flatten().bincount(minlength=num_experts)).tolist()


@interpreted
@pytest.mark.parametrize("base", BASES)
def test_weights_have_the_bits_of_the_dequantized_ones(base):
    """128 rows of the identity times a matrix, and times its transpose: nothing is rounded but the weights."""
    experts = make(base, torch.float32, num_experts=3, hidden=128, intermediate=128)
    weight_T1, order_S = torch.ones(384, 1), torch.arange(384)
    bounds_E1, eye_SX = torch.tensor([0, 128, 256, 384]), torch.eye(128).repeat(3, 1)
    given = (experts.down_proj.parts(), 128, 0, 128)
    forward, backward = (by_kernel.columns(eye_SX, weight_T1, order_S, bounds_E1, *given, back).view(3, 128, 128)
                         for back in (False, True))
    expected_EOI = experts.down_proj.dequantize(0, 3)
    assert torch.equal(forward, expected_EOI.mT) and torch.equal(backward, expected_EOI)


@interpreted
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_kernel_that_computes_wrong_numbers_is_found_at_the_start(always, base, monkeypatch):
    sizes = replace(Sizes.of(Qwen3_5MoeTextConfig(), 0, base).small(), tokens=50, hidden=128, expert_size=64)
    found = compare("expert_kernel", sizes, torch.float32, CPU)
    assert not found["problem"] and found["error"] < 1e-5, found
    monkeypatch.setattr(by_kernel, "hidden", lambda *a, right=by_kernel.hidden: right(*a) * 1.01)
    assert "differ by" in compare("expert_kernel", sizes, torch.float32, CPU)["problem"]


# Plans and cards


class Operators(LiveBytes):
    """Their names too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return super().__torch_dispatch__(func, types, args, kwargs)


def planned(card, num_tokens=20, hidden=128, intermediate=64, num_experts=4, top_k=2, dtype=torch.bfloat16, adapters=False):
    """Forward and backward of experts under a plan for a card: operators, and bytes above inputs and results."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(routing, "ASSUMED", [routing.uniform_bounds]))
        stack.enter_context(without_values("cuda", card))
        stack.enter_context(Ledger())  # answers whoever asks for a value
        experts = FrozenExperts(num_experts, hidden, intermediate, "nf4", dtype, CPU)
        module = LoraExperts(experts, torch.empty(num_experts, hidden), torch.empty(num_experts, intermediate), 1.0)
        x_TD = torch.empty(num_tokens, hidden, dtype=dtype, requires_grad=True)
        weight_TK = torch.empty(num_tokens, top_k, dtype=dtype, requires_grad=True)
        index_TK = torch.empty(num_tokens, top_k, dtype=torch.int64)
        with Operators() as forward:
            out_TD = (module if adapters else experts)(x_TD, index_TK, weight_TK)
        dout_TD = torch.empty_like(x_TD)
        with Operators() as backward:
            grads = torch.autograd.grad(out_TD, (x_TD, weight_TK), dout_TD)
    return ({*forward.names, *backward.names}, forward.peak - out_TD.nbytes,
            backward.peak - sum(grad.nbytes for grad in grads), forward.names + backward.names)


OURS = {"coach::experts_hidden", "coach::experts_hidden_backward", "coach::experts_columns"}


@compiled
@pytest.mark.parametrize("card, other, ours, grouped", [
    (12, {}, True, False), (8, {}, True, False), (9, {}, False, True), (10, {}, False, True), (None, {}, False, True),
    (12, {"hidden": 96}, False, False), (12, {"intermediate": 32}, False, False), (12, {"dtype": torch.float32}, False, False),
    (12, {"adapters": True}, False, False)])
def test_a_plan_takes_what_the_card_takes(card, other, ours, grouped):
    names = planned(card, **other)[0]
    assert (names >= OURS, not names & OURS, "aten::_grouped_mm" in names) == (ours, not ours, grouped)


@compiled
def test_where_the_path_is_off_a_plan_takes_the_loop():
    with without("expert_kernel"):
        assert "aten::mm" in planned(12)[0] and not planned(12)[0] & OURS


@compiled
def test_memory_and_launches_at_the_35bs_sizes():
    """Forward: hidden rows [S, I], 64 MiB, and columns as large as the input, 32 MiB. Backward: twice the rows."""
    _, forward, backward, names = planned(12, 8192, 2048, 512, 256, top_k=8)
    assert 96 * MIB < forward < 100 * MIB and 160 * MIB < backward < 165 * MIB
    launches = [name for name in names if name.startswith("coach::") or name in ("aten::sum", "aten::sort")]
    assert len(launches) == 2 + 2 + 4 * 8 + 1  # routing; hidden both ways; columns and their sums; routing weights


@compiled
def test_work_is_declared():
    """Of 60 assignments to 3 experts, whose last tiles of 128 rows are half filled up."""
    x_TD, order_S, bounds_E1 = torch.empty(30, 128, dtype=torch.bfloat16), torch.empty(60), torch.empty(4)
    h_SI, y_SC = torch.empty(60, 64, dtype=torch.bfloat16), torch.empty(60, 32, dtype=torch.bfloat16)
    parts = [torch.empty(3, 10, dtype=torch.uint8)]

    def work(name, arguments, *results):
        category, declaration = DECLARED[name]
        assert category == "experts"
        return declaration(arguments, results)

    multiplied, read = 60 + 3 * 64, 60 * 128 * 2
    assert work("coach::experts_hidden", (x_TD, order_S, bounds_E1, parts, 64, 2), h_SI) == (
        2 * multiplied * 128 * 2 * 64, read + 30 + h_SI.nbytes, 1)
    dgate_up_S2I = h_SI.repeat(1, 2)
    assert work("coach::experts_hidden_backward", (x_TD, x_TD, None, order_S, bounds_E1, parts, parts, 64), dgate_up_S2I) == (
        2 * multiplied * 128 * 3 * 64, 2 * read + 60 + dgate_up_S2I.nbytes, 1)
    assert work("coach::experts_columns", (h_SI, None, order_S, bounds_E1, parts, 128, 0, 32, False), y_SC) == (
        2 * multiplied * 64 * 32, h_SI.nbytes + 30 / 4 + y_SC.nbytes, 1)


class Card:
    """Stands in for the driver of a card that is not here: Triton compiles for it."""

    def __init__(self, generation):
        self.generation = generation

    def get_current_device(self):
        return self.generation  # Triton keeps what it compiled by this number

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.generation, 32)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("card, base", [(89, "nf4"), *((120, base) for base in BASES)])  # RTX 4090, RTX 5090
def test_compiles_for_a_card_and_fits_its_shared_memory(always, card, base, monkeypatch):
    """All but the launch, at the 35B's sizes. Triton brings the assembler; what the interpreter lets pass may end here."""
    from triton.runtime import driver

    from model.moe import expert_kernel

    binaries = {}

    class Compiled:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            return lambda *args, **named: binaries.update(
                {(self.name, named.get("BACKWARD")): self.kernel.warmup(*args, grid=grid, **named)})

    for name in by_kernel.SHAPES:
        monkeypatch.setattr(expert_kernel, name, Compiled(name, getattr(expert_kernel, name)))
    experts = make(base, torch.bfloat16, num_experts=3, hidden=2048, intermediate=512)
    x_TD, index_TK, weight_TK = inputs(experts, 16, top_k=2)
    monkeypatch.setattr(driver, "_active", Card(card))
    torch.autograd.grad(experts(x_TD, index_TK, weight_TK), (x_TD, weight_TK), torch.zeros_like(x_TD))
    assert binaries.keys() == {("hidden", None), ("hidden_backward", None), ("columns", False), ("columns", True)}
    for binary in binaries.values():
        assert "mma.sync" in binary.asm["ptx"] and "bf16.bf16.f32" in binary.asm["ptx"]
        assert binary.metadata.shared <= 64 * 2**10  # of 99 that a program can have


@compiled
@pytest.mark.slow
def test_in_tritons_interpreter():
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=600)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
