"""The products of frozen linears and their adapters: one function of autograd, forward and backward by hand.
Keeps for the backward pass, if there is an adapter, the input and its product with A, both in the compute dtype."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from model.devices import OFF, on_gpu

# O output features, I input features, K rank or the ranks of several linears side by side, T tokens, X any leading dimensions

UNREAD: set[nn.Module] = set()  # frozen linears and experts whose outputs nobody reads, while a layer is recomputed


class Part(NamedTuple):
    """What one linear computes: x W^T and, if it has an adapter, + scaling * x A^T B^T."""

    base: Any  # the FrozenLinear (model/quant.py) that holds W
    rank: int = 0  # 0 without an adapter
    scaling: float = 0.0


def project(x_XI: Tensor, *linears: Any) -> Sequence[Tensor]:
    """The outputs of linears that read the same input, computed together.

    Each computes alone if one of them drops out, since each has its own mask, and where no gradient is needed, since decoding
    puts another forward pass in its place.
    """
    is_joint = torch.is_grad_enabled() and all(hasattr(linear, "part") and not linear.drops_out for linear in linears)
    return multiply(x_XI, linears) if is_joint else [linear(x_XI) for linear in linears]


def multiply(x_XI: Tensor, linears: Sequence[Any], keep_XI: Tensor | None = None, dropout: float = 0.0) -> tuple[Tensor, ...]:
    """As `project`, in one function of autograd.

    Args:
        keep_XI: where the adapters see the input, if they drop out.
    """
    parts, adapters = zip(*(linear.part() for linear in linears))
    outputs: tuple[Tensor, ...] = JointMatmul.apply(x_XI, parts, keep_XI, dropout, *sum(adapters, ()))
    return outputs


class JointMatmul(torch.autograd.Function):
    """One product with each weight, which is dequantized for it and freed, and one with the A's of all adapters side by side.

    What an adapter computes is added in place to what its base computed, and so are the gradients of the input to each other.
    All matmuls run in x's dtype; the gradients of A and B are returned in float32. `adapters` are A, B of each adapted linear.
    """

    @staticmethod
    def forward(
        ctx: Any, x_XI: Tensor, parts: tuple[Part, ...], keep_XI: Tensor | None, dropout: float, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        x_TI = x_XI.reshape(-1, x_XI.shape[-1])
        y_TO = [base_product(x_TI, part) for part in parts]
        if adapters:
            h_TK = drop(x_TI, keep_XI, dropout) @ side_by_side(adapters, x_TI.dtype).T
            add_adapters_products(y_TO, h_TK, parts, adapters)
            ctx.save_for_backward(x_TI, h_TK, keep_XI, *adapters)
        ctx.parts, ctx.dropout, ctx.shape = parts, dropout, x_XI.shape
        y_XO = tuple(y.view(*x_XI.shape[:-1], y.shape[1]) for y in y_TO)
        if not ctx.needs_input_grad[0]:  # in the first layer no gradient must reach a linear without an adapter
            ctx.mark_non_differentiable(*(y for y, part in zip(y_XO, parts) if not part.rank))
        return y_XO

    @staticmethod
    def backward(ctx: Any, *dy_XO: Tensor) -> tuple[Tensor | None, ...]:
        kept: Any = ctx.saved_tensors or (None, None, None)  # nothing without an adapter
        x_TI, h_TK, keep_XI, *adapters = kept
        dy_TO = [dy.reshape(-1, dy.shape[-1]) for dy in dy_XO]
        gradients: Sequence[Tensor] = ()
        if adapters:
            dh_TK = hidden_gradient(dy_TO, h_TK, ctx.parts, adapters)
            gradients = adapter_gradients(dy_TO, h_TK, dh_TK, drop(x_TI, keep_XI, ctx.dropout), ctx.parts)
        dx_XI = None
        if ctx.needs_input_grad[0]:  # the first layer's input needs no gradient
            dx_TI = base_gradient(dy_TO, ctx.parts)
            if adapters and keep_XI is None:
                dx_TI.addmm_(dh_TK, side_by_side(adapters, dx_TI.dtype))
            elif adapters:
                dx_TI += drop(dh_TK @ side_by_side(adapters, dx_TI.dtype), keep_XI, ctx.dropout)
            dx_XI = dx_TI.view(ctx.shape)
        return dx_XI, None, None, None, *gradients


def base_product(x_TI: Tensor, part: Part) -> Tensor:
    """x W^T, and the bias if there is one."""
    if part.base in UNREAD:
        return not_computed(x_TI, len(x_TI), part.base.out_features)
    y_TO = x_TI @ part.base.dequantize().T
    return y_TO if part.base.bias is None else y_TO.add_(part.base.bias)


def base_gradient(dy_TO: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """The gradient of the input of all weights."""
    dx_TI = dy_TO[0] @ parts[0].base.dequantize()
    for dy, part in zip(dy_TO[1:], parts[1:]):
        dx_TI.addmm_(dy, part.base.dequantize())
    return dx_TI


def add_adapters_products(y_TO: Sequence[Tensor], h_TK: Tensor, parts: Sequence[Part], adapters: Sequence[Tensor]) -> None:
    """Adds to each adapted linear's output its columns of h = x A^T, times B^T."""
    columns = h_TK.split([part.rank for part in parts if part.rank], dim=1)
    for (y, part), h, b_OK in zip(adapted(y_TO, parts), columns, adapters[1::2]):
        if part.base not in UNREAD:
            y.addmm_(h, b_OK.to(y.dtype).T, alpha=part.scaling)


def hidden_gradient(dy_TO: Sequence[Tensor], h_TK: Tensor, parts: Sequence[Part], adapters: Sequence[Tensor]) -> Tensor:
    """The gradient of h = x A^T, the columns of all adapters side by side."""
    dh_TK = torch.empty_like(h_TK)
    columns = dh_TK.split([part.rank for part in parts if part.rank], dim=1)
    for (dy, part), dh, b_OK in zip(adapted(dy_TO, parts), columns, adapters[1::2]):
        dh.addmm_(dy, b_OK.to(dy.dtype), beta=0, alpha=part.scaling)
    return dh_TK


def adapter_gradients(
    dy_TO: Sequence[Tensor], h_TK: Tensor, dh_TK: Tensor, x_TI: Tensor, parts: Sequence[Part]
) -> list[Tensor]:
    """The gradients of A and B of each adapted linear."""
    ranks = [part.rank for part in parts if part.rank]
    da_KI = product_in_float32(dh_TK.T, x_TI).split(ranks)
    db_OK = [product_in_float32(dy.T, h).mul_(part.scaling)
             for (dy, part), h in zip(adapted(dy_TO, parts), h_TK.split(ranks, dim=1))]
    return [gradient for pair in zip(da_KI, db_OK) for gradient in pair]


def adapted(tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[tuple[Tensor, Part]]:
    return [(tensor, part) for tensor, part in zip(tensors, parts) if part.rank]


def side_by_side(adapters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A's of all adapters in `dtype`, one below the other: [K, I]."""
    return torch.cat([a_KI.to(dtype) for a_KI in adapters[::2]]) if len(adapters) > 2 else adapters[0].to(dtype)


def product_in_float32(a_KT: Tensor, b_TI: Tensor) -> Tensor:
    """a @ b in float32. On a GPU the sum over all tokens is never rounded to half precision (the fast path "lora_gradients"),
    on the CPU once at its end."""
    if on_gpu(a_KT) and a_KT.dtype != torch.float32 and "lora_gradients" not in OFF:
        return torch.mm(a_KT, b_TI, out_dtype=torch.float32)
    return (a_KT @ b_TI).float()


def drop(x_TI: Tensor, keep_XI: Tensor | None, dropout: float) -> Tensor:
    """Dropout with a given mask; returns the input itself if the mask is None."""
    return x_TI if keep_XI is None else x_TI * keep_XI.view(x_TI.shape) / (1 - dropout)


@contextmanager
def unread(module: nn.Module) -> Iterator[None]:
    """While the context lasts, nobody reads the output of a frozen linear or of routed experts: they, and their adapters,
    compute only what they keep for the backward pass. Right only for an output that goes straight into an addition: most other
    operations keep what they are given."""
    UNREAD.add(module)
    try:
        yield
    finally:
        UNREAD.discard(module)


def not_computed(like: Tensor, *shape: int) -> Tensor:
    """Stands for an output that nobody reads; takes the memory of one number."""
    return like.new_empty(()).expand(shape)
