"""Puts this project's modules in the place of transformers': norms, attention, feed-forwards and the experts' block.
Same numbers, and half the memory or less for the backward pass, which recomputes whatever is cheap."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import ATTENTIONS, GATED_ATTENTIONS, Attention
from model.matmul import project
from model.ops.compiled import compiled
from model.ops.gates import SigmoidGate
from model.ops.norms import FusedGatedNorm, FusedNorm, rows

# X any leading dimensions, T the rows that they make, D features, I features inside the feed-forward

NORMS = ("LlamaRMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm")  # weight * (x / rms(x))
CENTERED_NORMS = ("Qwen3_5MoeRMSNorm",)  # (1 + weight) * (x / rms(x))
GATED_NORMS = ("Qwen3_5MoeRMSNormGated",)  # weight * (x / rms(x)) * silu(gate)
FEED_FORWARDS = ("LlamaMLP", "Qwen3MLP", "Qwen3_5MoeMLP")  # down(silu(gate(x)) * up(x))
WITH_SHARED_EXPERT = ("Qwen3_5MoeSparseMoeBlock",)  # routed experts + sigmoid(gate) * shared expert


class FusedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) with the three linears of transformers' module, which may be quantized and adapted."""

    def __init__(self, feed_forward: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj)

    def forward(self, x_XD: Tensor) -> Tensor:
        return self.down_proj(SwiGlu.apply(*project(x_XD, self.gate_proj, self.up_proj)))


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202). Keeps gate and up, not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate_XI: Tensor, up_XI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_XI, up_XI)
        return swiglu(rows(gate_XI), rows(up_XI)).view(gate_XI.shape)

    @staticmethod
    def backward(ctx: Any, dy_XI: Tensor) -> tuple[Tensor, ...]:
        gate_XI, up_XI = ctx.saved_tensors
        return tuple(d_TI.view(gate_XI.shape) for d_TI in swiglu_backward(rows(dy_XI), rows(gate_XI), rows(up_XI)))


@compiled()
def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    return F.silu(gate_TI).mul_(up_TI)


@compiled()
def swiglu_backward(dy_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return torch.ops.aten.silu_backward(dy_TI * up_TI, gate_TI), F.silu(gate_TI).mul_(dy_TI)


class FusedExperts(nn.Module):
    """Routed experts and a shared one behind a gate, with the children of transformers' module."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, block.experts
        self.shared_expert, self.shared_expert_gate = block.shared_expert, block.shared_expert_gate

    def forward(self, x_XD: Tensor) -> Tensor:
        x_TD = rows(x_XD)
        shared_TD, gate_T1 = self.shared_expert(x_TD), self.shared_expert_gate(x_TD)
        _, weight_TK, index_TK = self.gate(x_TD)
        return SigmoidGate.apply(shared_TD, gate_T1, self.experts(x_TD, index_TK, weight_TK)).view(x_XD.shape)


def fuse(model: nn.Module) -> None:
    """Replaces transformers' norms, feed-forwards and attention by modules with the same names and the same children.

    Raises:
        RuntimeError: no norm of the model is known here, or its attention is not; transformers may have renamed the class.
    """
    num_norms = 0
    for name, module in list(model.named_modules()):
        kind, (parent, _, last) = type(module).__name__, name.rpartition(".")
        if kind in FEED_FORWARDS and module.config.hidden_act == "silu":
            setattr(model.get_submodule(parent), last, FusedFeedForward(module))
        if kind in WITH_SHARED_EXPERT:
            setattr(model.get_submodule(parent), last, FusedExperts(module))
        if last == "self_attn":
            if kind not in ATTENTIONS + GATED_ATTENTIONS:
                raise RuntimeError(f"{name} is a {kind}, which is not known: add it to ATTENTIONS in model/attention.py")
            setattr(model.get_submodule(parent), last, Attention(module))
        if kind in NORMS + CENTERED_NORMS + GATED_NORMS:
            setattr(model.get_submodule(parent), last, fused_norm(module))
            num_norms += 1
    if not num_norms:
        classes = sorted({type(module).__name__ for module in model.modules() if "norm" in type(module).__name__.lower()})
        raise RuntimeError(f"model/ops/fused.py knows no norm of this model, which has {', '.join(classes) or 'none'}: add its "
                           "class to NORMS, CENTERED_NORMS or GATED_NORMS there")


def fused_norm(module: Any) -> nn.Module:
    if type(module).__name__ in GATED_NORMS:
        return FusedGatedNorm(module.weight, module.variance_epsilon)
    if type(module).__name__ in CENTERED_NORMS:
        return FusedNorm(module.weight, module.eps, centered=True)
    return FusedNorm(module.weight, module.variance_epsilon)
