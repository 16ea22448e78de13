"""Norm and SwiGLU against transformers' own modules, forward and backward."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeMLP, Qwen3_5MoeRMSNorm, Qwen3_5MoeRMSNormGated

from model.ops.fused import fuse

SIZES = {"hidden_size": 96, "intermediate_size": 160}


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def pair(kind, dtype):
    """transformers' module and the fused one with the same frozen weights."""
    torch.manual_seed(0)
    module = {
        "llama norm": lambda: LlamaRMSNorm(96, 1e-5), "qwen3 norm": lambda: Qwen3RMSNorm(96, 1e-6),
        "qwen3.5 norm": lambda: Qwen3_5MoeRMSNorm(96, 1e-6), "qwen3.5 gated norm": lambda: Qwen3_5MoeRMSNormGated(96, 1e-6),
        "llama feed-forward": lambda: LlamaMLP(LlamaConfig(**SIZES)),
        "qwen3 feed-forward": lambda: Qwen3MLP(Qwen3Config(**SIZES)),
        "qwen3.5 shared expert": lambda: Qwen3_5MoeMLP(LlamaConfig(**SIZES), 160),
    }[kind]().requires_grad_(False)
    if kind.endswith("norm"):
        module.weight.normal_(0 if kind == "qwen3.5 norm" else 1, 0.3)
    module = module.to(dtype)
    fused = nn.ModuleDict({"it": module, "norm": LlamaRMSNorm(8)})
    fuse(fused)
    assert fused["it"] is not module
    return module, fused["it"]


def run(module, x, dy):
    """Output and gradients; what is gated gets a gate of other values."""
    inputs = [x, x.flip(1) * 2] if "Gated" in type(module).__name__ else [x]
    inputs = [i.detach().to(next(module.parameters()).dtype).requires_grad_() for i in inputs]
    y = module(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))


KINDS = ("llama norm", "qwen3 norm", "qwen3.5 norm", "qwen3.5 gated norm",
         "llama feed-forward", "qwen3 feed-forward", "qwen3.5 shared expert")


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


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_rounds_where_transformers_does(kind):
    """A float32 sum taken in another order may turn a rounding now and then, not often."""
    reference, fused = pair(kind, torch.bfloat16)
    x, dy = (torch.randn(4, 64, 96).bfloat16() for _ in range(2))
    assert (run(fused, x, dy)[0] != run(reference, x, dy)[0]).float().mean() < 1e-3


def test_fewer_bytes_are_kept_for_the_backward_pass():
    def kept_bytes(module, x):
        kept = {}
        frozen = {p.data_ptr() for p in module.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in frozen:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = module(x, x.clone()) if "Gated" in type(module).__name__ else module(x)
        assert y.requires_grad
        return sum(kept.values())

    for kind, share in (("llama norm", 0.51), ("qwen3.5 norm", 0.51), ("qwen3.5 gated norm", 0.31),
                        ("llama feed-forward", 0.8)):
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


def test_a_model_whose_norms_are_not_known_is_refused():
    """A library that renames a class would else cost twice the memory without a word."""
    class RenamedRMSNorm(nn.Module):
        pass

    with pytest.raises(RuntimeError, match="fused.py knows no norm of this model, which has RenamedRMSNorm: add its class"):
        fuse(nn.ModuleDict({"norm": RenamedRMSNorm()}))
