"""From a ledger to what a person asks: what the memory was held for when it was fullest, and which line made that.
Costs a few passes over the ledger's allocations."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loop.ledger import CATEGORIES, Allocation, Ledger

COMMUNICATION = ("communicate", "sync")


@dataclass(frozen=True)
class Line:
    """Everything alive at the peak that one line of the source made, in modules that differ by their layer alone."""

    num_bytes: int
    count: int
    category: str
    module: str
    line: str


@dataclass(frozen=True)
class Peak:
    """The moment at which tensors held the most."""

    num_bytes: int
    held: dict[str, int]  # bytes by category at that moment; they add up to num_bytes
    most: dict[str, int]  # bytes by category, each at its own worst moment
    phase: str
    microbatch: int | None
    module: str  # that allocated last before the peak
    line: str
    largest: list[Line]

    @property
    def moment(self) -> str:
        return self.phase if self.microbatch is None else f"{self.phase} of microbatch {self.microbatch}"

    @classmethod
    def of(cls, ledger: Ledger, start: int, stop: int) -> Peak:
        """The peak from event `start` to event `stop`."""
        classify(ledger)
        event, num_bytes, most = sweep(ledger.allocations, start, stop)
        alive = [a for a in ledger.allocations if a.born <= event and (a.died is None or a.died > event)]
        held = {category: sum(a.num_bytes for a in alive if a.category == category) for category in CATEGORIES}
        last = max(alive, key=lambda a: a.born)
        phase = next(phase for phase in reversed(ledger.phases) if phase.started < max(last.born, 1))
        return cls(num_bytes, held, most, phase.name, phase.microbatch, last.module, last.line, lines(alive))


NOTHING = Peak(0, dict.fromkeys(CATEGORIES, 0), dict.fromkeys(CATEGORIES, 0), "", None, "", "", [])  # where none is known


def classify(ledger: Ledger) -> None:
    """Gives every allocation without a category the one that follows from its phase and its life:

    what building and loading leave is weights; what the forward pass of a microbatch leaves is activations; what taking
    the loss does not leave is logits; what is made between the phases of a schedule, or to sum gradients, is
    communication; everything else works and goes.
    """
    ends = [phase.started for phase in ledger.phases[1:]] + [ledger.clock]
    for a in ledger.allocations:
        if a.category:
            continue
        name, end = ledger.phases[a.phase].name, ends[a.phase]
        stays = a.died is None or a.died > end
        if name in ("build", "load") and stays:
            a.category = "weights"
        elif name in ("forward", "loss") and stays:
            a.category = "activations"
        elif name == "loss":
            a.category = "logits"
        else:
            a.category = "communication" if name in COMMUNICATION else "working"


def sweep(allocations: list[Allocation], start: int, stop: int) -> tuple[int, int, dict[str, int]]:
    """The event and bytes of the peak, and the most that each category held, from event `start` to `stop`."""
    events = [(a.born, a.num_bytes, a.category) for a in allocations]
    events += [(a.died, -a.num_bytes, a.category) for a in allocations if a.died is not None]
    current = dict.fromkeys(CATEGORIES, 0)
    most = dict.fromkeys(CATEGORIES, 0)
    total = peak = event = 0
    for at, num_bytes, category in sorted(events):
        if at > stop:
            break
        total += num_bytes
        current[category] += num_bytes
        if at < start:
            most = current.copy()
        else:
            most[category] = max(most[category], current[category])
            if total > peak:
                event, peak = at, total
    return event, peak, most


def lines(alive: list[Allocation]) -> list[Line]:
    """The largest first."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for a in alive:
        entry = sums.setdefault((a.category, re.sub(r"layers\.\d+", "layers.*", a.module), a.line), [0, 0])
        entry[0] += a.num_bytes
        entry[1] += 1
    found = [Line(num_bytes, count, *key) for key, (num_bytes, count) in sums.items()]
    return sorted(found, key=lambda line: -line.num_bytes)
