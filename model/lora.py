"""LoRA on frozen linears (Hu et al. 2021, arXiv:2106.09685), computed by model/matmul.py, in peft's file format.
Costs 4 bytes a trained parameter."""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from model.architectures import LINEARS
from model.config import ALL, LoraConfig
from model.matmul import Part, multiply
from model.moe.experts import FrozenExperts, LoraExperts
from model.quant import FrozenLinear

# O output features, I input features, K rank, X any leading dimensions


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

    @property
    def drops_out(self) -> bool:
        return self.enabled and self.training and self.dropout > 0

    def part(self) -> tuple[Part, tuple[Tensor, ...]]:
        """For `multiply`: what this linear computes, and its A and B unless the adapter is switched off."""
        if not self.enabled:
            return self.base.part()
        return Part(self.base, len(self.lora_A), self.scaling), (self.lora_A, self.lora_B)

    def forward(self, x_XI: Tensor) -> Tensor:
        keep_XI = torch.rand(x_XI.shape, device=x_XI.device) >= self.dropout if self.drops_out else None
        return multiply(x_XI, [self], keep_XI, self.dropout)[0]


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
        if ALL in config.target or last in config.target:
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


def peft_config(config: LoraConfig, base_model: str, model_type: str) -> dict[str, Any]:
    """The content of adapter_config.json, from which `PeftModel.from_pretrained` knows how to load the adapter.

    Args:
        model_type: of the text model.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.adapted(LINEARS[model_type]),
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
