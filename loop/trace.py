"""One optimizer step in full, as a page that stands alone: what was held when, by whom at the peak, and what stayed after.
Costs what a ledger costs, in that step alone, then 1 s and 300 KB for 2,000 allocations, 4 s and 2 MB for 100,000."""

from __future__ import annotations

import gc
import json
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor

from loop.holders import explained
from loop.ledger import CATEGORIES, Allocation, Ledger
from loop.peak import Peak, classify, sweep

MAX_POINTS = 2000  # of the curve
MAX_SHOWN = 8  # lines of the source at each of them
MAX_SURVIVORS = 50
SMALL = 1e-3  # of the peak: what one line of the source never held more of is drawn with others like it
EXPECTED = ("weights", "adapters", "gradients", "optimizer")  # to outlive a step
PAGE = Path(__file__).with_suffix(".html")

Origin = tuple[str, str, str]  # category, module, line of the source
Change = tuple[int, int, int]  # event, bytes, number of the group


@dataclass
class Row:
    """What one line of the source made for one purpose, in modules that differ by their layer alone."""

    bytes: int
    count: int
    category: str
    module: str
    line: str
    phase: str = ""
    remark: str = ""


@contextmanager
def recorded(
    ledger: Ledger, there: Iterable[Tensor], device: torch.device, path: Path, title: str, say: Callable[[str], None]
) -> Iterator[None]:
    """Keeps the ledger on and writes its page to `path`; on CUDA also the allocator's own record, as `path`.pickle.

    Args:
        there: tensors that the step is given.
        say: takes one line for the person at the console.
    """
    on_cuda = device.type == "cuda"
    ledger.hold("working", there)
    ledger.begin("")  # what is made from here on is the step's
    if on_cuda:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    with ledger:
        yield  # after an error the allocator goes on recording, for the report of that
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if on_cuda:  # for pytorch.org/memory_viz
                torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
            write_page(ledger, path, title)
            say(f"every allocation of this step: {path}")
        except OSError as error:  # training is worth more than its picture
            say(f"{path} is not written: {error.strerror}")
    if on_cuda:
        torch.cuda.memory._record_memory_history(enabled=None)


def write_page(ledger: Ledger, path: Path, title: str) -> None:
    """Writes `report` as a page that needs nothing else. To be called when the step has ended."""
    data = json.dumps(report(ledger), separators=(",", ":")).replace("</", "<\\/")
    page = PAGE.read_text(encoding="utf-8").replace("{{title}}", escape(title)).replace("{{report}}", data)
    path.write_text(page, encoding="utf-8")


def report(ledger: Ledger) -> dict[str, Any]:
    """What the page shows, in plain numbers and words. All sizes in bytes.

    Returns:
        peak: its size, event, phase, and bytes by category.
        phases: name, microbatch, first and last event.
        points: events of the curve, at most MAX_POINTS, the highest of each stretch of the step; by category what was
            held there, and the largest groups as [number, bytes].
        groups: [category, module, line].
        at_peak: rows that add up to the peak.
        survivors: rows made in this step that the end of the step did not free, without EXPECTED.
    """
    end = ledger.clock
    classify(ledger)
    peak = Peak.of(ledger, 0, end)
    groups, changes = merged(ledger, end, SMALL * peak.num_bytes)
    begin = ledger.phases[1].started if len(ledger.phases) > 1 else 0
    event = sweep(ledger.allocations, 0, end)[0]
    alive = [a for a in ledger.allocations if a.born <= event and (a.died is None or a.died > event)]
    return {
        "num_allocations": len(ledger.allocations), "num_events": end, "categories": list(CATEGORIES),
        "peak": {"bytes": peak.num_bytes, "event": event, "moment": peak.moment, "module": peak.module, "line": peak.line,
                 "held": peak.held},
        "phases": phases_of(ledger, end),
        "points": curve(changes, groups, begin), "groups": groups,
        "at_peak": [asdict(row) for row in rows_at_peak(alive, SMALL * peak.num_bytes)],
        "survivors": [asdict(row) for row in survivors(ledger)],
    }


def origin(a: Allocation) -> Origin:
    line = a.line if a.phase else "there before the step"
    return a.category, re.sub(r"layers\.\d+", "layers.*", a.module), line


def phases_of(ledger: Ledger, end: int) -> list[dict[str, Any]]:
    """Those with a name in which anything happened, in order."""
    stops = [phase.started for phase in ledger.phases[1:]] + [end]
    return [{"name": phase.name, "microbatch": phase.microbatch, "start": phase.started, "stop": stop}
            for phase, stop in zip(ledger.phases, stops) if phase.name and stop > phase.started]


# The curve


def merged(ledger: Ledger, end: int, small: float) -> tuple[list[Origin], list[Change]]:
    """All changes in order of time, each of a group; those that never held `small` bytes are one group a category."""
    numbers: dict[Origin, int] = {}
    changes: list[Change] = []
    for a in ledger.allocations:
        number = numbers.setdefault(origin(a), len(numbers))
        changes.append((a.born, a.num_bytes, number))
        if a.died is not None and a.died <= end:
            changes.append((a.died, -a.num_bytes, number))
    changes.sort()
    held, most = [0] * len(numbers), [0] * len(numbers)
    for _, num_bytes, number in changes:
        held[number] += num_bytes
        most[number] = max(most[number], held[number])
    kept: dict[Origin, int] = {}
    renumbered = [
        kept.setdefault(group if most[number] >= small else (group[0], "", "smaller ones"), len(kept))
        for group, number in numbers.items()
    ]
    return list(kept), [(event, num_bytes, renumbered[number]) for event, num_bytes, number in changes]


def curve(changes: list[Change], groups: list[Origin], begin: int) -> dict[str, Any]:
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
        sums = dict.fromkeys(CATEGORIES, 0)
        for group, num_bytes in zip(groups, held):
            sums[group[0]] += num_bytes
        points["event"].append(changes[at][0])
        points["total"].append(totals[at])
        for category, num_bytes in sums.items():
            points["held"][category].append(num_bytes)
        largest = sorted(range(len(groups)), key=lambda number: -held[number])[:MAX_SHOWN]
        points["largest"].append([[number, held[number]] for number in largest if held[number]])
    return points


# The tables


def rows_at_peak(alive: list[Allocation], small: float) -> list[Row]:
    """The largest first; those below `small` bytes are one row a category. They add up to the peak."""
    rows: dict[Origin, Row] = {}
    for a in alive:
        row = rows.setdefault(origin(a), Row(0, 0, *origin(a)))
        row.bytes += a.num_bytes
        row.count += 1
    kept = {key: row for key, row in rows.items() if row.bytes >= small}
    for key, row in rows.items():
        if key not in kept:
            rest = kept.setdefault((row.category, "", ""), Row(0, 0, row.category, "", "smaller ones"))
            rest.bytes += row.bytes
            rest.count += row.count
    for row in kept.values():
        if row.category == "activations" and " dequantize" in row.line:
            row.remark = "a dequantized weight, kept for the backward pass"
    return sorted(kept.values(), key=lambda row: -row.bytes)


def survivors(ledger: Ledger) -> list[Row]:
    """What the step made, and is not meant to stay, and is still there: the largest first, and who holds it."""
    groups: dict[tuple[Origin, str], list[Allocation]] = {}
    for a in ledger.allocations:
        if a.phase and a.died is None and a.category not in EXPECTED:
            groups.setdefault((origin(a), ledger.phases[a.phase].name), []).append(a)
    largest = sorted(groups.items(), key=lambda item: -sum(a.num_bytes for a in item[1]))
    gc.collect()
    holders = explained(ledger, [members for _, members in largest[:MAX_SURVIVORS]])
    rows = []
    for number, ((key, phase), members) in enumerate(largest):
        numbers = sorted({m for a in members if (m := ledger.phases[a.phase].microbatch) is not None})
        of = f" of microbatch{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:8]))}" if numbers else ""
        remark = holders[number] if number < len(holders) else ""
        rows.append(Row(sum(a.num_bytes for a in members), len(members), *key, phase=phase + of, remark=remark))
    return rows[:MAX_SURVIVORS] + remainder(rows[MAX_SURVIVORS:])


def remainder(rows: list[Row]) -> list[Row]:
    return [Row(sum(row.bytes for row in rows), sum(row.count for row in rows), "", "", "smaller ones")] if rows else []
