"""RMSNorm with a frozen weight, alone, of a residual sum or times a gate, with a backward pass by hand.
Keeps the normed tensor in the compute dtype and one float32 number a position; transformers keeps two float32 copies."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops.compiled import compiled

# X any leading dimensions, T the rows that they make, D features


class FusedNorm(nn.Module):
    """In the place of transformers' norms: weight * x / rms(x), or (1 + weight) * x / rms(x) if `centered`, as in Qwen3.5."""

    def __init__(self, weight: Any, eps: float, centered: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.centered = weight, eps, centered

    def forward(self, x_XD: Tensor) -> Tensor:
        return SumNorm.apply(x_XD, None, self.weight, self.eps, self.centered)[1]

    def of_sum(self, x_XD: Tensor, h_XD: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + h, or x where h is None, and the norm of that: the stream after a sublayer, and what the next one reads."""
        return SumNorm.apply(x_XD, h_XD, self.weight, self.eps, self.centered)


class SumNorm(torch.autograd.Function):
    """The sum and its norm (Zhang and Sennrich 2019, arXiv:1910.07467); backward adds up the gradients of both."""

    @staticmethod
    def forward(
        ctx: Any, x_XD: Tensor, h_XD: Tensor | None, weight_D: Tensor, eps: float, centered: bool
    ) -> tuple[Tensor, Tensor]:
        if h_XD is None:
            y_TD, rstd_T1 = norm(rows(x_XD), weight_D, eps, centered)
        else:
            x_TD, y_TD, rstd_T1 = add_norm(rows(x_XD), rows(h_XD), weight_D, eps, centered)
            x_XD = x_TD.view(x_XD.shape)
        ctx.save_for_backward(x_XD, weight_D, rstd_T1)
        ctx.centered, ctx.is_sum = centered, h_XD is not None
        ctx.set_materialize_grads(False)  # a sum that nobody reads has no gradient
        return x_XD, y_TD.view(x_XD.shape)

    @staticmethod
    def backward(ctx: Any, dx_XD: Tensor | None, dy_XD: Tensor) -> tuple[Tensor | None, ...]:
        x_XD, weight_D, rstd_T1 = ctx.saved_tensors
        dx_TD = norm_backward(rows(x_XD), rstd_T1, weight_D, rows(dy_XD), None if dx_XD is None else rows(dx_XD), ctx.centered)
        dx_XD = dx_TD.view(x_XD.shape)
        return dx_XD, dx_XD if ctx.is_sum else None, None, None, None


def rows(x_XD: Tensor) -> Tensor:
    return x_XD.flatten(0, -2)


@compiled()
def norm(x_TD: Tensor, weight_D: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor]:
    """Norm and 1 / rms, [T, 1]. In float32, but as in transformers rounded before a weight that is not centered multiplies."""
    x32_TD = x_TD.float()
    norm_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True)  # writes no x * x to memory
    rstd_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
    if centered:
        return (x32_TD * rstd_T1).mul_(weight_D.float() + 1).to(x_TD.dtype), rstd_T1
    return (x32_TD * rstd_T1).to(x_TD.dtype).mul_(weight_D), rstd_T1


@compiled()
def add_norm(
    x_TD: Tensor, h_TD: Tensor, weight_D: Tensor, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x + h, and its `norm`."""
    sum_TD = x_TD + h_TD
    return sum_TD, *norm.plain(sum_TD, weight_D, eps, centered)


@compiled()
def norm_backward(
    x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor, dy_TD: Tensor, dx_TD: Tensor | None, centered: bool
) -> Tensor:
    """The gradient of x from that of its norm, plus `dx_TD`, which x has from elsewhere."""
    dnormed_TD = dy_TD * (weight_D.float() + 1 if centered else weight_D.float())
    normed_TD = x_TD * rstd_T1
    minus_mean_T1 = (normed_TD * dnormed_TD).sum(-1, keepdim=True).div_(-x_TD.shape[-1])
    normed_dx_TD = dnormed_TD.addcmul_(normed_TD, minus_mean_T1).mul_(rstd_T1).to(x_TD.dtype)
    return normed_dx_TD if dx_TD is None else normed_dx_TD.add_(dx_TD)


class FusedGatedNorm(nn.Module):
    """RMSNorm with a frozen weight, times SiLU of a gate. transformers' module keeps both inputs and SiLU in float32."""

    def __init__(self, weight: Any, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x_XD: Tensor, gate_XD: Tensor) -> Tensor:
        return GatedNorm.apply(x_XD, gate_XD, self.weight, self.eps)


class GatedNorm(torch.autograd.Function):
    """norm(x) * silu(gate), the product in float32. Keeps x, the gate and one float32 number a position."""

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, gate_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y_TD, rstd_T1 = gated_norm(rows(x_XD), rows(gate_XD), weight_D, eps)
        ctx.save_for_backward(x_XD, gate_XD, weight_D, rstd_T1)
        return y_TD.view(x_XD.shape)

    @staticmethod
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_XD, gate_XD, weight_D, rstd_T1 = ctx.saved_tensors
        dx_TD, dgate_TD = gated_norm_backward(rows(x_XD), rows(gate_XD), rstd_T1, weight_D, rows(dy_XD))
        return dx_TD.view(x_XD.shape), dgate_TD.view(x_XD.shape), None, None


@compiled()
def gated_norm(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed_TD, rstd_T1 = norm.plain(x_TD, weight_D, eps, False)
    return F.silu(gate_TD.float()).mul_(normed_TD).to(x_TD.dtype), rstd_T1


@compiled()
def gated_norm_backward(
    x_TD: Tensor, gate_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor, dy_TD: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x and the gate."""
    gate32_TD = gate_TD.float()
    dgate_TD = (x_TD * rstd_T1).to(x_TD.dtype).mul_(weight_D) * dy_TD.float()
    dgate_TD = torch.ops.aten.silu_backward(dgate_TD, gate32_TD).to(gate_TD.dtype)
    dnorm_TD = F.silu(gate32_TD).mul_(dy_TD).to(x_TD.dtype)
    del gate32_TD
    return norm_backward.plain(x_TD, rstd_T1, weight_D, dnorm_TD, None, False), dgate_TD
