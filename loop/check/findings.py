"""What a check has found: a line for each fact, whether it is right, and what to do where it is not.
Costs nothing."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable

import torch

from loop.memory.phases import GIB

REPEATS, CPU_REPEATS = 5, 1


@dataclass(frozen=True)
class Finding:
    """One line of the table. `problem` is "" where nothing is wrong; `numbers` are what check.json holds beside the words."""

    part: str  # machine | kernels | operations | links | memory | saving
    name: str
    found: str
    problem: str = ""
    numbers: dict[str, Any] | None = None


def table(findings: list[Finding]) -> str:
    """A line for each finding, under its part; what is wrong stands in a line of its own below."""
    width = max(len(finding.name) for finding in findings)
    lines, part = [], ""
    for finding in findings:
        if finding.part != part:
            part = finding.part
            lines += ["", part]
        lines.append(f"  {'WRONG' if finding.problem else 'ok':<5}  {finding.name:<{width}}  {finding.found}")
        if finding.problem:
            lines.append(f"  {'':<5}  {'':<{width}}  -> {finding.problem}")
    return "\n".join(lines[1:])


def verdict(findings: list[Finding], name: str, on_gpu: bool) -> str:
    """One sentence."""
    wrong = [finding.name for finding in findings if finding.problem]
    if not wrong and on_gpu:
        return f"Nothing is wrong: this machine can run {name}."
    if not wrong:
        return f"Nothing is wrong with the CPU's paths. {name} is meant for GPUs, and none is visible."
    return f"{len(wrong)} of {len(findings)} checks found something wrong, see above: {', '.join(wrong)}."


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, after one that is not counted."""
    times = []
    for _ in range(1 + (REPEATS if device.type == "cuda" else CPU_REPEATS)):
        wait_for(device)
        started = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3g} GiB" if num_bytes < GIB else f"{num_bytes / GIB:.1f} GiB"
