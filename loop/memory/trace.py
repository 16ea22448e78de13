"""Writes one optimizer step as a page: what was held when, by which lines at the peak, and what was still held afterwards.
Writing takes 1 s and 300 KB for 2,000 allocations, 4 s and 2 MB for 100,000; recording costs what ledger.py says."""

from __future__ import annotations

import gc
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from loop.memory.holders import explained
from loop.memory.ledger import CATEGORIES, LASTING, Ledger
from loop.memory.peak import Line, Origin, Peak, by_kind, changes_of, grouped, origin, sum_bytes
from loop.pages import document

MAX_POINTS = 2000  # of the curve
MAX_SHOWN = 8  # lines of the source at each point
MAX_SURVIVORS = 50
SMALL = 1e-3  # of the peak: lines of the source that hold less are shown as one a category
PAGE = Path(__file__).with_suffix(".html")


def write_page(ledger: Ledger, path: Path, title: str, planned: dict[str, float] | None = None) -> None:
    """Writes a page that needs no other file, for a ledger whose step has ended.

    Args:
        planned: GiB at the planned peak by kind of layer, if there is a plan.
    """
    data = page_data(ledger) | {"planned": planned and {kind: gib * 2**30 for kind, gib in planned.items()}}
    path.write_text(document(f"Memory: {title}", PAGE.read_text(encoding="utf-8"), data), encoding="utf-8")


def write_snapshot(path: Path) -> bool:
    """Writes the CUDA allocator's history for https://pytorch.org/memory_viz and stops recording; False if none was kept."""
    if not torch.cuda.is_initialized() or not torch._C._cuda_isHistoryEnabled():
        return False
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
    return True


def page_data(ledger: Ledger) -> dict[str, Any]:
    """What the page shows, in plain numbers and words. All sizes in bytes.

    Returns:
        peak: its size, event, phase, and bytes by category.
        phases: name, microbatch, first and last event.
        points: events of the curve, at most MAX_POINTS, the highest of each stretch of the step; by category what was
            held at each, and the largest groups as [number, bytes].
        groups: [category, module, line].
        small: the size below which a line or a category is not shown.
        at_peak: lines that add up to the peak.
        kinds: the same by kind of layer, the largest first: name, size, and bytes by category.
        survivors: lines of what the step made and did not free, without the LASTING categories.
        piled_up: lines of what each microbatch left behind while the others were computed, with the bytes of one microbatch.
    """
    end = ledger.clock
    peak = Peak.of(ledger, 0, end)
    small = SMALL * peak.num_bytes
    groups, changes = changes_by_group(ledger, end, small)
    begin = ledger.phases[1].started if len(ledger.phases) > 1 else 0
    stops = [phase.started for phase in ledger.phases[1:]] + [end]
    return {
        "num_allocations": len(ledger.allocations), "num_events": end, "categories": list(CATEGORIES),
        "peak": {"bytes": peak.num_bytes, "event": peak.event, "moment": peak.moment, "module": peak.module,
                 "line": peak.line, "held": peak.held},
        "phases": [{"name": phase.name, "microbatch": phase.microbatch, "start": phase.started, "stop": stop}
                   for phase, stop in zip(ledger.phases, stops) if phase.name and stop > phase.started],
        "points": curve(changes, groups, begin), "groups": groups, "small": small,
        "at_peak": [asdict(line) for line in lines_at_peak(peak.largest, small)], "kinds": by_kind(peak.largest),
        "survivors": [asdict(line) for line in survivors(ledger)],
        "piled_up": [asdict(line) for line in ledger.piled_up],
    }


# The curve


def changes_by_group(ledger: Ledger, end: int, small: float) -> tuple[list[Origin], list[tuple[int, int, int]]]:
    """The groups, and all changes in order of time: event, bytes gained or lost, number of the group. Lines of the source
    that never held `small` bytes are one group a category."""
    numbers: dict[Origin, int] = {}
    changes = []
    for key, members in grouped(ledger.allocations, origin):
        own = changes_of(members, end)
        is_small = max(accumulate(num_bytes for _, num_bytes, _ in own)) < small
        number = numbers.setdefault((key[0], "", "smaller ones") if is_small else key, len(numbers))
        changes += [(event, num_bytes, number) for event, num_bytes, _ in own]
    return list(numbers), sorted(changes)


def curve(changes: list[tuple[int, int, int]], groups: list[Origin], begin: int) -> dict[str, Any]:
    """What was held at the highest moment of each stretch of the step, from event `begin` on."""
    totals = list(accumulate(num_bytes for _, num_bytes, _ in changes))
    first = max(sum(event <= begin for event, _, _ in changes) - 1, 0)
    width = -(-(len(changes) - first) // (MAX_POINTS - 2))
    stretches = [range(start, min(start + width, len(changes))) for start in range(first, len(changes), width)]
    chosen = sorted({first, *(max(stretch, key=totals.__getitem__) for stretch in stretches), len(changes) - 1})
    held = [0] * len(groups)
    points: dict[str, Any] = {"event": [], "total": [], "held": {category: [] for category in CATEGORIES}, "largest": []}
    before = 0
    for at in chosen:
        for _, num_bytes, number in changes[before : at + 1]:
            held[number] += num_bytes
        before = at + 1
        points["event"].append(changes[at][0])
        points["total"].append(totals[at])
        sums = dict.fromkeys(CATEGORIES, 0)
        for group, num_bytes in zip(groups, held):
            sums[group[0]] += num_bytes
        for category, num_bytes in sums.items():
            points["held"][category].append(num_bytes)
        largest = sorted(range(len(groups)), key=lambda number: -held[number])[:MAX_SHOWN]
        points["largest"].append([[number, held[number]] for number in largest if held[number]])
    return points


# The tables


def lines_at_peak(largest: list[Line], small: float) -> list[Line]:
    """The lines with those below `small` bytes as one a category; they still add up to the peak."""
    shown = [line for line in largest if line.num_bytes >= small]
    for line in shown:
        if line.category == "activations" and " dequantize" in line.line:
            line.remark = "a dequantized weight, kept for the backward pass"
    for category in CATEGORIES:
        shown += as_one([line for line in largest if line.num_bytes < small and line.category == category], category)
    return sorted(shown, key=lambda line: -line.num_bytes)


def as_one(lines: list[Line], category: str) -> list[Line]:
    return [Line(sum_bytes(lines), sum(line.count for line in lines), category, "", "smaller ones")] if lines else []


def survivors(ledger: Ledger) -> list[Line]:
    """What the step made outside the LASTING categories and did not free, the largest first, with the holder of each."""
    left = [a for a in ledger.allocations if a.phase and a.died is None and a.category not in LASTING]
    groups = grouped(left, lambda a: (*origin(a), ledger.phases[a.phase].name))
    gc.collect()  # frees reference cycles; the groups keep what goes now, for its size
    holders = explained(ledger, [members for _, members in groups[:MAX_SURVIVORS]])
    lines = []
    for number, ((*key, phase), members) in enumerate(groups):
        numbers = sorted({m for a in members if (m := ledger.phases[a.phase].microbatch) is not None})
        if numbers:
            phase += f" of microbatch{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:8]))}"
        category, module, line = key
        holder = holders[number] if number < len(holders) else ""
        lines.append(Line(sum_bytes(members), len(members), category, module, line, phase, holder))
    return lines[:MAX_SURVIVORS] + as_one(lines[MAX_SURVIVORS:], "")
