"""What memory was held for when a step held the most, and which lines of the source had made the tensors held then.
Costs a few passes over the ledger's allocations."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Callable, Iterable

from loop.memory.ledger import CATEGORIES, Allocation, Ledger

COMMUNICATION = {"communicate": "communication", "sync": "communication"}
# category by the phase of birth: of what is still held at the end of the phase, and of what is not
KEPT = {"build": "weights", "load": "weights", "forward": "activations", "loss": "activations", **COMMUNICATION}
FREED = {"loss": "logits", **COMMUNICATION}
# of layers, each with what a module's name then has in it; the first that fits counts
KINDS = {"norms": "norm", "attention": "self_attn|rotary_emb", "delta rule": "linear_attn", "feed-forward": "mlp",
         "embedding and head": "embed_tokens|lm_head", "between the parts of layers": r"layers\.", "outside of layers": ""}
Origin = tuple[str, ...]  # category, module, line of the source
Change = tuple[int, int, str]  # event, bytes gained or lost, category


@dataclass
class Line:
    """Allocations of one category that one line of the source made, in modules that differ only in the layer's number."""

    num_bytes: int
    count: int
    category: str
    module: str
    line: str
    phase: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Peak:
    """The moment at which tensors held the most."""

    event: int
    num_bytes: int
    held: dict[str, int]  # bytes by category at that moment; they add up to num_bytes
    most: dict[str, int]  # bytes by category, each at its own worst moment
    phase: str
    microbatch: int | None
    module: str  # of the last allocation before the peak
    line: str  # of the same allocation
    largest: list[Line]  # what was held at that moment, the largest first

    @property
    def moment(self) -> str:
        return self.phase if self.microbatch is None else f"{self.phase} of microbatch {self.microbatch}"

    @classmethod
    def of(cls, ledger: Ledger, start: int, stop: int) -> Peak:
        """The peak from event `start` to event `stop`."""
        classify(ledger)
        total = num_bytes = event = 0
        current, most = dict.fromkeys(CATEGORIES, 0), dict.fromkeys(CATEGORIES, 0)
        for at, change, category in changes_of(ledger.allocations, stop):
            total += change
            current[category] += change
            if at < start:
                most = current.copy()
                continue
            most[category] = max(most[category], current[category])
            if total > num_bytes:
                event, num_bytes = at, total
        alive = [a for a in ledger.allocations if a.born <= event and (a.died is None or a.died > event)]
        held = {category: sum(a.num_bytes for a in alive if a.category == category) for category in CATEGORIES}
        last = max(alive, key=lambda a: a.born)
        phase = next(phase for phase in reversed(ledger.phases) if phase.started < max(last.born, 1))
        largest = [Line(sum_bytes(members), len(members), *key) for key, members in grouped(alive, origin)]
        return cls(event, num_bytes, held, most, phase.name, phase.microbatch, last.module, last.line, largest)


def by_kind(lines: list[Line]) -> list[dict[str, Any]]:
    """The lines' bytes by kind of layer. Optimizer states belong to no module, and count as outside of layers."""
    has_experts = any(".mlp.experts" in line.module for line in lines)  # then every layer has some, in its mlp
    kinds: dict[str, dict[str, Any]] = {}
    for line in lines:
        name = next(name for name, pattern in KINDS.items() if re.search(pattern, line.module))
        name = "experts" if has_experts and name == "feed-forward" else name
        kind = kinds.setdefault(name, {"name": name, "num_bytes": 0, "held": dict.fromkeys(CATEGORIES, 0)})
        kind["num_bytes"] += line.num_bytes
        kind["held"][line.category] += line.num_bytes
    return sorted(kinds.values(), key=lambda kind: -kind["num_bytes"])


def classify(ledger: Ledger) -> None:
    """Gives every allocation without a category the one that follows from its phase and from when it was freed."""
    ends = [phase.started for phase in ledger.phases[1:]] + [ledger.clock]
    for a in ledger.allocations:
        is_kept = a.died is None or a.died > ends[a.phase]
        a.category = a.category or (KEPT if is_kept else FREED).get(ledger.phases[a.phase].name, "working")


def changes_of(allocations: list[Allocation], stop: int) -> list[Change]:
    """Every birth and death up to event `stop`, in order of time."""
    changes = [(a.born, a.num_bytes, a.category) for a in allocations]
    changes += [(a.died, -a.num_bytes, a.category) for a in allocations if a.died is not None]
    return sorted(change for change in changes if change[0] <= stop)


def origin(a: Allocation) -> Origin:
    """What allocations have in common that are shown as one."""
    return a.category, re.sub(r"layers\.\d+", "layers.*", a.module), a.line if a.phase else "there before the step"


def grouped(
    allocations: Iterable[Allocation], key_of: Callable[[Allocation], Origin]
) -> list[tuple[Origin, list[Allocation]]]:
    """Allocations by their key, the group with the most bytes first."""
    groups: defaultdict[Origin, list[Allocation]] = defaultdict(list)
    for a in allocations:
        groups[key_of(a)].append(a)
    return sorted(groups.items(), key=lambda item: -sum_bytes(item[1]))


def sum_bytes(parts: Iterable[Allocation | Line]) -> int:
    return sum(part.num_bytes for part in parts)
