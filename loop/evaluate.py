"""Token-weighted loss on the held-out rows, overall and per source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from data.batches import Batches, StepBatch
from loop.ranks import Ranks


@dataclass(frozen=True)
class EvalConfig:
    """When and on how much the held-out loss is taken: at step 0, every `every` steps, at checkpoints and at the end."""

    every: int = 200  # optimizer steps
    max_rows: int | None = None  # the first so many rows; null: all

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"eval.every is {self.every}, expected at least 1 step")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"eval.max_rows is {self.max_rows}, expected at least 1 row, or null for all")


def evaluate(
    batches: Batches, max_rows: int | None, forward_only: Callable[[StepBatch], list[Tensor]], ranks: Ranks
) -> tuple[float, dict[str, float]]:
    """Mean loss of a supervised token: over all of them, and over each source's. The same numbers on every rank."""
    sources = batches.rows.sources
    total_S2 = torch.zeros(len(sources), 2, dtype=torch.float64)  # sum of losses, number of tokens
    num_rows = min(batches.num_rows, max_rows or batches.num_rows)
    with tqdm(total=num_rows, desc="eval", unit="row", leave=False, disable=None if ranks.is_main else True) as bar:
        for batch in batches.eval_steps(max_rows):
            for microbatch, losses_N in zip(batch.microbatches, forward_only(batch)):
                weighted_N2 = torch.stack([losses_N.double().cpu(), torch.ones(len(losses_N), dtype=torch.float64)], dim=1)
                total_S2.index_add_(0, microbatch.sources_N, weighted_N2)
            bar.update(batch.num_rows)
    total_S2 = ranks.all_reduce(total_S2.to(ranks.device)).cpu()
    by_source = {source: (sums / count).item() for source, (sums, count) in zip(sources, total_S2) if count}
    return (total_S2[:, 0].sum() / total_S2[:, 1].sum()).item(), by_source
