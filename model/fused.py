"""Norm and SwiGLU with a backward pass by hand: the same numbers as transformers' modules, in half the memory.
They keep their inputs in the compute dtype; what is cheap is computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# X any leading dimensions, D features, I features inside the feed-forward

NORMS = ("LlamaRMSNorm", "Qwen3RMSNorm")  # weight * (x / rms(x)); Qwen3.5's differs
FEED_FORWARDS = ("LlamaMLP", "Qwen3MLP")  # down(silu(gate(x)) * up(x))


class FusedNorm(nn.Module):
    """transformers' RMSNorm with a frozen weight. Its own keeps two float32 copies of x for the backward pass."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x_XD: Tensor) -> Tensor:
        return RootMeanSquareNorm.apply(x_XD, self.weight, self.eps)


class RootMeanSquareNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) in float32, rounded before the weight as transformers does (Zhang and Sennrich
    2019, arXiv:1910.07467). Keeps x and one float32 number a position."""

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_XD = x_XD.float()
        norm_X1 = torch.linalg.vector_norm(x32_XD, dim=-1, keepdim=True)  # one pass; x * x would be written first
        rstd_X1 = norm_X1.square_().div_(x_XD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_XD, weight_D, rstd_X1)
        return (x32_XD * rstd_X1).to(x_XD.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor, None, None]:
        x_XD, weight_D, rstd_X1 = ctx.saved_tensors
        normed_XD = x_XD * rstd_X1  # float32
        dnormed_XD = dy_XD * weight_D.float()
        minus_mean_X1 = (normed_XD * dnormed_XD).sum(-1, keepdim=True).div_(-x_XD.shape[-1])
        return dnormed_XD.addcmul_(normed_XD, minus_mean_X1).mul_(rstd_X1).to(x_XD.dtype), None, None


class FusedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) with transformers' three linears, whichever they are by now."""

    def __init__(self, feed_forward: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj)

    def forward(self, x_XD: Tensor) -> Tensor:
        return self.down_proj(SwiGlu.apply(self.gate_proj(x_XD), self.up_proj(x_XD)))


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
    """Puts these modules in the place of transformers', under the same names and with the same children."""
    for name, module in list(model.named_modules()):
        kind, (parent, _, last) = type(module).__name__, name.rpartition(".")
        if kind in NORMS:
            setattr(model.get_submodule(parent), last, FusedNorm(module))
        elif kind in FEED_FORWARDS and module.config.hidden_act == "silu":
            setattr(model.get_submodule(parent), last, FusedFeedForward(module))
