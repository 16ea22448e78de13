"""LoRA on frozen linears (Hu et al. 2021, arXiv:2106.09685), forward and backward by hand, in peft's file format.
Keeps the layer's input and its product with A for the backward pass, both in the compute dtype."""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from model.config import LoraConfig
from model.devices import OFF, on_gpu
from model.moe.experts import FrozenExperts, LoraExperts
from model.quant import FrozenLinear

# O output features, I input features, K rank, T tokens, X any leading dimensions


class LoraLinear(nn.Module):
    """y = base(x) + alpha / rank * dropout(x) A^T B^T, with A and B in float32.

    A is initialized as in peft (Kaiming uniform), but from the seed and the layer's name alone, so that its values are
    the same on every rank and for every split of a pipeline. B is initialized with zeros.
    """

    def __init__(self, base: FrozenLinear, name: str, config: LoraConfig, seed: int, device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.scaling = config.alpha / config.rank
        self.dropout = config.dropout
        self.enabled = True
        self.lora_A = nn.Parameter(first_a(seed, name, config.rank, base.in_features).to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))

    def forward(self, x_XI: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x_XI)
        keep_XI = None
        if self.training and self.dropout:
            keep_XI = torch.rand(x_XI.shape, device=x_XI.device) >= self.dropout
        y_XO = LoraMatmul.apply(x_XI, self.lora_A, self.lora_B, self.base, self.scaling, keep_XI, self.dropout)
        return y_XO if self.base.bias is None else y_XO + self.base.bias


class LoraMatmul(torch.autograd.Function):
    """Base and adapter in one function: the adapter's output and input gradient are added to the base's in place.

    All matmuls run in x's dtype; the gradients of A and B are returned in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x_XI: Tensor, a_KI: Tensor, b_OK: Tensor, base: FrozenLinear,
        scaling: float, keep_XI: Tensor | None, dropout: float,
    ) -> Tensor:
        x_TI = x_XI.reshape(-1, x_XI.shape[-1])
        y_TO = x_TI @ base.dequantize().T
        h_TK = drop(x_TI, keep_XI, dropout) @ a_KI.to(x_TI.dtype).T
        y_TO.addmm_(h_TK, b_OK.to(x_TI.dtype).T, alpha=scaling)
        ctx.save_for_backward(x_TI, h_TK, a_KI, b_OK, keep_XI)
        ctx.base, ctx.scaling, ctx.dropout, ctx.shape = base, scaling, dropout, x_XI.shape
        return y_TO.view(*x_XI.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy_XO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, h_TK, a_KI, b_OK, keep_XI = ctx.saved_tensors
        dy_TO = dy_XO.reshape(-1, dy_XO.shape[-1])
        db_OK = product_in_float32(dy_TO.T, h_TK).mul_(ctx.scaling)
        dh_TK = (dy_TO @ b_OK.to(dy_TO.dtype)).mul_(ctx.scaling)
        da_KI = product_in_float32(dh_TK.T, drop(x_TI, keep_XI, ctx.dropout))
        dx_XI = None
        if ctx.needs_input_grad[0]:  # the first layer's input needs no gradient
            dx_TI = dy_TO @ ctx.base.dequantize()
            if keep_XI is None:
                dx_TI.addmm_(dh_TK, a_KI.to(dy_TO.dtype))
            else:
                dx_TI += drop(dh_TK @ a_KI.to(dy_TO.dtype), keep_XI, ctx.dropout)
            dx_XI = dx_TI.view(ctx.shape)
        return dx_XI, da_KI, db_OK, None, None, None, None


def product_in_float32(a_KT: Tensor, b_TI: Tensor) -> Tensor:
    """a @ b in float32. On a GPU the sum over all tokens is never rounded to half precision (the fast path "lora_gradients"),
    on the CPU once at its end."""
    if on_gpu(a_KT) and a_KT.dtype != torch.float32 and "lora_gradients" not in OFF:
        return torch.mm(a_KT, b_TI, out_dtype=torch.float32)
    return (a_KT @ b_TI).float()


def drop(x_TI: Tensor, keep_XI: Tensor | None, dropout: float) -> Tensor:
    """Dropout with a given mask; returns the input itself if the mask is None."""
    return x_TI if keep_XI is None else x_TI * keep_XI.view(x_TI.shape) / (1 - dropout)


def first_a(seed: int, name: str, rank: int, num_in: int) -> Tensor:
    """Initial values of an A, [K, I] in float32 on the CPU, from the seed and the layer's name alone."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
    bound = 1 / math.sqrt(num_in)
    return torch.empty(rank, num_in).uniform_(-bound, bound, generator=generator)


def add_adapters(model: nn.Module, config: LoraConfig, seed: int, device: torch.device) -> None:
    """Adds adapters to every `FrozenLinear` that is a target and, if `config.experts` is set, to all routed experts."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        if last in config.target:
            setattr(model.get_submodule(parent), last, LoraLinear(linear, name, config, seed, device))
    routed = {name: module for name, module in model.named_modules() if isinstance(module, FrozenExperts)}
    for name, experts in routed.items() if config.experts else ():
        parent, _, last = name.rpartition(".")
        num_rows = experts.num_experts * config.rank
        gate_up_a_XD = first_a(seed, f"{name}.gate_up_proj", num_rows, experts.hidden).to(device)
        down_a_XI = first_a(seed, f"{name}.down_proj", num_rows, experts.intermediate).to(device)
        setattr(model.get_submodule(parent), last,
                LoraExperts(experts, gate_up_a_XD, down_a_XI, config.alpha / config.rank))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapter parameters by global name, such as `model.layers.3.mlp.up_proj.lora_A`."""
    return {name: p for name, p in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}


PEFT_PREFIX, PEFT_SUFFIX = "base_model.model.", ".weight"


def to_peft_name(name: str) -> str:
    return f"{PEFT_PREFIX}{name}{PEFT_SUFFIX}"


def peft_config(config: LoraConfig, base_model: str) -> dict[str, Any]:
    """The content of adapter_config.json, from which `PeftModel.from_pretrained` knows how to load the adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.target),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # peft nests the adapters of both: those of gate_up_proj lie in the base_layer of those of down_proj
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if config.experts else None,
    }


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switches all adapters off while the context lasts: the model computes as it did before training."""
    adapted = [module for module in model.modules() if isinstance(module, (LoraLinear, LoraExperts))]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True
