"""Gates with a backward pass by hand: a sigmoid that scales an output, and the gates of the delta rule.
Keeps the inputs in the compute dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.compiled import compiled

# T tokens, X any further dimensions, G as X or with a last dimension of 1, H value heads


class SigmoidGate(torch.autograd.Function):
    """x * sigmoid(gate), plus `rest` if it is given: [T, X]. Of a gate [T, 1] one number scales a token."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, gate_TG: Tensor, rest_TX: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TX, gate_TG)
        ctx.has_rest = rest_TX is not None
        return gated(x_TX, gate_TG, rest_TX)

    @staticmethod
    def backward(ctx: Any, dy_TX: Tensor) -> tuple[Tensor | None, ...]:
        return *gated_backward(dy_TX, *ctx.saved_tensors), dy_TX if ctx.has_rest else None


@compiled()
def gated(x_TX: Tensor, gate_TG: Tensor, rest_TX: Tensor | None) -> Tensor:
    y_TX = x_TX * gate_TG.sigmoid()
    return y_TX if rest_TX is None else y_TX.add_(rest_TX)


@compiled()
def gated_backward(dy_TX: Tensor, x_TX: Tensor, gate_TG: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and the gate."""
    share_TG = gate_TG.sigmoid()
    dshare_TG = dy_TX * x_TX
    if gate_TG.shape != x_TX.shape:
        dshare_TG = dshare_TG.sum(-1, keepdim=True)
    return dy_TX * share_TG, torch.ops.aten.sigmoid_backward(dshare_TG, share_TG)


class DeltaGates(torch.autograd.Function):
    """Log decays in float32 and betas of the gated delta rule, both [T, H] (Yang et al. 2024, arXiv:2412.06464); the rates and
    the bias are frozen."""

    @staticmethod
    def forward(ctx: Any, a_TH: Tensor, b_TH: Tensor, log_rate_H: Tensor, bias_H: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a_TH, b_TH, log_rate_H, bias_H)
        return delta_gates(a_TH, b_TH, log_rate_H, bias_H)

    @staticmethod
    def backward(ctx: Any, dg_TH: Tensor, dbeta_TH: Tensor) -> tuple[Tensor | None, ...]:
        return *delta_gates_backward(dg_TH, dbeta_TH, *ctx.saved_tensors), None, None


@compiled(launches=2)
def delta_gates(a_TH: Tensor, b_TH: Tensor, log_rate_H: Tensor, bias_H: Tensor) -> tuple[Tensor, Tensor]:
    return -log_rate_H.float().exp() * F.softplus(a_TH.float() + bias_H), b_TH.sigmoid()


@compiled(launches=2)
def delta_gates_backward(
    dg_TH: Tensor, dbeta_TH: Tensor, a_TH: Tensor, b_TH: Tensor, log_rate_H: Tensor, bias_H: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of a and b."""
    da_TH = -log_rate_H.float().exp() * dg_TH * (a_TH.float() + bias_H).sigmoid()
    return da_TH.to(a_TH.dtype), torch.ops.aten.sigmoid_backward(dbeta_TH, b_TH.sigmoid())
