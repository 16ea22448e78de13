"""The settings that use a card best: how long microbatches may be, how many layers need no recomputation, where to cut.
Rehearses a dozen times, so takes a minute for the 4B and a few for the 35B."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from loop.memory import GIB
from loop.plan import RESERVE_GIB, Workload, load_of, rows_bound
from loop.split import balance, sublayer_costs
from model.build import skeleton

NUM_SHOWN = 3
LENGTHS = (0.5, 1, 2)  # of the configured microbatch_tokens


@dataclass(frozen=True)
class Choice:
    """One way to run, what it takes on the fullest rank, and how long a step takes, relative to the ideal: nothing
    computed twice, no stage ever idle."""

    microbatch_tokens: int
    keep_layers: int
    split: tuple[int, ...]
    peak_gib: float
    compute: float

    def settings(self, num_layers: int) -> str:
        """As overrides on the command line."""
        keep = "train.recompute=false" if self.keep_layers == num_layers else f"train.keep_layers={self.keep_layers}"
        words = [f"train.microbatch_tokens={self.microbatch_tokens}", keep]
        if self.split:
            words += [f"pipeline.split={','.join(map(str, self.split))}", "pipeline.schedule=1f1b"]
        return " ".join(words)


def search(workload: Workload, card_gib: float) -> str:
    """The best choices, the fastest first; among equals the one with the longest microbatches.

    Raises:
        ValueError: nothing fits.
    """
    limit = (card_gib - RESERVE_GIB) * GIB
    num_layers = skeleton(workload.model, workload.config.model.base).config.num_hidden_layers
    choices = []
    for candidate in candidates(workload):
        choice = best_kept(candidate, limit, num_layers)
        if choice is not None:
            choices.append(choice)
    if not choices:
        raise ValueError(
            f"nothing fits a card of {card_gib:g} GiB. Try model.base=nf4, a smaller lora.rank, more stages (--split), or "
            "shorter rows (data.max_tokens with data.overlong=drop)")
    choices.sort(key=lambda choice: (round(choice.compute, 3), -choice.microbatch_tokens))
    lines = [f"{'GiB':>7}  {'compute':>8}   the fullest rank of {card_gib:g} GiB, compute relative to nothing done twice"]
    for choice in choices[:NUM_SHOWN]:
        lines.append(f"{choice.peak_gib:>7.2f}  {choice.compute:>8.3f}   {choice.settings(num_layers)}")
    return "\n".join(lines)


def candidates(workload: Workload) -> list[Workload]:
    """Every length of microbatches with every way to split; 1F1B, which idles as GPipe does and keeps less."""
    config = workload.config
    lengths = [max(int(config.train.microbatch_tokens * share), rows_bound(workload)) for share in LENGTHS]
    lengths = sorted({-(-length // 128) * 128 for length in lengths}, reverse=True)
    found = []
    for length in lengths:
        tried = replace(workload, config=replace(config, train=replace(config.train, microbatch_tokens=length, keep_layers=0)))
        if workload.num_stages == 1:
            found.append(tried)
            continue
        costs = sublayer_costs(skeleton(workload.model, config.model.base), load_of(tried, workload.num_stages))
        splits = {tuple(balance(costs, workload.num_stages)), workload.split}
        for split in sorted(splits):
            pipeline = replace(config.pipeline, split=list(split), schedule="1f1b")
            found.append(replace(tried, split=split, config=replace(tried.config, pipeline=pipeline)))
    return found


def best_kept(workload: Workload, limit: float, num_layers: int) -> Choice | None:
    """The most layers of each stage that need no recomputation, found from two rehearsals and proven by another."""
    per_stage = min(stop - start for start, stop in stage_layers(workload, num_layers))
    recomputing = fullest(workload, 0)
    if recomputing > limit:
        return None
    keep, taken = per_stage, fullest(workload, per_stage)
    while taken > limit:
        slope = (taken - recomputing) / keep
        keep = min(keep - 1, int((limit - recomputing) / slope))
        taken = fullest(workload, keep) if keep else recomputing
    compute = relative_compute(workload, keep, num_layers)
    return Choice(workload.config.train.microbatch_tokens, keep, workload.split, taken / GIB, compute)


def fullest(workload: Workload, keep: int) -> float:
    """Bytes on the rank that takes most."""
    train = workload.config.train
    print(f"rehearsing microbatches of {train.microbatch_tokens:,} tokens, {keep} layers kept"
          + (f", cut at {','.join(map(str, workload.split))}" if workload.split else ""),
          file=sys.stderr)
    tried = replace(workload, config=replace(workload.config, train=replace(train, recompute=True, keep_layers=keep)))
    return max(tried.plan(rank, worst_routing=False).peak.num_bytes for rank in range(workload.num_stages))


def stage_layers(workload: Workload, num_layers: int) -> list[tuple[int, int]]:
    """The decoder layers that each stage touches."""
    bounds = [0, *workload.split, 2 * num_layers]
    return [(first // 2, (stop + 1) // 2) for first, stop in zip(bounds, bounds[1:])]


def relative_compute(workload: Workload, keep: int, num_layers: int) -> float:
    """Time of a step over that of an ideal one, by counting floating-point operations."""
    config, num_stages = workload.config, workload.num_stages
    model = skeleton(workload.model, config.model.base)
    flops: dict[bool, list[float]] = {}
    for recompute in (True, False):
        trained = replace(workload, config=replace(config, train=replace(config.train, recompute=recompute)))
        flops[recompute] = [cost.flops for cost in sublayer_costs(model, load_of(trained, num_stages))]
    bounds = [0, *workload.split, 2 * num_layers]
    slowest = 0.0
    for first, stop in zip(bounds, bounds[1:]):
        kept_from = 2 * ((stop + 1) // 2 - keep)
        slowest = max(slowest, sum(flops[s < kept_from][s] for s in range(first, stop)))
    microbatches = workload.num_microbatches()
    return slowest * num_stages / sum(flops[False]) * (microbatches + num_stages - 1) / microbatches
