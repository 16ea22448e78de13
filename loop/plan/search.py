"""Finds the settings that use a card best: the length of microbatches, how many layers need no recomputation, the cuts.
Rehearses about a dozen steps, which takes a minute for the 4B and a few minutes for the 35B."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Sequence

from data.packing import rounded_up
from loop.memory.phases import GIB
from loop.pipeline.split import Cost, balance, sublayer_costs
from loop.plan.workload import RESERVE_GIB, Workload

NUM_SHOWN = 3
LENGTHS = (0.5, 1, 2)  # tried lengths of a microbatch, relative to the configured microbatch_tokens


def search(workload: Workload, card_gib: float) -> str:
    """The best settings as a table, the fastest first; among equally fast ones those with the longest microbatches.

    Raises:
        ValueError: nothing fits.
    """
    workload = workload.with_train(recompute=True, keep_layers=0)
    pipeline = replace(workload.config.pipeline, schedule="1f1b")  # is idle as long as GPipe, and keeps less
    workload = replace(workload, config=replace(workload.config, pipeline=pipeline))
    costs = sublayer_costs(workload.model, workload.config, workload.lengths)
    tokens, longest = workload.config.train.microbatch_tokens, workload.lengths.longest
    lengths = {rounded_up(max(int(tokens * share), longest)) for share in LENGTHS}
    splits = {workload.split, tuple(balance(costs, workload.num_stages))}
    found: list[tuple[float, int, str]] = []
    for length, split in itertools.product(sorted(lengths, reverse=True), sorted(splits)):
        candidate = replace(workload.with_train(microbatch_tokens=length), split=split)
        stages = list(zip((0, *split), (*split, len(costs))))
        keep, num_bytes = most_kept(candidate, stages, (card_gib - RESERVE_GIB) * GIB)
        if keep is not None:
            compute = relative_compute(candidate, keep, costs, stages)
            kept = "train.recompute=false" if 2 * keep == len(costs) else f"train.keep_layers={keep}"
            cuts = f" pipeline.split={','.join(map(str, split))} pipeline.schedule=1f1b" if split else ""
            line = f"{num_bytes / GIB:>7.2f}  {compute:>8.3f}   train.microbatch_tokens={length} {kept}{cuts}"
            found.append((round(compute, 3), -length, line))
    if not found:
        raise ValueError(
            f"nothing fits a card of {card_gib:g} GiB. Try model.base=nf4, a smaller lora.rank, more stages (--split), or "
            "shorter rows (data.max_tokens with data.overlong=drop)")
    head = f"{'GiB':>7}  {'compute':>8}   the fullest rank of {card_gib:g} GiB, compute relative to nothing done twice"
    return "\n".join([head, *(line for _, _, line in sorted(found)[:NUM_SHOWN])])


def most_kept(workload: Workload, stages: Sequence[tuple[int, int]], limit: float) -> tuple[int | None, float]:
    """How many decoder layers of each stage fit into `limit` bytes without recomputation, and the bytes of the fullest
    rank then. The number, None where nothing fits, is guessed from rehearsals of no and of all layers, then rehearsed."""
    keep = min((stop + 1) // 2 - first // 2 for first, stop in stages)
    recomputing = fullest(workload, 0)
    if recomputing > limit:
        return None, recomputing
    taken = fullest(workload, keep)
    while taken > limit:
        slope = (taken - recomputing) / keep
        keep = min(keep - 1, int((limit - recomputing) / slope))
        taken = fullest(workload, keep) if keep else recomputing
    return keep, taken


def fullest(workload: Workload, keep: int) -> float:
    """Bytes on the rank that takes most, if the last `keep` layers of each stage are not recomputed."""
    cut = f", cut at {','.join(map(str, workload.split))}" if workload.split else ""
    print(f"rehearsing microbatches of {workload.config.train.microbatch_tokens:,} tokens, {keep} layers kept{cut}")
    kept = workload.with_train(keep_layers=keep)
    return max(kept.rank_plan(rank, worst_routing=False).peak.num_bytes for rank in range(workload.num_stages))


def relative_compute(workload: Workload, keep: int, costs: Sequence[Cost], stages: Sequence[tuple[int, int]]) -> float:
    """Time of a step over that of a step which recomputes nothing and in which no stage is idle, by counting flops."""
    slowest = max(sum(costs[s].flops - costs[s].recomputed * (s >= 2 * ((stop + 1) // 2 - keep)) for s in range(first, stop))
                  for first, stop in stages)
    ideal = sum(cost.flops - cost.recomputed for cost in costs) / workload.num_stages
    train = workload.config.train
    tokens = workload.lengths.mean * train.rows_per_step / workload.num_replicas
    microbatches = max(-(-int(tokens) // train.microbatch_tokens), 1)
    return slowest / ideal * (microbatches + workload.num_stages - 1) / microbatches
