"""The routed experts of one layer: quantized weights, a few experts dequantized at a time, forward and backward by hand.
Needs at most `working_bytes` above inputs and outputs, almost independent of the number of experts.

On cards for which torch has no grouped matmul, `by_kernel.py` computes all experts at once, and the loop over groups is its
reference.

For the backward pass only the inputs are kept: hidden states, each token's experts, and their routing weights. The
backward pass recomputes all intermediate results (6 matmuls an expert instead of 3), since they would take K times the
memory of the input. Both passes sum in the same order as autograd, so on CPU the results equal those of autograd
through the dequantized weights bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.devices import OFF, generation, on_gpu
from model.matmul import UNREAD, not_computed
from model.moe import by_kernel
from model.moe.expert_weights import MATRICES, ExpertMatrices
from model.moe.routing import Group, groups_of, sort_by_expert

# E experts, G of them in a group, T tokens, K experts a token, S = T * K assignments of a token to an expert, N of them
# in a group, D hidden size, I intermediate size, R rank of an adapter; from `Adapter` on, I inputs and O outputs

GROUP_BYTES = 64 * 2**20  # dequantized weights of a group; one expert of Qwen3.5-35B-A3B has 6 MiB


class FrozenExperts(nn.Module):
    """Replaces `layer.mlp.experts`: the weighted sum of each token's experts, which are frozen.

    Gradients flow to the hidden states and to the routing weights.

    Args:
        base: how the experts are stored, a key of `expert_weights.MATRICES`; `put` fills them in.
        dtype: of the dequantized experts and the matmuls.
    """

    def __init__(
        self, num_experts: int, hidden: int, intermediate: int, base: str, dtype: torch.dtype, device: Any
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden, self.intermediate, self.dtype = num_experts, hidden, intermediate, dtype
        self.gate_up_proj = MATRICES[base]((num_experts, 2 * intermediate, hidden), dtype, device)
        self.down_proj = MATRICES[base]((num_experts, hidden, intermediate), dtype, device)
        self.group_size = max(GROUP_BYTES // (3 * intermediate * hidden * dtype.itemsize), 1)  # experts
        self.tokens_E: Tensor | None = None  # tokens of each expert in training; counted if usage.py puts zeros here

    def put(self, e: int, gate_up_2ID: Tensor, down_DI: Tensor) -> None:
        """Stores the weights of expert `e`, given as in the checkpoint, the gate's rows before those of up."""
        self.gate_up_proj.put(e, gate_up_2ID)
        self.down_proj.put(e, down_DI)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, D] from hidden states, chosen experts and routing weights, as transformers' experts compute it."""
        return ExpertsFunction.apply(x_TD, weight_TK, index_TK, self, 0.0, None, None, None, None)


def working_bytes(experts: FrozenExperts, num_tokens: int, experts_per_token: int) -> int:
    """The most bytes that forward or backward allocate above inputs and outputs, adapters' copies and gradients aside.

    These are the dequantized weights of one group, the rows of one group (never more rows than tokens), the sorted
    assignments, and 16 bytes an expert.
    """
    per_expert = 3 * experts.intermediate * experts.hidden
    weights = experts.group_size * per_expert * (experts.dtype.itemsize + 4 / 64 + 1 / 64)  # absmax of nf4: float32, uint8
    rows = num_tokens * (6 * experts.hidden + 8 * experts.intermediate) * experts.dtype.itemsize
    return int(weights) + rows + num_tokens * experts_per_token * 5 * 8 + 16 * (experts.num_experts + 1)


# Forward and backward


def takes_kernel(experts: FrozenExperts, x_TD: Tensor, adapter: Tensor | None) -> bool:
    """Whether all experts are computed at once by kernels of this project; else by groups. Adapters are computed by groups."""
    return adapter is None and "expert_kernel" not in OFF and by_kernel.fits(x_TD, experts.hidden, experts.intermediate)


class ExpertsFunction(torch.autograd.Function):
    """Sum over a token's experts of weight * down(silu(gate(x)) * up(x)). The adapters are peft's tensors or None."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, index_TK: Tensor, experts: FrozenExperts, scaling: float,
        gate_up_a: Tensor | None, gate_up_b: Tensor | None, down_a: Tensor | None, down_b: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weight_TK, index_TK, gate_up_a, gate_up_b, down_a, down_b)
        ctx.experts, ctx.scaling = experts, scaling
        if experts in UNREAD:
            return not_computed(x_TD, *x_TD.shape)
        order_S, bounds_E1 = sort_by_expert(index_TK, experts.num_experts)
        if experts.tokens_E is not None and experts.training:
            experts.tokens_E += bounds_E1.diff()
        if takes_kernel(experts, x_TD, gate_up_a):
            return by_kernel.forward(x_TD, weight_TK, order_S, bounds_E1, experts.gate_up_proj, experts.down_proj)
        gate_up_lora = Adapter.of(gate_up_a, gate_up_b, scaling, experts.num_experts)
        down_lora = Adapter.of(down_a, down_b, scaling, experts.num_experts)
        out_TD = torch.zeros_like(x_TD)
        token_S, weight_S1 = order_S // index_TK.shape[1], weight_TK.flatten()[order_S, None]
        for group in groups_of(bounds_E1, index_TK, experts.group_size):
            token_N = token_S[group.rows]
            gate_up = Projection(experts.gate_up_proj, gate_up_lora, group)
            gate_NI, up_NI = gate_up.forward(x_TD[token_N]).chunk(2, dim=-1)
            h_NI = F.silu(gate_NI).mul_(up_NI)
            down = Projection(experts.down_proj, down_lora, group)
            y_ND = down.forward(h_NI).mul_(weight_S1[group.rows])
            add_rows(out_TD, token_N, y_ND, group.counts)
            del gate_up, down  # before the next group is dequantized, so that only one exists at a time
        return out_TD

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_TK, index_TK, gate_up_a, gate_up_b, down_a, down_b = ctx.saved_tensors
        experts: FrozenExperts = ctx.experts
        order_S, bounds_E1 = sort_by_expert(index_TK, experts.num_experts)
        if takes_kernel(experts, x_TD, gate_up_a):
            grads = by_kernel.backward(x_TD, weight_TK, dout_TD, order_S, bounds_E1, experts.gate_up_proj, experts.down_proj,
                                       ctx.needs_input_grad[0])
            return *grads, *[None] * 7
        gate_up_lora = Adapter.of(gate_up_a, gate_up_b, ctx.scaling, experts.num_experts, with_grads=True)
        down_lora = Adapter.of(down_a, down_b, ctx.scaling, experts.num_experts, with_grads=True)
        dx_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[0] else None
        dweight_S = torch.zeros_like(weight_TK).flatten() if ctx.needs_input_grad[1] else None
        token_S, weight_S1 = order_S // index_TK.shape[1], weight_TK.flatten()[order_S, None]
        for group in reversed(groups_of(bounds_E1, index_TK, experts.group_size)):
            token_N = token_S[group.rows]
            gate_up = Projection(experts.gate_up_proj, gate_up_lora, group)
            x_ND = x_TD[token_N]
            gate_NI, up_NI = gate_up.forward(x_ND).chunk(2, dim=-1)
            act_NI = F.silu(gate_NI)
            h_NI = act_NI * up_NI
            down = Projection(experts.down_proj, down_lora, group)
            dy_ND = dout_TD[token_N]
            if dweight_S is not None:
                dweight_S[order_S[group.rows]] = down.forward(h_NI).mul_(dy_ND).sum(dim=-1)
            dy_ND.mul_(weight_S1[group.rows])
            dh_NI = down.backward(dy_ND, h_NI)
            del h_NI, dy_ND, down  # makes room for the gradients below, which are as large
            dup_NI = dh_NI * act_NI
            dgate_NI = torch.ops.aten.silu_backward(dh_NI.mul_(up_NI), gate_NI)
            dgate_up_NO = torch.cat([dgate_NI, dup_NI], dim=-1)
            del gate_NI, up_NI, act_NI, dh_NI, dgate_NI, dup_NI
            dx_ND = gate_up.backward(dgate_up_NO, x_ND)
            del gate_up, x_ND, dgate_up_NO
            if dx_TD is not None:
                add_rows(dx_TD, token_N, dx_ND, group.counts, last_first=True)
        dweight_TK = None if dweight_S is None else dweight_S.view_as(weight_TK)
        return dx_TD, dweight_TK, None, None, None, *grads_of(gate_up_lora), *grads_of(down_lora)


class Adapter:
    """Low-rank updates of one projection of all experts, with their gradients in the backward pass."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float, num_experts: int, with_grads: bool) -> None:
        self.a, self.b, self.scaling, self.num_experts = a, b, scaling, num_experts
        self.da = torch.zeros_like(a) if with_grads else None
        self.db = torch.zeros_like(b) if with_grads else None

    @classmethod
    def of(cls, a: Tensor | None, b: Tensor | None, scaling: float, num_experts: int,
           with_grads: bool = False) -> Adapter | None:
        return None if a is None or b is None else cls(a, b, scaling, num_experts, with_grads)

    def put_grads(self, group: Group, da_GRI: Tensor, db_GOR: Tensor) -> None:
        assert self.da is not None and self.db is not None
        self.a_GRI(self.da, group.experts).copy_(da_GRI)
        self.b_GOR(self.db, group.experts).copy_(db_GOR)

    def a_GRI(self, a: Tensor, experts: slice) -> Tensor:
        """The group's part of `a`, which is A or its gradient in peft's layout: the experts' rows one below the other."""
        return a.view(self.num_experts, -1, a.shape[-1])[experts]

    def b_GOR(self, b: Tensor, experts: slice) -> Tensor:
        """The group's part of `b`, B or its gradient in peft's layout: for each rank the experts' columns side by side."""
        return b.view(b.shape[0], -1, self.num_experts)[..., experts].permute(2, 0, 1)


def grads_of(adapter: Adapter | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if adapter is None else (adapter.da, adapter.db)


class Projection:
    """One projection of a group: y = x W^T + scaling * x A^T B^T, each row with W (dequantized), A and B of its expert."""

    def __init__(self, matrices: ExpertMatrices, adapter: Adapter | None, group: Group) -> None:
        self.w_GOI = matrices.dequantize(group.experts.start, group.experts.stop)
        self.group, self.adapter = group, adapter
        if adapter is not None:
            self.a_GRI = adapter.a_GRI(adapter.a, group.experts).to(matrices.dtype)
            self.b_GOR = adapter.b_GOR(adapter.b, group.experts).to(matrices.dtype).contiguous()

    def forward(self, x_NI: Tensor) -> Tensor:
        y_NO = grouped_matmul(x_NI, self.w_GOI.transpose(1, 2), self.group)
        if self.adapter is not None:
            h_NR = grouped_matmul(x_NI, self.a_GRI.transpose(1, 2), self.group)
            y_NO.add_(grouped_matmul(h_NR, self.b_GOR.transpose(1, 2), self.group), alpha=self.adapter.scaling)
        return y_NO

    def backward(self, dy_NO: Tensor, x_NI: Tensor) -> Tensor:
        """Returns the input's gradient and puts the gradients of A and B into the adapter."""
        dx_NI = grouped_matmul(dy_NO, self.w_GOI, self.group)
        if self.adapter is not None:
            h_NR = grouped_matmul(x_NI, self.a_GRI.transpose(1, 2), self.group)
            dh_NR = grouped_matmul(dy_NO, self.b_GOR, self.group).mul_(self.adapter.scaling)
            dx_NI += grouped_matmul(dh_NR, self.a_GRI, self.group)
            self.adapter.put_grads(self.group, grouped_outer(dh_NR, x_NI, self.group),
                                   grouped_outer(dy_NO, h_NR, self.group) * self.adapter.scaling)
        return dx_NI


def grouped_matmul(x_NI: Tensor, w_GIO: Tensor, group: Group) -> Tensor:
    """Each row times its expert's matrix: [N, O]. One kernel for all experts if torch has it, else one matmul an expert."""
    if "grouped_matmul" not in OFF and has_grouped_kernel(x_NI, w_GIO):
        return F.grouped_mm(x_NI, w_GIO, offs=group.stops_G)
    y_NO = x_NI.new_empty(len(x_NI), w_GIO.shape[2])
    for x, w, y in zip(x_NI.split(group.counts), w_GIO, y_NO.split(group.counts)):
        if on_gpu(x):
            torch.mm(x, w, out=y)
        else:
            y.copy_((padded(x) @ w)[: len(x)])
    return y_NO


def add_rows(sum_TD: Tensor, token_N: Tensor, y_ND: Tensor, counts: tuple[int, ...], last_first: bool = False) -> None:
    """Adds each row of y to its token's sum; on CPU in autograd's order of experts, on which bf16 rounding depends."""
    if on_gpu(sum_TD):
        sum_TD.index_add_(0, token_N, y_ND)
        return
    by_expert = list(zip(token_N.split(counts), y_ND.split(counts)))
    for token, y in reversed(by_expert) if last_first else by_expert:
        sum_TD.index_add_(0, token, y)


def grouped_outer(a_NO: Tensor, b_NI: Tensor, group: Group) -> Tensor:
    """For each expert the sum of its rows' outer products: [G, O, I]."""
    return torch.stack([padded(a).T @ padded(b) for a, b in zip(a_NO.split(group.counts), b_NI.split(group.counts))])


def padded(x_NI: Tensor) -> Tensor:
    """On CPU in bf16 adds zero rows, so that only four row counts occur from one power of two to the next: oneDNN
    compiles a kernel (1 ms, 0.7 MB) for each new row count, and routing brings new row counts in every step."""
    if on_gpu(x_NI) or x_NI.dtype != torch.bfloat16:
        return x_NI
    step = max(2 ** (len(x_NI).bit_length() - 3), 16)
    return F.pad(x_NI, (0, 0, 0, -len(x_NI) % step))


def has_grouped_kernel(x_NI: Tensor, w_GIO: Tensor) -> bool:
    """Whether torch multiplies a group in one kernel: bf16 on Hopper and data-center Blackwell, rows of whole 16 bytes.

    Elsewhere `F.grouped_mm` loops over the experts like `grouped_matmul`, but also waits for the device
    (https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/GroupedBlas.cpp).
    """
    fits = x_NI.dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and all(size % 8 == 0 for size in w_GIO.shape[1:])
    return fits and on_gpu(x_NI) and generation(x_NI) in (9, 10, None)  # None: in a plan for a GPU that is not named


# Adapters


class ProjectionAdapter(nn.Module):
    """Trained low-rank updates of one projection of all experts, in float32 and peft's layout; B starts at zero."""

    def __init__(self, a_XI: Tensor, num_out: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a_XI)
        self.lora_B = nn.Parameter(torch.zeros(num_out, a_XI.shape[0], device=a_XI.device))


class LoraExperts(ProjectionAdapter):
    """Routed experts, each with a trained low-rank update of either projection.

    Parameters have peft's names for `target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]`: A and B
    of down_proj belong to this module, A and B of gate_up_proj to its base_layer.

    Args:
        gate_up_a_XD, down_a_XI: initial values of A, the experts' rows one below the other: [E * R, ...].
    """

    def __init__(self, base: FrozenExperts, gate_up_a_XD: Tensor, down_a_XI: Tensor, scaling: float) -> None:
        super().__init__(down_a_XI, base.hidden)
        self.base, self.scaling = base, scaling
        self.base_layer = ProjectionAdapter(gate_up_a_XD, 2 * base.intermediate)
        self.enabled = True

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x_TD, index_TK, weight_TK)
        return ExpertsFunction.apply(
            x_TD, weight_TK, index_TK, self.base, self.scaling,
            self.base_layer.lora_A, self.base_layer.lora_B, self.lora_A, self.lora_B)
