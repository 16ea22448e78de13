"""Finds the settings that use a card best: the length of microbatches, how many layers need no recomputation, the cuts.
Rehearses about a dozen steps, which takes a minute for the 4B and a few minutes for the 35B."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Sequence

from data.packing import rounded_up
from loop.memory.phases import GIB
from loop.pipeline.split import balance, sublayer_costs
from loop.plan.seconds import Forecast, StepTime
from loop.plan.workload import RESERVE_GIB, Workload
from loop.rates import Rates

NUM_SHOWN = 3
LENGTHS = (0.5, 1, 2)  # tried lengths of a microbatch, relative to the configured microbatch_tokens


class Fit(NamedTuple):
    """Settings that fit a card."""

    settings: str  # as for the command line
    peak_gib: float  # of the fullest rank
    time: StepTime


def search(workload: Workload, card_gib: float, rates: Rates) -> list[Fit]:
    """The settings that take the least time, the fastest first.

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
    found: list[Fit] = []
    for length in sorted(lengths, reverse=True):
        forecast = Forecast(workload.with_train(microbatch_tokens=length), rates)
        for split in sorted(splits):
            candidate = replace(forecast.workload, split=split)
            keep, num_bytes = most_kept(candidate, list(zip((0, *split), (*split, len(costs)))), (card_gib - RESERVE_GIB) * GIB)
            if keep is not None:
                kept = "train.recompute=false" if 2 * keep == len(costs) else f"train.keep_layers={keep}"
                cuts = f" pipeline.split={','.join(map(str, split))} pipeline.schedule=1f1b" if split else ""
                settings = f"train.microbatch_tokens={length} {kept}{cuts}"
                found.append(Fit(settings, num_bytes / GIB, forecast.step(split, keep)))
    if not found:
        raise ValueError(
            f"nothing fits a card of {card_gib:g} GiB. Try model.base=nf4, a smaller lora.rank, more stages (--split), or "
            "shorter rows (data.max_tokens with data.overlong=drop)")
    return sorted(found, key=lambda fit: fit.time.seconds)[:NUM_SHOWN]


def table(found: list[Fit], card_gib: float, rates: Rates) -> str:
    """A line for each; then what the fastest spends its time on."""
    lines = [f"{'GiB':>7}  {'s a step':>8}  {'tokens/s':>9}   the fullest rank of {card_gib:g} GiB; rates of {rates.name}"]
    lines += [f"{peak_gib:>7.2f}  {time.seconds:>8.3g}  {time.tokens_per_s:>9,.0f}   {settings}"
              for settings, peak_gib, time in found]
    return "\n".join([*lines, f"the first: {found[0].time}"])


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
