"""Finds what a step piles up: memory that every microbatch leaves behind while the others are computed.
Costs one pass over the allocations of a counted step, and on a GPU one look at the allocator's counter a microbatch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Sequence

from loop.memory.holders import explained
from loop.memory.ledger import LASTING, Allocation, Ledger
from loop.memory.peak import KEPT, Line, grouped, origin, sum_bytes

BETWEEN = ("", "communicate")  # what is no microbatch's own phase; what is made there counts to the one before
LEAST_BYTES = 2**18  # a microbatch; losses, counts and other numbers that are kept on purpose take less


@dataclass(frozen=True)
class Growth:
    """What each microbatch of a step leaves behind."""

    step: int
    num_bytes: int  # a microbatch
    lines: Sequence[Line] = ()  # of the source, the largest first; empty where they were not recorded

    def __str__(self) -> str:
        said = f"memory grows by {self.num_bytes / 2**20:,.1f} MiB with every microbatch of step {self.step}"
        if self.lines:
            most = self.lines[0]
            share = f"{100 * most.num_bytes / self.num_bytes:.0f} % of it "
            said += f", {share}made at {most.line.partition(' < ')[0]}" + (f"; {most.remark}" if most.remark else "")
        return said + " (docs/debugging-memory.md)"


class GrowthSearch:
    """Notices the first step that piles something up, and has the next one record lines of the source, once.

    A ledger notices it in each step that it counts; on CUDA the allocator does so in every step of three or more microbatches.
    """

    def __init__(self) -> None:
        self.found: Growth | None = None
        self.is_over = False  # the lines are known, or were sought
        self.is_said = False
        self.begin(0, None)

    @property
    def needs_lines(self) -> bool:
        return self.found is not None and not self.is_over

    def begin(self, step: int, ledger: Ledger | None) -> None:
        """Begins a step, in which `ledger` counts, if any."""
        self.step, self.ledger = step, ledger
        self.starts: list[int] = []  # bytes on CUDA at the start of each microbatch, where no stage waits for another

    def look_for_holders(self) -> None:
        """Looks after the last microbatch, while what holds the others is still there."""
        if self.ledger is not None and self.ledger.with_sites:
            self.look()

    def look(self) -> None:
        """Looks at the step as it is now, for what its microbatches have left."""
        if self.ledger is None:
            lines, num_bytes = list[Line](), grown(self.starts)
        else:
            lines = piled_up(self.ledger)
            num_bytes = sum_bytes(lines)
        has_lines = self.ledger is not None and self.ledger.with_sites
        if self.ledger is not None and has_lines:
            self.ledger.piled_up = lines  # for the page of the step
        if num_bytes >= LEAST_BYTES and not self.is_over:
            self.found, self.is_over = Growth(self.step, num_bytes, lines if has_lines else ()), has_lines

    def end(self) -> None:
        """Ends the step."""
        if self.found is None or self.found.step != self.step:
            self.look()
        if self.needs_lines and self.ledger is not None and self.ledger.with_sites:  # nothing that operations of torch make
            self.found, self.is_over = None, True
        self.ledger = None

    def news(self) -> str:
        """What was found, in a line, once it is known; "" at any other time."""
        if self.found is None or not self.is_over or self.is_said:
            return ""
        self.is_said = True
        return str(self.found)


def grown(starts: list[int]) -> int:
    """By how much memory grew at least from the start of a microbatch to that of the next. The first one makes gradients."""
    return min((after - before for before, after in zip(starts[1:], starts[2:])), default=0)


def piled_up(ledger: Ledger) -> list[Line]:
    """What every microbatch had left when the last one ended, by line of the source, the largest first.

    For each line the microbatch counts that left least. So what is made once does not count, nor what only the last
    microbatch still holds. What is made after a microbatch's phases, the last one has not made yet.

    Returns:
        Lines with the bytes and the number of allocations of one microbatch; none with fewer than two microbatches.
    """
    microbatches = microbatches_of(ledger)
    num_microbatches = len(set(microbatches) - {None})
    found = []
    for (category, module, line, phase), members in grouped(
            left_behind(ledger), lambda a: (*origin(a), ledger.phases[a.phase].name)):
        by_microbatch: defaultdict[int | None, list[Allocation]] = defaultdict(list)
        for a in members:
            by_microbatch[microbatches[a.phase]].append(a)
        least = min(by_microbatch.values(), key=sum_bytes)
        if len(by_microbatch) >= max(2, num_microbatches - (phase in BETWEEN)):
            category = category or KEPT.get(phase, "working")  # `classify` has not been called yet
            found.append((Line(sum_bytes(least), len(least), category, module, line, phase), members))
    found.sort(key=lambda item: -item[0].num_bytes)
    lines = [line for line, _ in found]
    if ledger.with_sites and sum_bytes(lines) >= LEAST_BYTES:
        # what a graph of autograd holds is explained by the end of the graph, which the forward pass made last
        forward = [members for line, members in found if line.phase != "backward"]
        end = max(forward, key=lambda members: members[-1].born, default=[])
        lines[0].remark = explained(ledger, [found[0][1][:1], end])[0]
    return lines


def left_behind(ledger: Ledger) -> list[Allocation]:
    """What the microbatches had made and not freed when the last one ended; in a pipeline when its schedule ended, since
    messages of all microbatches may be under way until then."""
    microbatches = microbatches_of(ledger)
    last = max((number for number, phase in enumerate(ledger.phases) if phase.microbatch is not None), default=0)
    end = next((phase.started for phase in ledger.phases[last + 1 :] if phase.name != "communicate"), ledger.clock)
    return [a for a in ledger.allocations if microbatches[a.phase] is not None and a.category not in LASTING
            and a.born <= end and (a.died is None or a.died > end)]


def microbatches_of(ledger: Ledger) -> list[int | None]:
    """The microbatch that each phase counts to."""
    found: list[int | None] = []
    for phase in ledger.phases:
        found.append(phase.microbatch if phase.name not in BETWEEN or not found else found[-1])
    return found
