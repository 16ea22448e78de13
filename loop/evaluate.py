"""Computes the mean loss a supervised token on the held-out rows, over all and over each source.
Costs one forward pass of the rows, and no activations of a backward pass."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from data.batches import Batches, StepBatch
from loop.distributed.groups import Ranks
from loop.memory.phases import Memory


def evaluate(
    batches: Batches, max_rows: int | None, forward_only: Callable[[StepBatch], list[Tensor]], ranks: Ranks, memory: Memory
) -> tuple[float, dict[str, float]]:
    """Returns the mean loss over all supervised tokens, and over those of each source; the same on every rank."""
    sources = batches.rows.sources
    total_S2 = torch.zeros(len(sources), 2, dtype=torch.float64)  # sum of losses, number of tokens
    num_rows = min(batches.num_rows, max_rows or batches.num_rows)
    with (memory.during("eval"),
          tqdm(total=num_rows, desc="eval", unit="row", leave=False, disable=None if ranks.is_main else True) as bar):
        for batch in batches.eval_steps(max_rows):
            memory.batch = batch
            for microbatch, losses_N in zip(batch.microbatches, forward_only(batch)):
                weighted_N2 = torch.stack([losses_N.double().cpu(), torch.ones(len(losses_N), dtype=torch.float64)], dim=1)
                total_S2.index_add_(0, microbatch.sources_N, weighted_N2)
            bar.update(batch.num_rows)
        memory.batch = None
        total_S2 = ranks.all_reduce(total_S2.to(ranks.device)).cpu()
    by_source = {source: (sums / count).item() for source, (sums, count) in zip(sources, total_S2) if count}
    return (total_S2[:, 0].sum() / total_S2[:, 1].sum()).item(), by_source
