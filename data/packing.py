"""Decides from the rows' lengths which microbatch of which replica holds each row of an optimizer step.
Which rows share a microbatch never changes the step's gradient, only the step's speed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Sequence

ROUND_TO = 128  # tokens; microbatch lengths are multiples: few distinct shapes, whole tiles in every matmul
MAX_SPARE = 2  # microbatches more than needed: 40 equal rows fill 10 microbatches of 4, but leave room in 9 of 5


def rounded_up(num_tokens: int) -> int:
    """The length of a stream that holds `num_tokens`: rounded up to a multiple of 128."""
    return -(-num_tokens // ROUND_TO) * ROUND_TO


@dataclass(frozen=True)
class Packing:
    """Where each example of one optimizer step goes.

    `microbatches[replica][m]` lists indices into the step's examples. All microbatches are `length` tokens long, the
    rest of each is padding.
    """

    length: int
    microbatches: list[list[list[int]]]


def pack_step(groups: Sequence[Sequence[int]], num_replicas: int, microbatch_tokens: int) -> Packing:
    """Deals rows over replicas evenly by tokens, then packs each replica's examples into balanced microbatches: as few
    as hold them, or a few more where that leaves less padding.

    Args:
        groups: for each row of the step the lengths of its examples; examples are numbered in this order through all groups.
        num_replicas: data-parallel replicas.
        microbatch_tokens: the most tokens of a microbatch; padding may fill it up to the next multiple of 128.
    """
    lengths = [length for group in groups for length in group]
    first = [sum(len(group) for group in groups[:g]) for g in range(len(groups))]
    dealt = [
        [first[g] + i for g in rows for i in range(len(groups[g]))]
        for rows in balance([sum(group) for group in groups], num_replicas)
    ]
    packings = [pack(lengths, dealt, microbatch_tokens, spare) for spare in range(MAX_SPARE + 1)]
    return min(packings, key=lambda packing: packing.length * sum(len(replica) for replica in packing.microbatches))


def pack(lengths: Sequence[int], dealt: Sequence[Sequence[int]], capacity: int, spare: int) -> Packing:
    """Packs each replica's examples into the fewest microbatches found, and up to `spare` more."""
    microbatches = []
    for examples in dealt:
        sizes = [lengths[e] for e in examples]
        bins = fewest_bins(sizes, capacity)
        if bins and spare:
            looser = [members for members in balance(sizes, len(bins) + spare) if members]
            bins = looser if max(sum(sizes[i] for i in members) for members in looser) <= capacity else bins
        microbatches.append([sorted(examples[i] for i in members) for members in bins])
    fullest = max(sum(lengths[e] for e in members) for replica in microbatches for members in replica)
    return Packing(rounded_up(fullest), microbatches)


def balance(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Longest first, each into the emptiest bin (Graham 1969): the fullest bin has at most 4/3 of the least possible."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0] * num_bins
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        emptiest = totals.index(min(totals))
        bins[emptiest].append(index)
        totals[emptiest] += sizes[index]
    return bins


def fewest_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """The fewest bins of `capacity` that `balance` or `best_fit` find; no bins for no sizes."""
    assert all(size <= capacity for size in sizes), "an example is longer than a microbatch"
    for num_bins in count(-(-sum(sizes) // capacity)):
        bins = balance(sizes, num_bins)
        if max((sum(sizes[i] for i in members) for members in bins), default=0) <= capacity:
            return bins
        bins = best_fit(sizes, capacity)
        if len(bins) <= num_bins:
            return bins
    raise AssertionError("unreachable: one bin a row always fits")


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the fullest bin that still takes it: fewer bins than `balance`, less even."""
    bins: list[list[int]] = []
    totals: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [b for b, total in enumerate(totals) if total + sizes[index] <= capacity]
        if fitting:
            best = max(fitting, key=lambda b: totals[b])
            bins[best].append(index)
            totals[best] += sizes[index]
        else:
            bins.append([index])
            totals.append(sizes[index])
    return bins
