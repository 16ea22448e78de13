"""Optimizer, learning rate, gradient all-reduce and global clipping, each one visible call.
Costs 8 bytes a trained parameter for AdamW, 2 for the 8-bit one, and one bucket while gradients travel."""

from __future__ import annotations

import math
from typing import Any, Iterable, Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from loop.ranks import Ranks

BUCKET_NUMEL = 16 * 2**20  # gradients travel in buckets of 64 MiB: few messages, little memory
BETAS, EPS = (0.9, 0.999), 1e-8


def make_optimizer(
    name: Literal["adamw", "adamw8bit"], parameters: Iterable[nn.Parameter], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or bitsandbytes' with 8-bit moments (Dettmers et al. 2022)."""
    group: list[dict[str, Any]] = [{"params": list(parameters)}]  # as a group it may be empty: a stage without adapters
    if name == "adamw8bit":
        return bnb.optim.AdamW8bit(group, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    return torch.optim.AdamW(group, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay)


def learning_rate(step: int, total: int, peak: float, warmup_fraction: float, schedule: str) -> float:
    """Rate of optimizer step `step` (from 1): linear warmup, then a cosine towards zero, or constant."""
    warmup = math.ceil(total * warmup_fraction)
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1, total - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def sync_and_clip(parameters: Iterable[nn.Parameter], max_norm: float, ranks: Ranks) -> Tensor:
    """Sums gradients over replicas, stage by stage, and scales them to a norm over all stages of at most `max_norm`.

    Returns:
        The norm before clipping; not finite on every rank if it is on one.
    """
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:  # no microbatch of this step fell to this rank
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if ranks.num_replicas > 1:
        for bucket in buckets(gradients):
            flat = ranks.sum_replicas(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
                gradient.copy_(summed.view_as(gradient))
    norms_P = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(0, device=ranks.device)
    # the norm of all parameters' norms, so that its bits do not depend on the split
    norm = torch.linalg.vector_norm(ranks.concatenate_stages(norms_P))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """Consecutive tensors of at most BUCKET_NUMEL elements together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_NUMEL:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state by global parameter name: `NAME/exp_avg`, `NAME/step`, ... Numbers become tensors."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Puts `optimizer_tensors` back; states of parameters that other ranks hold are passed over.

    Raises:
        ValueError: the states are another optimizer's.
    """
    is_8bit = isinstance(optimizer, bnb.optim.AdamW8bit)
    if tensors and is_8bit == any(key.endswith("/exp_avg") for key in tensors):
        raise ValueError("the checkpoint was written by another optimizer: set train.optimizer as it was, or resume=never")
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        if name not in parameters:
            continue
        parameter = parameters[name]
        if part == "step":  # a plain number for bitsandbytes, a tensor on the CPU for torch
            optimizer.state[parameter][part] = int(value) if is_8bit else value.cpu()
        else:
            optimizer.state[parameter][part] = value.to(parameter.device, copy=True)
