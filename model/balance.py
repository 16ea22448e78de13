"""How evenly the routed experts of each layer are used: counted on the device, read once a step.
Costs 8 bytes an expert and layer."""

from __future__ import annotations

import math
from typing import Any, Callable

import torch
from torch import Tensor, nn

from model.experts import FrozenExperts

# L layers, E experts


def start_counting(model: nn.Module) -> None:
    """From now on every training pass counts the tokens of each expert (a recomputed one twice, in all layers alike).

    Raises:
        ValueError: the model has no routed experts.
    """
    layers = routed_layers(model)
    if not layers:
        raise ValueError("train.router_stats is true, but the model has no routed experts")
    for experts in layers.values():
        device = next(experts.buffers()).device
        experts.tokens_E = torch.zeros(experts.num_experts, dtype=torch.int64, device=device)


def load_balance(model: nn.Module, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, dict[str, Any]]:
    """What was counted since the last call, over all ranks; waits for the device.

    Returns:
        By layer number: `share`, each expert's share of the tokens, and `entropy`, that of the shares over its maximum
        log E: 1 where all experts get as much, 0 where one gets everything.
    """
    layers = routed_layers(model)
    tokens_LE = torch.stack([experts.tokens_E for experts in layers.values() if experts.tokens_E is not None])
    for experts in layers.values():
        experts.tokens_E = torch.zeros_like(tokens_LE[0])
    share_LE = all_reduce(tokens_LE.double()).cpu()
    share_LE /= share_LE.sum(dim=1, keepdim=True).clamp_min(1)
    entropy_L = torch.special.entr(share_LE).sum(dim=1) / math.log(share_LE.shape[1])
    return {name: {"entropy": round(entropy, 6), "share": [round(share, 6) for share in shares]}
            for name, entropy, shares in zip(layers, entropy_L.tolist(), share_LE.tolist())}


def routed_layers(model: nn.Module) -> dict[str, FrozenExperts]:
    """The routed experts by the number of their layer."""
    return {name.split(".layers.")[1].partition(".")[0]: module for name, module in model.named_modules()
            if isinstance(module, FrozenExperts)}
