"""Linears that read the same input, computed together, against each by itself."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import LoraConfig
from model.devices import OFF, planning_for
from model.lora import LoraLinear, adapters_off
from model.matmul import product_in_float32, project
from model.quant import LINEARS

CPU = torch.device("cpu")


class Recorder(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def linear(num_out, rank=0, base="int8", dtype=torch.float32, dropout=0.0, bias=False, seed=0):
    torch.manual_seed(seed)
    made = LINEARS[base](24, num_out, dtype, CPU)
    made.put(0, torch.randn(num_out, 24).to(dtype))
    if bias:
        made.bias = torch.randn(num_out).to(dtype)
    if not rank:
        return made
    made = LoraLinear(made, f"linear {seed}", LoraConfig(rank, 2 * rank + seed, ("q_proj",), dropout), 1, CPU)
    nn.init.normal_(made.lora_B)
    return made


def group(*names, **settings):
    made = {
        "q": lambda: linear(40, 4, seed=1, **settings), "k": lambda: linear(16, 4, seed=2, bias=True, **settings),
        "wide": lambda: linear(16, 7, seed=3, **settings), "frozen": lambda: linear(12, seed=4, bias=True, **settings)}
    return [made[name]() for name in names]


def run(linears, together, x, dys):
    outputs = project(x, *linears) if together else [one(x) for one in linears]
    assert len({output.grad_fn for output in outputs}) == (1 if together else len(linears)) or len(linears) == 1
    parameters = [p for one in linears for p in one.parameters() if p.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, [x, *parameters], dys)]


GROUPS = [("q", "k", "wide"), ("q", "frozen"), ("frozen", "q", "k"), ("frozen", "frozen"), ("q",)]


@pytest.mark.parametrize("names", GROUPS, ids="+".join)
@pytest.mark.parametrize("base, dtype, limit", [("int8", torch.float32, 2e-6), ("nf4", torch.float32, 2e-6),
                                                ("bf16", torch.bfloat16, 1e-2)])
def test_together_is_each_by_itself(names, base, dtype, limit):
    linears = group(*names, base=base, dtype=dtype)
    x = torch.randn(2, 9, 24).to(dtype).requires_grad_()
    dys = [torch.randn(2, 9, one.part()[0].base.out_features).to(dtype) for one in linears]
    for found, expected in zip(run(linears, True, x, dys), run(linears, False, x, dys), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert ((found - expected).double().norm() / expected.double().norm()).item() < limit


def test_adapters_that_are_off_and_such_as_drop_out():
    linears = group("q", "k", "frozen")
    x = torch.randn(2, 9, 24, requires_grad=True)
    with adapters_off(nn.ModuleList(linears)):
        for found, one in zip(project(x, *linears), linears):
            assert torch.equal(found, one.part()[0].base(x))
    dropping = [*group("q", "k", dropout=0.5), *group("frozen")]
    outputs = []
    for together in (True, False):
        torch.manual_seed(3)
        outputs.append(project(x, *dropping) if together else [one(x) for one in dropping])
    assert all(map(torch.equal, *outputs)), "each adapter has a mask of its own"
    assert not torch.equal(outputs[0][0], dropping[0].eval()(x))


def test_of_an_input_without_gradient_only_adapters_need_one():
    outputs = project(torch.randn(3, 24), *group("q", "frozen", "k"))
    assert [output.requires_grad for output in outputs] == [True, False, True]


def test_without_gradients_each_linear_is_called_since_decoding_puts_others_in_their_place():
    linears = group("q", "k")
    setattr(linears[0], "forward", lambda x: "in its place")
    with torch.no_grad():
        assert project(torch.randn(3, 24), *linears)[0] == "in its place"


def test_adapters_of_one_input_are_one_matmul_each_way():
    linears, x = group("q", "k", "wide"), torch.randn(9, 24, requires_grad=True)
    with Recorder() as forward:
        outputs = project(x, *linears)
    assert forward.calls.count("aten.mm.default") == 3 + 1 and forward.calls.count("aten.addmm_.default") == 3
    with Recorder() as backward:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    # mm: dx of the first base, all dA, each dB; addmm_: each dh, dx of the other bases and of all adapters
    assert backward.calls.count("aten.mm.default") == 1 + 1 + 3 and backward.calls.count("aten.addmm_.default") == 3 + 2 + 1
    assert not [call for call in backward.calls if call.startswith("aten.add.")]


def test_on_a_gpu_gradients_are_summed_in_float32():
    """Without values: torch's CPU has no such product, its shapes and types are known all the same."""
    a, b = torch.randn(5, 64).bfloat16(), torch.randn(64, 3).bfloat16()
    assert torch.equal(product_in_float32(a, b), (a @ b).float()), "on a CPU"
    with FakeTensorMode(allow_non_fake_inputs=True), planning_for("cuda"), Recorder() as recorder:
        assert product_in_float32(a, b).dtype == torch.float32
        assert recorder.calls[-1] == "aten.mm.dtype", "the sum is made in float32"
        OFF.add("lora_gradients")
        try:
            assert product_in_float32(a, b).dtype == torch.float32 and "aten.mm.default" in recorder.calls
        finally:
            OFF.clear()
