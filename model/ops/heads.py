"""Queries and keys on their way to attention: the norm of each head and rotary positions, with a backward pass by hand.
Keeps the heads as they come and, where they are normed, one float32 number a head and position; else nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.ops.compiled import compiled
from model.ops.norms import FusedNorm, norm, norm_backward

# T tokens of the stream, H query heads, G key heads, E head size, S of it rotated: cosines and sines [T, S], whose halves are
# equal


class PlaceHeads(torch.autograd.Function):
    """Queries [T, H, E] and keys [T, G, E], rotated; where there are norms, normed before."""

    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TGE: Tensor, norms: tuple[FusedNorm, FusedNorm] | None, cos_TS: Tensor, sin_TS: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.norms = norms
        if norms is None:
            ctx.save_for_backward(cos_TS, sin_TS)
            return rotate_heads(q_THE, k_TGE, cos_TS, sin_TS, False)
        (q_norm, k_norm), rotary = norms, (cos_TS, sin_TS)
        q, k, *rstd = norm_and_rotate(q_THE, k_TGE, q_norm.weight, k_norm.weight, *rotary, q_norm.eps, q_norm.centered)
        ctx.save_for_backward(q_THE, k_TGE, *rstd, *rotary)
        return q, k

    @staticmethod
    def backward(ctx: Any, dq_THE: Tensor, dk_TGE: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.norms is None:
            return *rotate_heads(dq_THE, dk_TGE, *ctx.saved_tensors, True), None, None, None
        q_norm, k_norm = ctx.norms
        grads = norm_and_rotate_backward(
            dq_THE, dk_TGE, *ctx.saved_tensors, q_norm.weight, k_norm.weight, q_norm.centered)
        return *grads, None, None, None


def rotate(x_THE: Tensor, cos_TS: Tensor, sin_TS: Tensor, back: bool = False) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of each head's first S numbers, whose halves are pairs; `back` turns
    the other way, which is the gradient."""
    cos_T1S, sin_T1S = cos_TS[:, None], -sin_TS[:, None] if back else sin_TS[:, None]
    turned, rest = x_THE.split([cos_TS.shape[1], x_THE.shape[2] - cos_TS.shape[1]], dim=2)
    first, second = turned.chunk(2, dim=2)
    turned = turned * cos_T1S + torch.cat([-second, first], dim=2) * sin_T1S
    return torch.cat([turned, rest], dim=2) if rest.shape[2] else turned


@compiled(launches=2)
def rotate_heads(
    q_THE: Tensor, k_TGE: Tensor, cos_TS: Tensor, sin_TS: Tensor, back: bool
) -> tuple[Tensor, Tensor]:
    return rotate(q_THE, cos_TS, sin_TS, back), rotate(k_TGE, cos_TS, sin_TS, back)


@compiled(launches=4, read_twice=2)
def norm_and_rotate(
    q_THE: Tensor, k_TGE: Tensor, q_weight_E: Tensor, k_weight_E: Tensor, cos_TS: Tensor, sin_TS: Tensor,
    eps: float, centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys, and 1 / rms of each head: [T, H, 1] and [T, G, 1]."""
    q_THE, q_rstd_TH1 = norm.plain(q_THE, q_weight_E, eps, centered)
    k_TGE, k_rstd_TG1 = norm.plain(k_TGE, k_weight_E, eps, centered)
    return *rotate_heads.plain(q_THE, k_TGE, cos_TS, sin_TS, False), q_rstd_TH1, k_rstd_TG1


@compiled(launches=2)
def norm_and_rotate_backward(
    dq_THE: Tensor, dk_TGE: Tensor, q_THE: Tensor, k_TGE: Tensor, q_rstd_TH1: Tensor, k_rstd_TG1: Tensor,
    cos_TS: Tensor, sin_TS: Tensor, q_weight_E: Tensor, k_weight_E: Tensor, centered: bool,
) -> tuple[Tensor, Tensor]:
    dq_THE, dk_TGE = rotate_heads.plain(dq_THE, dk_TGE, cos_TS, sin_TS, True)
    return (norm_backward.plain(q_THE, q_rstd_TH1, q_weight_E, dq_THE, None, centered),
            norm_backward.plain(k_TGE, k_rstd_TG1, k_weight_E, dk_TGE, None, centered))
