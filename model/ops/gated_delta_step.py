"""The gated delta rule for one more position of each row, from the state that the positions before it left.
Costs the state of every row, K x V float32 numbers a value head, and a few of its rows while it runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.gated_delta_block import EPS

# B rows, X channels of q, k and v side by side, G key heads, H value heads, K key size, V value size, W convolution's width


def gated_delta_step(
    qkv_BX: Tensor, g_BH: Tensor, beta_BH: Tensor, state_BHKV: Tensor, key_heads: int, key_size: int
) -> Tensor:
    """The output [B, H, V] of `gated_delta_rule` at the next position, by the recurrence itself (gated_delta_block.py).

    Args:
        qkv_BX: q, k and v side by side, after the convolution and before SiLU.
        state_BHKV: in float32; becomes the state after this position.
    """
    num_keys, ratio = key_heads * key_size, g_BH.shape[1] // key_heads
    q, k, v = F.silu(qkv_BX).float().split([num_keys, num_keys, qkv_BX.shape[1] - 2 * num_keys], dim=1)
    q_BH1K, k_BH1K = (
        unit(x.unflatten(1, (key_heads, 1, key_size))).repeat_interleave(ratio, dim=1) for x in (q, k))
    v_BH1V = v.unflatten(1, (g_BH.shape[1], 1, -1))
    state_BHKV.mul_(g_BH.float().exp()[..., None, None])
    new_BH1V = (v_BH1V - k_BH1K @ state_BHKV) * beta_BH.float()[..., None, None]
    state_BHKV.addcmul_(k_BH1K.mT, new_BH1V)
    return (q_BH1K * key_size**-0.5 @ state_BHKV)[:, :, 0].to(qkv_BX.dtype)


def unit(x_BGK: Tensor) -> Tensor:
    """Each vector over its length."""
    return x_BGK * (x_BGK.square().sum(-1, keepdim=True) + EPS).rsqrt()


def convolution_step(window_BWC: Tensor, weight_C1W: Tensor) -> Tensor:
    """The convolution's output [B, C] at the last of W positions; summed in float32, rounded once."""
    return torch.einsum("bwc,cw->bc", window_BWC.float(), weight_C1W[:, 0].float()).to(window_BWC.dtype)
