"""Adapters: forward and backward by hand against autograd through the written-out formula."""

import pytest
import torch
from torch import nn

from model.config import LoraConfig, check_targets
from model.lora import (
    LoraLinear,
    adapter_parameters,
    adapters_off,
    add_adapters,
    to_peft_name,
)
from model.quant import PlainLinear

CPU = torch.device("cpu")


def adapted(dtype=torch.float32, dropout=0.0, bias=False):
    torch.manual_seed(0)
    base = PlainLinear(24, 40, dtype, CPU)
    base.put(0, torch.randn(40, 24).to(dtype))
    if bias:
        base.bias = torch.randn(40).to(dtype)
    linear = LoraLinear(base, "model.layers.0.mlp.up_proj", LoraConfig(4, 8, ("up_proj",), dropout), 1, CPU)
    nn.init.normal_(linear.lora_B)
    return linear


def written_out(linear, x, keep):
    dropped = x if keep is None else x * keep / (1 - linear.dropout)
    y = x @ linear.base.weight.T + linear.scaling * (dropped @ linear.lora_A.T) @ linear.lora_B.T
    return y if linear.base.bias is None else y + linear.base.bias


@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("bias", (False, True))
def test_forward_and_gradients_equal_autograd(dropout, bias):
    linear = adapted(dropout=dropout, bias=bias).train()
    x, dy = torch.randn(2, 9, 24, requires_grad=True), torch.randn(2, 9, 40)
    torch.manual_seed(3)
    y = linear(x)
    torch.manual_seed(3)
    keep = torch.rand(x.shape) >= dropout if dropout else None
    expected = written_out(linear, x, keep)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)
    inputs = (x, linear.lora_A, linear.lora_B)
    for found, truth in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
        assert ((found - truth).norm() / truth.norm()).item() < 1e-6


def test_bf16_gradients_leave_in_float32_and_are_close():
    linear = adapted(torch.bfloat16)
    x, dy = torch.randn(64, 24).bfloat16().requires_grad_(), torch.randn(64, 40).bfloat16()
    found = torch.autograd.grad(linear(x), (linear.lora_A, linear.lora_B, x), dy)
    linear.base.weight = linear.base.weight.float()
    x32 = x.detach().float().requires_grad_()
    truth = torch.autograd.grad(written_out(linear, x32, None), (linear.lora_A, linear.lora_B, x32), dy.float())
    assert [g.dtype for g in found] == [torch.float32, torch.float32, torch.bfloat16]
    for ours, exact in zip(found, truth):
        assert ((ours.float() - exact).norm() / exact.norm()).item() < 1e-2


def test_an_input_that_needs_no_gradient_gets_none_and_adapters_still_do():
    linear = adapted()
    linear(torch.randn(3, 24)).sum().backward()
    assert linear.lora_A.grad.norm() > 0 and linear.lora_B.grad.norm() > 0


def test_first_values_depend_on_seed_and_name_alone():
    config = LoraConfig(4, 8, ("up_proj",))
    first = [LoraLinear(PlainLinear(24, 40, torch.float32, CPU), name, config, seed, CPU).lora_A
             for seed, name in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2]) and not torch.equal(first[0], first[3])
    assert first[0].abs().max() <= 24**-0.5


def test_dropout_is_off_in_evaluation_and_adapters_can_be():
    linear = adapted(dropout=0.5).eval()
    x = torch.randn(3, 24)
    torch.testing.assert_close(linear(x), written_out(linear, x, None), rtol=1e-6, atol=1e-5)
    with adapters_off(linear):
        torch.testing.assert_close(linear(x), x @ linear.base.weight.T)
    torch.testing.assert_close(linear(x), written_out(linear, x, None), rtol=1e-6, atol=1e-5)


def test_targets_are_wrapped_by_last_name_and_unknown_ones_refused():
    model = nn.ModuleDict({name: PlainLinear(8, 8, torch.float32, CPU) for name in ("up_proj", "gate_proj")})
    add_adapters(model, LoraConfig(2, 4, ("up_proj",)), 1, CPU)
    assert list(adapter_parameters(model)) == ["up_proj.lora_A", "up_proj.lora_B"]
    with pytest.raises(ValueError, match="no linear of the model is called 'w1'; there are up_proj"):
        check_targets(LoraConfig(2, 4, ("w1",)), ["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize("settings, message", (
    ({"rank": 0}, "lora.rank is 0"), ({"target": ()}, "lora.target is empty"), ({"dropout": 1.0}, "lora.dropout is 1.0")))
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"rank": 4, "alpha": 8, "target": ("up_proj",), **settings})


def test_names_in_files_are_those_of_peft():
    assert to_peft_name("model.layers.3.mlp.up_proj.lora_A") == "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"
