"""Counts the work of torch's operators: floating-point operations, bytes read and written, kernels started, and what for.
Takes about 30 microseconds an operation while a counter is on, nothing otherwise; works on tensors without values too."""

from __future__ import annotations

import math
import sys
from functools import cache
from types import CodeType
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from loop.errors import ROOT
from loop.memory.ledger import ASK_DEVICE, READ_NUMBER, RUNS_BACKWARD, is_fake
from model.ops.work import DECLARED, Work

PURPOSES = ("base matmul", "LoRA", "attention", "delta rule", "experts", "dequantize", "elementwise", "loss", "optimizer")
# where an operation runs says what it is for: the first of these that the path of the innermost file of the project contains
PLACES = {"model/ops/loss": "loss", "delta": "delta rule", "model/moe/": "experts",
          "model/mixers": "attention", "model/ops/cpu_attention": "attention"}
DEQUANTIZE = ("dequantize", "plain_nf4", "plain_blockwise")  # what functions that do so begin with

NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "_local_scalar_dense")  # neither reads nor writes
OVERWRITES = ("copy_", "fill_", "zero_", "uniform_", "normal_")  # write their first argument without reading it
GATHERS = ("index", "index_select", "gather", "embedding")  # read as much of their first argument as they return
SCATTERS = ("index_add_", "index_put_", "index_copy_", "scatter_add_", "scatter_")  # change as much of it as they are given


ACTIVE: list[Counter] = []  # the counters that are on


class Operation(NamedTuple):
    """One call of an operator."""

    purpose: str
    name: str  # such as aten::mm
    dtype: torch.dtype  # of its first tensor
    work: Work
    seconds: float  # 0 unless the counter has a clock


class Counter(TorchDispatchMode):
    """Lists what torch's operators do in its `with` block, on any device, real or fake. Views do nothing.

    Args:
        ranks: of the adapters; by these a matmul is known as LoRA's, also of two or three adapters of one input side by side.
        lengths: of the segments of a packed stream; attention takes all of them in one call.
        clock: gives the time when the device has done what it was given; then each operation is timed.
    """

    def __init__(
        self, ranks: Iterable[int] = (), lengths: Sequence[int] = (), clock: Callable[[], float] | None = None
    ) -> None:
        super().__init__()
        self.ranks = {number * rank for rank in ranks for number in (1, 2, 3)} - {sum(lengths)}
        self.clock = clock
        self.pairs = sum(length * (length + 1) / 2 for length in lengths)  # of a position and one that it attends to
        self.operations: list[Operation] = []
        self.only = ""  # what everything is for, where this is set
        self.forward_purposes: dict[int, str] = {}  # by sequence number of the node of autograd

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASK_DEVICE:
            return args[0].fake_device
        if func is READ_NUMBER and is_fake(args[0]):
            return 1.0 if args[0].is_floating_point() else 1  # as the ledger does
        started = self.clock() if self.clock else 0.0
        out = func(*args, **(kwargs or {}))
        seconds = self.clock() - started if self.clock else 0.0
        place = self.only or self.place()
        name = func._schema.name
        if (found := self.work(func, name, place, args, kwargs or {}, out)) is not None:
            self.operations.append(Operation(found[0], name, next(flat((args, out))).dtype, found[1], seconds))
        return out

    def __enter__(self) -> Any:
        ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        ACTIVE.remove(self)
        super().__exit__(*error)

    def work(
        self, func: Any, full_name: str, place: str, args: Any, kwargs: dict[str, Any], out: Any
    ) -> tuple[str, Work] | None:
        """What the operation is for, and its work; None if it does nothing but look at memory in another way."""
        name, results = full_name.partition("::")[2], list(flat(out))
        inputs = [*flat(args), *flat(tuple(kwargs.values()))]
        if full_name in DECLARED:
            purpose, declaration = DECLARED[full_name]
            assert purpose in PURPOSES, f"{full_name} declares {purpose}"
            return self.only or purpose, declaration(args, results)
        if name in NOTHING or not (inputs or results) or any(x.is_meta for x in results):
            return None
        storages = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in results if x.untyped_storage()._cdata not in storages]
        if not fresh and not func._schema.is_mutable:
            return None
        num_bytes = moved(func, name, args, kwargs, fresh)
        if "attention" in name or "attn" in name:
            return "attention", Work(self.attention_flops(name, args), num_bytes)
        flops = matmul_flops(func, name, args, kwargs, out)
        if full_name.startswith("bitsandbytes::dequantize"):
            place = "dequantize"
        elif flops and place in ("", "LoRA", "elementwise"):
            a, b = ([x for x in inputs if x.dim() >= 2] + [results[0]])[-2:]
            place = "LoRA" if self.ranks & {*a.shape, *b.shape} else "base matmul"
        return place, Work(flops, num_bytes)

    def attention_flops(self, name: str, args: Any) -> float:
        """Scores and their product with the values, in the backward pass once more and their gradients: 2 and 5 matmuls."""
        tensors = list(flat(args))
        is_backward = "backward" in name
        q = tensors[1 if is_backward else 0]
        if q.dim() == 3:  # a stream [T, H, E]; else a batch of rows of one length [B, H, T, E]
            pairs, heads = self.pairs, q.shape[1]
        else:
            pairs, heads = q.shape[2] * (q.shape[2] + 1) / 2, q.shape[0] * q.shape[1]
        return (5 if is_backward else 2) * 2 * pairs * heads * q.shape[-1]

    def place(self) -> str:
        """What the running line is for. A backward function of torch is for what its forward function was for."""
        node, found = torch._C._current_autograd_node(), place_above()
        sequence: int = torch._C._autograd._get_sequence_nr()
        if node is None:
            self.forward_purposes[sequence - 1] = found or "elementwise"
        elif not found:
            is_parameter = node.name().endswith("AccumulateGrad")  # adds to the gradient of an adapter
            return "LoRA" if is_parameter else self.forward_purposes.get(node._sequence_nr(), "elementwise")
        return found or "elementwise"


def note(purpose: str, name: str, dtype: torch.dtype, work: Work) -> None:
    """Tells the counters that are on of work that no operator shows."""
    for counter in ACTIVE:
        counter.operations.append(Operation(purpose, name, dtype, work, 0.0))


def place_above() -> str:
    """What the innermost line of the project that is being run is for; "" if none is, below the call of a backward pass."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != RUNS_BACKWARD:
        if found := place_of(frame.f_code):
            return found
        frame = frame.f_back
    return ""


@cache
def place_of(code: CodeType) -> str:
    path = code.co_filename
    if path == __file__ or "site-packages" in path or not path.startswith(f"{ROOT}/model"):
        return ""
    if code.co_name.startswith(DEQUANTIZE):
        return "dequantize"
    return next((purpose for part, purpose in PLACES.items() if part in path.removeprefix(str(ROOT))), "elementwise")


def flat(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, in lists too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from flat(value)


def held(tensor: Tensor) -> int:
    """The bytes that reading a tensor takes from memory: what is broadcast is read once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride()) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def moved(func: Any, name: str, args: Any, kwargs: dict[str, Any], fresh: list[Tensor]) -> float:
    """Bytes read and written by an operator of torch."""
    written = sum(map(held, fresh))
    if name in GATHERS:
        return 2 * written + sum(map(held, flat(args[1:])))
    if name in SCATTERS:
        *_, given = flat(args)
        return held(given) * (3 if name in ("index_add_", "scatter_add_") else 2)
    num_bytes = written
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_read = not (is_written and (argument.is_out or name in OVERWRITES))
        num_bytes += (is_written + is_read) * sum(map(held, flat(value)))
    return num_bytes


def matmul_flops(func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> float:
    """Of matmuls and convolutions, by torch's own formulas; 0 for other operators."""
    if name == "_grouped_mm":
        x, w = args[:2]
        return 2.0 * x.numel() * w.shape[-1]
    formula = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))
    return float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
