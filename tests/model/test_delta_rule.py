"""The gated delta rule's layer without flash-linear-attention against transformers' module."""

import inspect

import pytest
import torch
from torch import nn
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet, causal_conv1d_fn

from model.delta_rule import CausalConvolution, packed_delta_rule
from model.mixers import Segments
from model.ops.fused import fuse


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("length", (1, 3, 50))
def test_convolution_equals_transformers(dtype, length):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 1, 4).to(dtype), torch.randn(2, length, 24).to(dtype).requires_grad_()
    expected = inspect.unwrap(causal_conv1d_fn)(x.transpose(1, 2), weight.squeeze(1)).transpose(1, 2)
    found = CausalConvolution.apply(x, weight)
    assert torch.equal(found, expected)
    dy = torch.randn_like(found)
    ours, theirs = [torch.autograd.grad(y, x, dy)[0] for y in (found, expected)]
    if dtype == torch.float32:
        assert relative(ours, theirs) < 1e-6
    else:  # CPUs without bf16 instructions round transformers' sum at each addition: ours is rounded once
        x64 = x.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(CausalConvolution.apply(x64, weight.double()), x64, dy.double())
        assert relative(ours, exact) < 2**-9 and relative(ours, exact) <= relative(theirs, exact)


@pytest.mark.parametrize("fused", (False, True))
def test_layer_equals_transformers(fused):
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(
        hidden_size=64, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=32)
    model = nn.ModuleDict({"layer": Qwen3_5MoeGatedDeltaNet(config, 0).requires_grad_(False)})
    layer, x = model["layer"], torch.randn(3, 100, 64).requires_grad_()
    layer.dt_bias.normal_()
    layer.norm.weight.normal_(1, 0.3)
    expected, dy = layer(x), torch.randn(3, 100, 64)
    if fused:
        fuse(model)
    segments = Segments(torch.tensor([0, 100, 200, 300], dtype=torch.int32), (100, 100, 100))
    found = packed_delta_rule(layer, x.view(1, 300, 64), segments).view(3, 100, 64)
    assert relative(found, expected) < 1e-6
    assert relative(*(torch.autograd.grad(y, x, dy)[0] for y in (found, expected))) < 2e-6
