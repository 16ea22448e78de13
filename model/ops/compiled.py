"""Turns a plain function into one operator of torch whose inside is compiled, so that it passes over memory once.
Costs about a second for each function at a machine's first start and 0.1 s later, 7 microseconds a call, and no memory but
the results. Every function stays callable as it is written, and is the reference for what is compiled (`plain`)."""

from __future__ import annotations

import time
from typing import Any, Callable

import torch
from torch import Tensor, library

from model.devices import OFF, ON, on_gpu
from model.ops.work import Work, declare, once

# T tokens, or any other number of rows: the first dimension of every tensor with two or more. All other sizes, dtypes and
# plain arguments are part of the compiled code; no length of the stream compiles anything again.

LIBRARY = library.Library("coach", "FRAGMENT")
TYPICAL_T, TYPICAL_S = 4096, 512  # what code is made for; always the same, so that two runs have the same code
MOST_NUMBERS = 2**31 - 1  # that 32 bits index
OPTIONS = {  # of inductor
    "compile_threads": 1,  # no processes beside this one, which ends by signals
    "cpp.vec_isa_ok": True,  # else each process tries for 3 s which vector instructions the CPU has, though the CPU says so
    "use_joint_graph_passes": False,  # prepares to find attention, which none of these functions has
    "triton.autotune_pointwise": False,  # a choice by the clock differs from run to run, and takes time at the start
}


class Compiled:
    """A plain function of tensors and plain values, and an operator `coach::<its name>` that computes the same.

    The fast path "compiled" takes the operator, on a GPU always and on a CPU where a run asks for it (`devices.ON`). To
    whatever counts torch's operations (a ledger, a plan) it is one operation that makes its results. torch.compile would be
    switched off by a counter (torch 2.13: one call under a TorchDispatchMode does that for the whole process, silently), fails
    on fake tensors, and checks 15 microseconds long whether its code still fits. So the function is traced by hand and given to
    torch.compile's own compiler, inductor.
    """

    def __init__(self, plain: Callable[..., Any], category: str, launches: int, read_twice: int, columns_vary: bool) -> None:
        self.plain, self.name, self.columns_vary = plain, plain.__name__, columns_vary
        self.code: dict[Any, Callable[..., Any]] = {}  # by dtypes, sizes and plain values
        self.seconds = 0.0  # that compiling took, or reading what a former process had compiled
        LIBRARY.define(self.name + library.infer_schema(plain, mutates_args=()))
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        library.register_fake(f"coach::{self.name}", plain, lib=LIBRARY)
        declare(f"coach::{self.name}", category, lambda arguments, results: Work(
            num_bytes=once([*arguments, *arguments[:read_twice]], results).num_bytes, launches=launches))
        self.operator = getattr(torch.ops.coach, self.name).default

    def __call__(self, *arguments: Any) -> Any:
        return (self.operator if takes_code(arguments[0]) else self.plain)(*arguments)

    def run(self, *arguments: Any) -> Any:
        """What the operator does on tensors with values."""
        key, tensors = [], []
        for x in arguments:
            if isinstance(x, Tensor):
                x, strides = laid_out(x)
                tensors.append(x)
                key += [x.dtype, x.is_cuda, x.shape[x.dim() > 1:] if not self.columns_vary else x.shape[1] == 1, strides]
            else:
                key.append(x)
        code = self.code.get(tuple(key))
        if code is None:
            began = time.perf_counter()
            code = self.code[tuple(key)] = compile_for(self.plain, arguments, tensors, self.columns_vary)
            self.seconds += time.perf_counter() - began
        return code(*tensors)


ALL: list[Compiled] = []


def compiled(
    category: str = "elementwise", launches: int = 1, read_twice: int = 0, columns_vary: bool = False
) -> Callable[[Callable[..., Any]], Compiled]:
    """Decorates a plain function whose first argument is a tensor and whose results share no memory with its arguments.

    What it declares to a plan: `category`, the kernels that inductor makes of it on a GPU, and how many of its first arguments
    these read twice. Where `columns_vary` all tensors are whole matrices with the same number of columns, or one, and no number
    of columns compiles anything again either.
    """
    def decorate(plain: Callable[..., Any]) -> Compiled:
        ALL.append(Compiled(plain, category, launches, read_twice, columns_vary))
        return ALL[-1]
    return decorate


def takes_code(x: Tensor) -> bool:
    """Whether compiled code is taken. A single row would be a case of its own."""
    return ("compiled" not in OFF and (on_gpu(x) or "compiled" in ON)
            and x.dim() > 1 and len(x) > 1 and x.numel() <= MOST_NUMBERS)


def laid_out(x: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """The tensor, and its strides if it is part of a wider one; a copy if the strides would change with the number of rows."""
    if x.is_contiguous():
        return x, None
    if x.dim() > 1 and x.stride(-1) == 1 and x.stride(0) >= max(x.shape[i] * x.stride(i) for i in range(1, x.dim())):
        return x, x.stride()
    return x.contiguous(), None


def compile_for(
    plain: Callable[..., Any], arguments: tuple[Any, ...], tensors: list[Tensor], columns_vary: bool
) -> Callable[..., Any]:
    """Code for arguments like these and any number of rows, which takes the tensors alone. Inductor keeps it for later
    processes (TORCHINDUCTOR_CACHE_DIR)."""
    import torch._inductor
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    shapes = ShapeEnv()

    def varying(name: str, typical: int) -> Any:
        source = ConstantSource(name)
        symbol = shapes.create_symbol(typical, source, dynamic_dim=DimDynamic.DYNAMIC)
        return shapes.create_symintnode(symbol, hint=typical, source=source)

    num_rows, num_columns = varying("T", TYPICAL_T), varying("S", TYPICAL_S) if columns_vary else None

    def like(x: Tensor) -> Tensor:
        size = (num_rows, *x.shape[1:]) if x.dim() > 1 else x.shape
        if num_columns is not None and x.shape[1] > 1:
            size = (num_rows, num_columns)
        if x.is_contiguous():
            return torch.empty(size, dtype=x.dtype, device=x.device)
        return torch.empty_strided(size, x.stride(), dtype=x.dtype, device=x.device)

    def of_tensors(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        return plain(*(next(rest) if isinstance(x, Tensor) else x for x in arguments))

    fake_mode = FakeTensorMode(shape_env=shapes)
    with torch.inference_mode(False), torch.no_grad(), torch._inductor.config.patch(OPTIONS):
        with fake_mode:
            fakes = [like(x) for x in tensors]
        traced = make_fx(of_tensors, tracing_mode="symbolic")(*fakes)
        with tracing(TracingContext(fake_mode)):
            return torch._inductor.compile(traced, fakes)
