"""One block of the gated delta rule: its outputs and all gradients, for all chunks of the block at once.
Takes the memory of 10 float32 tensors [Z, C, V] forward and of 16 backward where K = V = 128 and R = 2.

For one head, with decays a_t = exp(g_t), normalized keys k_t and queries q_t, and a state S of size K x V:

    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = S_t^T q_t

Within a chunk of C positions, with c_i = g_1 + .. + g_i and D_ij = exp(c_i - c_j) for i >= j, else 0, this is

    A = strictly lower part of (beta k k^T) * D      T = (I + A)^-1        P = (q k^T) * D
    new = T (beta v - (beta e^c k) S)                values to write, less what the state already holds
    o = (e^c q) S + P new                            S' = e^(c_C) S + (e^(c_C - c) k)^T new

(Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464; Yang et al. 2024, arXiv:2406.06484). S' is linear in S:
S' = M S + U. So M and U are computed for all chunks at once, and only the product with M goes from chunk to chunk. The
gradient of S goes back in the same way, by M^T. All other gradients follow from S and its gradient, for all chunks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# N chunks of P pairs of a row and a value head, Z = N * P; R value heads a key head, Y = Z / R; C positions of a chunk,
# K key size, V value size

EPS = 1e-6  # added to the squared norms of q and k


class Block:
    """The matrices that both passes need, in float32. Normalizes q and k in place.

    Args:
        pairs, ratio: P and R.
    """

    def __init__(
        self, q_YCK: Tensor, k_YCK: Tensor, v_ZCV: Tensor, g_ZC1: Tensor, beta_ZC1: Tensor, pairs: int, ratio: int
    ) -> None:
        self.q_YCK, self.k_YCK, self.v_ZCV, self.beta_ZC1 = q_YCK, k_YCK, v_ZCV, beta_ZC1
        self.pairs, self.ratio, self.scale = pairs, ratio, k_YCK.shape[2] ** -0.5
        self.rnorm_q_YC1, self.rnorm_k_YC1 = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(EPS).rsqrt_() for x in (self.q_YCK, self.k_YCK))
        self.q_YCK.mul_(self.rnorm_q_YC1).mul_(self.scale)
        self.k_YCK.mul_(self.rnorm_k_YC1)
        eye_CC = torch.eye(k_YCK.shape[1], device=g_ZC1.device)
        above_CC = torch.ones_like(eye_CC, dtype=torch.bool).triu_(1)
        # sums by a matmul, since torch has no deterministic `cumsum` of floats on CUDA; in float64, since a matmul adds up each
        # sum in an order of its own, while differences between sums are what counts
        self.upto_CC = (~above_CC).double()
        c_ZC1 = (self.upto_CC @ g_ZC1.double()).float()
        self.grown_ZC1 = c_ZC1.exp()  # e^c
        self.left_ZC1 = (c_ZC1[:, -1:] - c_ZC1).exp_()  # e^(c_C - c)
        self.decay_ZCC = (c_ZC1 - c_ZC1.mT).masked_fill_(above_CC, -torch.inf).exp_()  # D
        self.kk_YCC = torch.bmm(self.k_YCK, self.k_YCK.mT)
        self.qk_YCC = torch.bmm(self.q_YCK, self.k_YCK.mT)
        a_ZCC = self.spread(self.kk_YCC, self.decay_ZCC).mul_(self.beta_ZC1)
        self.inverse_ZCC = torch.linalg.solve_triangular(a_ZCC, eye_CC, upper=False, unitriangular=True)  # T
        self.read_ZCK = self.spread(self.k_YCK, self.beta_ZC1 * self.grown_ZC1)
        # T^T (e^(c_C - c) k); its transpose times (beta v - read S) is what the chunk adds to the state
        self.write_ZCK = torch.bmm(self.inverse_ZCC.mT, self.spread(self.k_YCK, self.left_ZC1))

    def spread(self, x_YCK: Tensor, factor_ZCK: Tensor) -> Tensor:
        """Each key head times a factor for each of its value heads: Y to Z."""
        return (x_YCK[:, None] * factor_ZCK.unflatten(0, (-1, self.ratio))).flatten(0, 1)

    def gather(self, x_ZCK: Tensor) -> Tensor:
        """For each key head the sum over its value heads: Z to Y."""
        return x_ZCK.unflatten(0, (-1, self.ratio)).sum(1)

    def dot(self, x_YCK: Tensor, y_ZCK: Tensor) -> Tensor:
        return self.spread(x_YCK, y_ZCK).sum(-1, keepdim=True)

    def states(self, state_PKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states before each chunk and after the last one, [N + 1, P, K, V], and M of each chunk."""
        states_NPKV = self.empty_states()
        states_NPKV[0] = 0 if state_PKV is None else state_PKV
        torch.bmm(self.write_ZCK.mT, self.v_ZCV * self.beta_ZC1, out=states_NPKV[1:].flatten(0, 1))  # U
        m_ZKK = torch.bmm(self.write_ZCK.mT, self.read_ZCK).neg_()
        m_ZKK.diagonal(dim1=1, dim2=2).add_(self.grown_ZC1[:, -1])
        m_NPKK = m_ZKK.unflatten(0, (-1, self.pairs))
        before, *rest = states_NPKV.unbind()
        for after, m in zip(rest, m_NPKK.unbind()):
            before = after.baddbmm_(m, before)
        return states_NPKV, m_NPKK

    def empty_states(self) -> Tensor:
        num_chunks, sizes = len(self.v_ZCV) // self.pairs, (self.k_YCK.shape[2], self.v_ZCV.shape[2])
        return self.v_ZCV.new_empty(num_chunks + 1, self.pairs, *sizes)

    def new_values(self, state_ZKV: Tensor) -> Tensor:
        """`new` of every chunk, given the state before each chunk."""
        wanted_ZCV = (self.v_ZCV * self.beta_ZC1).baddbmm_(self.read_ZCK, state_ZKV, alpha=-1)
        return torch.bmm(self.inverse_ZCC, wanted_ZCV)

    def outputs(self, state_ZKV: Tensor) -> Tensor:
        """`o` of every chunk, given the state before each chunk: [Z, C, V]."""
        new_ZCV = self.new_values(state_ZKV)
        o_ZCV = torch.bmm(self.spread(self.q_YCK, self.grown_ZC1), state_ZKV)
        return o_ZCV.baddbmm_(self.spread(self.qk_YCC, self.decay_ZCC), new_ZCV)


@dataclass
class Gradients:
    """Gradients of the intermediate results that make up a block's outputs and last state."""

    wanted_ZCV: Tensor  # beta v - (beta e^c k) S
    asked_ZCK: Tensor  # e^c q
    read_ZCK: Tensor  # beta e^c k
    left_ZCK: Tensor  # e^(c_C - c) k
    end_Z1: Tensor  # e^(c_C)
    kk_ZCC: Tensor  # beta k k^T
    qk_ZCC: Tensor  # q k^T


def state_gradients(
    block: Block, m_NPKK: Tensor, do_ZCV: Tensor, dwanted_ZCV: Tensor, dstate_PKV: Tensor | None
) -> Tensor:
    """The gradients of the states before each chunk and after the last one, [N + 1, P, K, V].

    Args:
        dwanted_ZCV: the part of the gradient of `beta v - read S` that comes from the chunk's own outputs.
    """
    dstates_NPKV = block.empty_states()
    dstates_NPKV[-1] = 0 if dstate_PKV is None else dstate_PKV
    direct_ZKV = dstates_NPKV[:-1].flatten(0, 1)  # the part that comes from the chunk's own outputs
    torch.bmm(block.spread(block.q_YCK, block.grown_ZC1).mT, do_ZCV, out=direct_ZKV)
    direct_ZKV.baddbmm_(block.read_ZCK.mT, dwanted_ZCV, alpha=-1)
    *rest, dafter = dstates_NPKV.unbind()
    for dbefore, m in zip(reversed(rest), reversed(m_NPKK.mT.unbind())):
        dafter = dbefore.baddbmm_(m, dafter)
    return dstates_NPKV


def output_gradients(
    block: Block, state_PKV: Tensor | None, do_ZCV: Tensor, dstate_PKV: Tensor | None
) -> tuple[Gradients, Tensor]:
    """First half of the backward pass: from a block's outputs and last state to the intermediate results.

    Args:
        state_PKV, dstate_PKV: the state before the block, and the gradient of the state after it; None means zeros.

    Returns:
        The gradients of the intermediate results, and of the state before the block.
    """
    states_NPKV, m_NPKK = block.states(state_PKV)
    state_ZKV = states_NPKV[:-1].flatten(0, 1)
    new_ZCV = block.new_values(state_ZKV)
    dwanted_ZCV = torch.bmm(block.spread(block.qk_YCC, block.decay_ZCC).mT, do_ZCV)
    dwanted_ZCV = torch.bmm(block.inverse_ZCC.mT, dwanted_ZCV)
    dstates_NPKV = state_gradients(block, m_NPKK, do_ZCV, dwanted_ZCV, dstate_PKV)
    del m_NPKK
    dafter_ZKV = dstates_NPKV[1:].flatten(0, 1)
    dwanted_ZCV.baddbmm_(block.write_ZCK, dafter_ZKV)
    del block.write_ZCK, block.read_ZCK, block.inverse_ZCC  # makes room for the gradients below, which are as large
    dread_ZCK = torch.bmm(dwanted_ZCV, state_ZKV.mT).neg_()
    dasked_ZCK = torch.bmm(do_ZCV, state_ZKV.mT)
    dleft_ZCK = torch.bmm(new_ZCV, dafter_ZKV.mT)
    dend_Z1 = state_ZKV.mul_(dafter_ZKV).sum((1, 2))[:, None]
    dkk_ZCC = torch.bmm(dwanted_ZCV, new_ZCV.mT).neg_().mul_(block.decay_ZCC).tril_(-1)
    dqk_ZCC = torch.bmm(do_ZCV, new_ZCV.mT).mul_(block.decay_ZCC)
    grads = Gradients(dwanted_ZCV, dasked_ZCK, dread_ZCK, dleft_ZCK, dend_Z1, dkk_ZCC, dqk_ZCC)
    return grads, dstates_NPKV[0].clone()  # a copy, so that the gradients after it are freed


def input_gradients(block: Block, grads: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Second half: from the intermediate results to q, k, v, g and beta, shaped as in `Block`. Overwrites `grads`."""
    k_YCK, beta_ZC1 = block.k_YCK, block.beta_ZC1
    dbeta_ZC1 = (block.v_ZCV * grads.wanted_ZCV).sum(-1, keepdim=True)
    dv_ZCV = grads.wanted_ZCV.mul_(beta_ZC1)
    dpair_ZCC = block.spread(block.kk_YCC, grads.kk_ZCC)
    dbeta_ZC1 += dpair_ZCC.sum(2, keepdim=True)
    dpair_ZCC = dpair_ZCC.mul_(beta_ZC1).add_(block.spread(block.qk_YCC, grads.qk_ZCC))  # gradient of c_i - c_j
    dc_ZC1 = dpair_ZCC.sum(2, keepdim=True).sub_(dpair_ZCC.sum(1)[..., None])
    dkk_YCC, dqk_YCC = block.gather(grads.kk_ZCC.mul_(beta_ZC1)), block.gather(grads.qk_ZCC)

    dc_ZC1 += block.dot(block.q_YCK, grads.asked_ZCK.mul_(block.grown_ZC1))
    dgrown_ZC1 = block.dot(k_YCK, grads.read_ZCK.mul_(block.grown_ZC1))
    dbeta_ZC1 += dgrown_ZC1
    dc_ZC1.addcmul_(dgrown_ZC1, beta_ZC1)
    dleft_ZC1 = block.dot(k_YCK, grads.left_ZCK.mul_(block.left_ZC1))
    dc_ZC1 -= dleft_ZC1
    dc_ZC1[:, -1].add_(dleft_ZC1.sum(1)).addcmul_(grads.end_Z1, block.grown_ZC1[:, -1])
    dg_ZC1 = (block.upto_CC.T @ dc_ZC1.double()).float()

    dq_YCK = block.gather(grads.asked_ZCK).baddbmm_(dqk_YCC, k_YCK)
    dk_YCK = block.gather(grads.read_ZCK.mul_(beta_ZC1).add_(grads.left_ZCK))
    dk_YCK.baddbmm_(dqk_YCC.mT, block.q_YCK).baddbmm_(dkk_YCC + dkk_YCC.mT, k_YCK)
    return (before_norm(dq_YCK, block.q_YCK, block.rnorm_q_YC1, block.scale),
            before_norm(dk_YCK, k_YCK, block.rnorm_k_YC1, 1), dv_ZCV, dg_ZC1, dbeta_ZC1)


def before_norm(dx_YCK: Tensor, x_YCK: Tensor, rnorm_YC1: Tensor, scale: float) -> Tensor:
    """The gradient of y, where x = scale * y / norm(y), from the gradient of x, which is overwritten."""
    minus_YC1 = (x_YCK * dx_YCK).sum(-1, keepdim=True).div_(-(scale**2))
    return dx_YCK.addcmul_(x_YCK, minus_YC1).mul_(rnorm_YC1).mul_(scale)
