"""One decoder layer of each kind, forward and backward, on the real device: the memory that it takes against the plan's.
Takes what the largest layer takes, and its experts' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from loop.check.findings import Finding, in_gib
from loop.config import Config
from loop.memory.ledger import Ledger
from loop.memory.phases import CUDA_BLOCK
from loop.memory.without_values import put_nothing, without_values
from loop.rates import put_some
from model.build import build_empty, text_config
from model.mixers import Segments
from model.moe import routing

LIMIT = 0.05  # of the planned bytes
CPU_TOKENS = 16


def layers(config: Config, model_dir: Path, device: torch.device) -> list[Finding]:
    """A line for a layer of each kind, but not for the model's first layer, which comes with the embedding."""
    model = text_config(model_dir)
    kinds = getattr(model, "layer_types", None) or ["full_attention"] * model.num_hidden_layers
    tokens = config.train.microbatch_tokens if device.type == "cuda" else min(config.train.microbatch_tokens, CPU_TOKENS)
    found = []
    for kind in dict.fromkeys(kinds):
        number = kinds.index(kind, 1) if kind in kinds[1:] else 0
        planned = planned_bytes(config, model_dir, number, tokens, device.type)
        taken = measured_bytes(config, model_dir, number, tokens, device)
        off = taken / planned - 1
        found.append(Finding(
            "memory", f"layer {number}, {kind.replace('_', ' ')}",
            f"{in_gib(taken)} at {tokens:,} tokens, planned {in_gib(planned)} ({off:+.1%})",
            "" if off <= LIMIT else "more than planned: set train.microbatch_tokens lower than `loop.plan --fit` says",
            {"tokens": tokens, "planned_bytes": planned, "bytes": taken}))
    return found


def step(config: Config, model_dir: Path, number: int, tokens: int, device: torch.device, put: Any) -> None:
    """Builds a layer alone, and computes it forward and backward on rows that fill the microbatch."""
    torch.manual_seed(0)  # the same routing each time
    stage, weights = build_empty(model_dir, config.model.base, config.lora, seed=0, device=device, recompute=False,
                                 first=2 * number, stop=2 * number + 2)
    put(weights)
    lengths = (tokens // 2, tokens - tokens // 2)
    segments = Segments(torch.tensor([0, lengths[0], tokens], dtype=torch.int32, device=device), lengths)
    positions_T = torch.arange(tokens, device=device)
    if stage.is_first:
        x = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    else:
        x = torch.randn(1, tokens, stage.model.config.hidden_size, device=device).to(stage.model.config.dtype).requires_grad_()
    stage(x, positions_T, segments).sum().backward()


def planned_bytes(config: Config, model_dir: Path, number: int, tokens: int, device: str) -> int:
    """What the layer takes in a rehearsal with tensors that have no values."""
    ledger = Ledger(CUDA_BLOCK if device == "cuda" else 1, with_sites=False)
    with patch.object(routing, "ASSUMED", [routing.uniform_bounds]), without_values(device), ledger:
        step(config, model_dir, number, tokens, torch.device("cpu"), put_nothing)
    return ledger.peak


def measured_bytes(config: Config, model_dir: Path, number: int, tokens: int, device: torch.device) -> int:
    """What the layer takes on the device: by CUDA's allocator, on the CPU by a ledger of its tensors."""
    if device.type != "cuda":
        ledger = Ledger(with_sites=False)
        with ledger:
            step(config, model_dir, number, tokens, device, put_some)
        return ledger.peak
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)  # no run is going on whose peak could be meant
    step(config, model_dir, number, tokens, device, put_some)
    return torch.cuda.max_memory_allocated(device) - before
