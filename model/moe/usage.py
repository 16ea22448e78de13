"""How evenly the routed experts of each layer are used: counted on the device, read once a step.
Costs 8 bytes for each expert of each layer."""

from __future__ import annotations

import math
from typing import Any, Callable

import torch
from torch import Tensor, nn

from model.moe.experts import FrozenExperts

# L layers, E experts


def start_counting(model: Any) -> None:
    """Makes training count the tokens of each expert.

    Raises:
        ValueError: the model has no routed experts.
    """
    if not hasattr(model.config, "num_experts"):
        raise ValueError("train.router_stats is true, but the model has no routed experts")
    for experts in routed_layers(model).values():
        device = next(experts.buffers()).device
        experts.tokens_E = torch.zeros(experts.num_experts, dtype=torch.int64, device=device)


def load_balance(
    model: nn.Module, sum_replicas: Callable[[Tensor], Tensor],
    gather_stages: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> dict[str, dict[str, Any]]:
    """How evenly the experts were used since the last call: in all replicas and, on rank 0, all stages; waits for the device.

    Returns:
        By layer number: `share`, each expert's share of the tokens, and `entropy`, the entropy of the shares divided by
        its maximum log E: 1 if all experts get equally many tokens, 0 if one expert gets all.
    """
    layers = routed_layers(model)
    counted: dict[str, Tensor] = {}
    if layers:  # a stage may have no routed experts
        tokens_LE = torch.stack([experts.tokens_E for experts in layers.values() if experts.tokens_E is not None])
        for experts in layers.values():
            experts.tokens_E = torch.zeros_like(tokens_LE[0])
        counted = dict(zip(layers, sum_replicas(tokens_LE).cpu()))
    counted = gather_stages(counted)
    share_LE = torch.stack(list(counted.values())).double() if counted else torch.zeros(0, 2)
    share_LE /= share_LE.sum(dim=1, keepdim=True).clamp_min(1)
    entropy_L = torch.special.entr(share_LE).sum(dim=1) / math.log(share_LE.shape[1])
    return {name: {"entropy": round(entropy, 6), "share": [round(share, 6) for share in shares]}
            for name, entropy, shares in zip(counted, entropy_L.tolist(), share_LE.tolist())}


def routed_layers(model: nn.Module) -> dict[str, FrozenExperts]:
    """The routed experts by the number of their layer."""
    return {name.split(".layers.")[1].partition(".")[0]: module for name, module in model.named_modules()
            if isinstance(module, FrozenExperts)}
