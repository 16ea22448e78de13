"""Weights as decoding on a CPU wants them: dequantized once, in bf16 also in the order in which oneDNN multiplies.
Costs a copy of all linears in the compute dtype, if there is room for it; on a GPU nothing is kept."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import Tensor

from model.lora import LoraLinear
from model.quant import FrozenLinear, kept_dequantized
from model.stages import Stage

# O output features, I input features, K rank, B rows, X any leading dimensions

MEMINFO = Path("/proc/meminfo")
MOST_SHARE = 0.5  # of the machine's free memory that the copy may take


@contextmanager
def kept_for_decoding(stage: Stage) -> Iterator[None]:
    """While the context lasts, linears on a CPU multiply by copies of their weights, where these fit into memory.

    A step multiplies few rows by every weight. Dequantizing the weights, or bringing them into oneDNN's order, would then
    take as long as the matmuls themselves or longer. Adapters must not be trained or switched meanwhile.
    """
    model: Any = stage.model
    with ExitStack() as stack:
        if model.lm_head.weight.device.type == "cpu" and copy_bytes(model) <= MOST_SHARE * free_bytes():
            stack.enter_context(packed(model) if can_pack(model.lm_head.weight) else kept_dequantized(model))
        yield


def copy_bytes(model: Any) -> int:
    sizes = (m.in_features * m.out_features * m.dtype.itemsize for m in model.modules() if isinstance(m, FrozenLinear))
    return sum(sizes) + int(model.lm_head.weight.nbytes)


def free_bytes() -> int:
    """What Linux could give a process without swapping; elsewhere 0."""
    if not MEMINFO.exists():
        return 0
    words = MEMINFO.read_text().split()
    return 1024 * int(words[words.index("MemAvailable:") + 1])


def can_pack(weight: Tensor) -> bool:
    """Whether torch has oneDNN's bf16 matmul with a packed weight; its compiler uses the same functions."""
    operations = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return (weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, name) for name in operations)
            and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Shadows the forward pass of all adapted and frozen linears and of the head by one with packed weights."""
    inner = {id(module.base) for module in model.modules() if isinstance(module, LoraLinear)}
    linears = [m for m in model.modules() if isinstance(m, (LoraLinear, FrozenLinear)) and id(m) not in inner]
    for linear in linears:
        setattr(linear, "forward", with_adapter(linear) if isinstance(linear, LoraLinear) else alone(linear))
    setattr(model.lm_head, "forward", matmul(model.lm_head.weight, None))
    try:
        yield
    finally:
        for module in (*linears, model.lm_head):
            delattr(module, "forward")


def alone(linear: Any) -> Callable[[Tensor], Tensor]:
    return matmul(linear.dequantize(), linear.bias)


def with_adapter(linear: LoraLinear) -> Callable[[Tensor], Tensor]:
    base = alone(linear.base)
    if not linear.enabled:
        return base
    dtype = linear.base.dtype
    times_a = matmul(linear.lora_A.detach().to(dtype), None)
    b_OK = pack((linear.lora_B.detach() * linear.scaling).to(dtype))
    return lambda x_XI: torch.ops.mkldnn._linear_pointwise.binary(times_a(x_XI), base(x_XI), b_OK, None, "add")


def matmul(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed_OI = pack(weight_OI.detach())
    return lambda x_XI: torch.ops.mkldnn._linear_pointwise(x_XI, packed_OI, bias_O, "none", [], "")


def pack(weight_OI: Tensor) -> Tensor:
    packed_OI: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)
    return packed_OI
