"""Norm and SwiGLU against transformers' own modules, forward and backward."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from model.fused import FusedFeedForward, FusedNorm, fuse

SIZES = {"hidden_size": 96, "intermediate_size": 160}


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def pair(kind, dtype):
    """transformers' module and the fused one with the same frozen weights."""
    torch.manual_seed(0)
    module = {
        "llama norm": lambda: LlamaRMSNorm(96, 1e-5), "qwen3 norm": lambda: Qwen3RMSNorm(96, 1e-6),
        "llama feed-forward": lambda: LlamaMLP(LlamaConfig(**SIZES)),
        "qwen3 feed-forward": lambda: Qwen3MLP(Qwen3Config(**SIZES)),
    }[kind]().requires_grad_(False)
    if kind.endswith("norm"):
        module.weight.normal_(1, 0.3)
    module = module.to(dtype)
    return module, FusedNorm(module) if kind.endswith("norm") else FusedFeedForward(module)


def run(module, x, dy):
    x = x.detach().to(next(module.parameters()).dtype).requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, dy.to(y.dtype))[0]


KINDS = ("llama norm", "qwen3 norm", "llama feed-forward", "qwen3 feed-forward")


@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_transformers(kind):
    reference, fused = pair(kind, torch.float32)
    x, dy = torch.randn(2, 7, 96) * 3, torch.randn(2, 7, 96)
    for found, expected in zip(run(fused, x, dy), run(reference, x, dy)):
        assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_close_to_the_truth_as_transformers(kind):
    reference, fused = pair(kind, torch.bfloat16)
    exact = pair(kind, torch.float64)[0]
    exact.load_state_dict(reference.state_dict())  # the rounded weights
    x, dy = (torch.randn(4, 64, 96).bfloat16() for _ in range(2))
    for found, theirs, truth in zip(run(fused, x, dy), run(reference, x, dy), run(exact, x, dy)):
        assert relative(found, truth) < 1.02 * relative(theirs, truth)


def test_fewer_bytes_are_kept_for_the_backward_pass():
    def kept_bytes(module, x):
        kept = {}
        frozen = {p.data_ptr() for p in module.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in frozen:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = module(x)
        assert y.requires_grad
        return sum(kept.values())

    for kind, share in (("llama norm", 0.51), ("llama feed-forward", 0.8)):
        reference, fused = pair(kind, torch.bfloat16)
        x = torch.randn(1, 256, 96).bfloat16().requires_grad_()
        assert kept_bytes(fused, x) < share * kept_bytes(reference, x)


def test_fuse_replaces_what_it_knows_and_leaves_the_rest():
    class Other(LlamaRMSNorm):
        pass

    gelu = LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu"))
    mlp = LlamaMLP(LlamaConfig(**SIZES))
    model = nn.ModuleDict({"norm": LlamaRMSNorm(96), "other": Other(96), "mlp": mlp, "gelu": gelu})
    names = [name for name, _ in model.named_parameters()]
    fuse(model)
    assert [type(module).__name__ for module in model.values()] == ["FusedNorm", "Other", "FusedFeedForward", "LlamaMLP"]
    assert [name for name, _ in model.named_parameters()] == names
