"""Optimizer, learning rate, and the sum and clipping of gradients over all ranks.
Costs 8 bytes a trained parameter for AdamW, 2 for AdamW in 8 bits, and one bucket while gradients are summed."""

from __future__ import annotations

import math
from typing import Any, Iterable, Literal

import torch
from torch import Tensor, nn

from loop.distributed.groups import Ranks
from model.devices import OFF

BUCKET_NUMEL = 16 * 2**20  # gradients are summed in buckets of 64 MiB: few messages, little memory
BETAS, EPS = (0.9, 0.999), 1e-8


def make_optimizer(
    name: Literal["adamw", "adamw8bit"], parameters: Iterable[nn.Parameter], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or AdamW of bitsandbytes with 8-bit moments (Dettmers et al. 2022)."""
    group: list[dict[str, Any]] = [{"params": list(parameters)}]  # torch refuses an empty list, but not an empty group
    kind: Any = torch.optim.AdamW
    if name == "adamw8bit" and name not in OFF:
        import bitsandbytes  # takes 0.5 s, which other runs are spared

        kind = bitsandbytes.optim.AdamW8bit
    return kind(group, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay)


def learning_rate(step: int, total: int, peak: float, warmup_fraction: float, schedule: str) -> float:
    """The learning rate of optimizer step `step`, from 1: linear warmup, then a cosine towards zero, or constant."""
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
    """Sums each stage's gradients over the replicas, and scales them so that the norm over all stages is at most `max_norm`.

    Returns:
        The norm before clipping; not finite on every rank if a gradient of any rank is not finite.
    """
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:  # this rank has no microbatch in this step
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if ranks.num_replicas > 1:
        for bucket in buckets(gradients):
            flat = ranks.sum_replicas(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
                gradient.copy_(summed.view_as(gradient))
    norms_P = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(0, device=ranks.device)
    # the norm of the parameters' norms: its bits do not depend on where the model is split
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


def named_states(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's states by global parameter name: `NAME/exp_avg`, `NAME/step`, ... Numbers become tensors."""
    return {f"{name}/{key}": torch.as_tensor(value).detach()
            for name, parameter in parameters.items() for key, value in optimizer.state[parameter].items()}


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Restores what `named_states` returned; ignores the states of parameters that other ranks hold.

    Raises:
        ValueError: the states were written by another optimizer.
    """
    is_8bit = not isinstance(optimizer, torch.optim.AdamW)
    if tensors and is_8bit == any(key.endswith("/exp_avg") for key in tensors):
        raise ValueError("the checkpoint was written by another optimizer: set train.optimizer as it was, or resume=never")
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        if name in parameters:
            # bitsandbytes keeps `step` as a plain number, torch as a tensor on the CPU
            as_step = int if is_8bit else Tensor.cpu
            optimizer.state[parameters[name]][kind] = (
                as_step(value) if kind == "step" else value.to(parameters[name].device, copy=True))
