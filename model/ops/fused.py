"""Norms and SwiGLU with a backward pass by hand: the same numbers as transformers' modules, in half the memory or less.
Keeps the inputs in the compute dtype; the backward pass recomputes whatever is cheap."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import ATTENTIONS, GATED_ATTENTIONS, Attention
from model.matmul import project

# X any leading dimensions, D features, I features inside the feed-forward

NORMS = ("LlamaRMSNorm", "Qwen3RMSNorm")  # weight * (x / rms(x))
CENTERED_NORMS = ("Qwen3_5MoeRMSNorm",)  # (1 + weight) * (x / rms(x))
GATED_NORMS = ("Qwen3_5MoeRMSNormGated",)  # weight * (x / rms(x)) * silu(gate)
FEED_FORWARDS = ("LlamaMLP", "Qwen3MLP", "Qwen3_5MoeMLP")  # down(silu(gate(x)) * up(x))


class FusedNorm(nn.Module):
    """RMSNorm with a frozen weight. transformers' module keeps two float32 copies of x for the backward pass."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x_XD: Tensor) -> Tensor:
        return RootMeanSquareNorm.apply(x_XD, self.weight, self.eps)


class RootMeanSquareNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467), in float32, but rounded before the
    weight multiplies, as in transformers. Keeps x and one float32 number a position."""

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_XD = x_XD.float()
        rstd_X1 = reciprocal_rms(x32_XD, eps)
        ctx.save_for_backward(x_XD, weight_D, rstd_X1)
        return (x32_XD * rstd_X1).to(x_XD.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor, None, None]:
        x_XD, weight_D, rstd_X1 = ctx.saved_tensors
        return norm_backward(x_XD, rstd_X1, dy_XD * weight_D.float()).to(x_XD.dtype), None, None


def reciprocal_rms(x32_XD: Tensor, eps: float) -> Tensor:
    norm_X1 = torch.linalg.vector_norm(x32_XD, dim=-1, keepdim=True)  # writes no x * x to memory
    return norm_X1.square_().div_(x32_XD.shape[-1]).add_(eps).rsqrt_()


def norm_backward(x_XD: Tensor, rstd_X1: Tensor, dnormed_XD: Tensor) -> Tensor:
    """The gradient of x, in float32, from the gradient of x * rstd, which is overwritten."""
    normed_XD = x_XD * rstd_X1
    minus_mean_X1 = (normed_XD * dnormed_XD).sum(-1, keepdim=True).div_(-x_XD.shape[-1])
    return dnormed_XD.addcmul_(normed_XD, minus_mean_X1).mul_(rstd_X1)


class FusedCenteredNorm(nn.Module):
    """Qwen3.5's RMSNorm, whose frozen weight is stored minus 1. transformers' module keeps a float32 copy of x."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x_XD: Tensor) -> Tensor:
        return CenteredNorm.apply(x_XD, self.weight, self.eps)


class CenteredNorm(torch.autograd.Function):
    """(1 + weight) * x / sqrt(mean(x^2) + eps) in float32, rounded at the end. Keeps as much as RootMeanSquareNorm."""

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_XD = x_XD.float()
        rstd_X1 = reciprocal_rms(x32_XD, eps)
        ctx.save_for_backward(x_XD, weight_D, rstd_X1)
        return (x32_XD * rstd_X1).mul_(weight_D.float() + 1).to(x_XD.dtype)

    @staticmethod
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor, None, None]:
        x_XD, weight_D, rstd_X1 = ctx.saved_tensors
        return norm_backward(x_XD, rstd_X1, dy_XD * (weight_D.float() + 1)).to(x_XD.dtype), None, None


class FusedGatedNorm(nn.Module):
    """RMSNorm with a frozen weight, times SiLU of a gate. transformers' module keeps both inputs and SiLU in float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x_XD: Tensor, gate_XD: Tensor) -> Tensor:
        return GatedNorm.apply(x_XD, gate_XD, self.weight, self.eps)


class GatedNorm(torch.autograd.Function):
    """RootMeanSquareNorm(x) * silu(gate), the product in float32. Keeps x, the gate and one float32 number a position."""

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, gate_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_XD = x_XD.float()
        rstd_X1 = reciprocal_rms(x32_XD, eps)
        ctx.save_for_backward(x_XD, gate_XD, weight_D, rstd_X1)
        weighted_XD = (x32_XD * rstd_X1).to(x_XD.dtype).mul_(weight_D)
        del x32_XD  # before the gate's float32 copy, which is as large
        return F.silu(gate_XD.float()).mul_(weighted_XD).to(x_XD.dtype)

    @staticmethod
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_XD, gate_XD, weight_D, rstd_X1 = ctx.saved_tensors
        gate32_XD = gate_XD.float()
        dgate_XD = (x_XD * rstd_X1).to(x_XD.dtype).mul_(weight_D) * dy_XD.float()
        dgate_XD = torch.ops.aten.silu_backward(dgate_XD, gate32_XD).to(gate_XD.dtype)
        dweighted_XD = F.silu(gate32_XD).mul_(dy_XD).to(x_XD.dtype)
        del gate32_XD
        return norm_backward(x_XD, rstd_X1, dweighted_XD * weight_D.float()).to(x_XD.dtype), dgate_XD, None, None


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
        return F.silu(gate_XI).mul_(up_XI)

    @staticmethod
    def backward(ctx: Any, dy_XI: Tensor) -> tuple[Tensor, Tensor]:
        gate_XI, up_XI = ctx.saved_tensors
        dgate_XI = torch.ops.aten.silu_backward(dy_XI * up_XI, gate_XI)
        return dgate_XI, F.silu(gate_XI).mul_(dy_XI)


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
        if last == "self_attn":
            if kind not in ATTENTIONS + GATED_ATTENTIONS:
                raise RuntimeError(f"{name} is a {kind}, which is not known: add it to ATTENTIONS in model/attention.py")
            setattr(model.get_submodule(parent), last, Attention(module))
        for kinds, fused in ((NORMS, FusedNorm), (CENTERED_NORMS, FusedCenteredNorm), (GATED_NORMS, FusedGatedNorm)):
            if kind in kinds:
                setattr(model.get_submodule(parent), last, fused(module))
                num_norms += 1
    if not num_norms:
        classes = sorted({type(module).__name__ for module in model.modules() if "norm" in type(module).__name__.lower()})
        raise RuntimeError(f"model/ops/fused.py knows no norm of this model, which has {', '.join(classes) or 'none'}: add its "
                           "class to NORMS, CENTERED_NORMS or GATED_NORMS there")
