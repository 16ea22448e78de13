"""Routing: sorts the assignments of tokens to experts by expert and groups the experts that are dequantized together.
Costs 40 bytes an assignment while a layer computes.

Once sorted, the assignments of neighbouring experts are one slice, so that a group is computed with few kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor

# E experts, G of them in a group, T tokens, K experts a token, S = T * K assignments of a token to an expert

# In a memory plan index_TK has no values; the plan puts a function here that turns T, K and E into the bounds for `spans`
ASSUMED: list[Callable[[int, int, int], list[int]]] = []


def uniform_bounds(num_tokens: int, experts_per_token: int, num_experts: int) -> list[int]:
    """Bounds of an even routing: every expert gets as many tokens as every other."""
    return [num_tokens * experts_per_token * e // num_experts for e in range(num_experts + 1)]


def worst_bounds(num_tokens: int, experts_per_token: int, num_experts: int) -> list[int]:
    """Bounds of the most uneven routing: all tokens go to the first K experts."""
    return [num_tokens * min(e, experts_per_token) for e in range(num_experts + 1)]


@dataclass(frozen=True)
class Group:
    """Neighbouring experts that are dequantized together, and their assignments in the sorted order."""

    first: int  # number of the first expert
    counts: tuple[int, ...]  # assignments of each expert, none of them 0
    start: int  # position of the first assignment
    stops_G: Tensor  # where each expert's assignments end, counted from `start`; int32, on the device

    @property
    def experts(self) -> slice:
        return slice(self.first, self.first + len(self.counts))

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + sum(self.counts))


def sort_by_expert(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sorts the assignments by expert, then by token.

    Returns:
        The sorted assignments [S] as positions in the flattened index_TK, and bounds: expert e has those from bounds[e] to
        bounds[e + 1].
    """
    expert_S, order_S = index_TK.flatten().sort(stable=True)
    return order_S, torch.searchsorted(expert_S, torch.arange(num_experts + 1, device=expert_S.device))


def groups_of(bounds_E1: Tensor, index_TK: Tensor, group_size: int) -> list[Group]:
    """Forms the groups; waits for the device once."""
    num_experts, stops_E1 = len(bounds_E1) - 1, bounds_E1.int()
    bounds = ASSUMED[-1](len(index_TK), index_TK.shape[1], num_experts) if ASSUMED else bounds_E1.tolist()
    return [
        Group(first, tuple(stop - start for start, stop in zip(bounds[first:last], bounds[first + 1 : last + 1])),
              bounds[first], stops_E1[first + 1 : last + 1] - stops_E1[first])
        for first, last in spans(bounds, group_size, max_rows=len(index_TK))
    ]


def spans(bounds: Sequence[int], group_size: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Yields (first, stop) of runs of experts with assignments, each with at most `group_size` experts and `max_rows` rows.

    Args:
        bounds: expert e has the sorted assignments from bounds[e] to bounds[e + 1].
    """
    first = 0
    for e in range(len(bounds) - 1):
        is_idle = bounds[e] == bounds[e + 1]
        if first < e and (is_idle or e - first == group_size or bounds[e + 1] - bounds[first] > max_rows):
            yield first, e
            first = e
        if is_idle:
            first = e + 1
    if first < len(bounds) - 1:
        yield first, len(bounds) - 1
