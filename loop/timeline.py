"""When each stage of a pipeline computed what in one step, and the picture of it.
Costs two events a microbatch and direction on a GPU, and two floats on the CPU.

python -m loop.timeline checkpoints/RUN        # draws checkpoints/RUN/timeline.png from the last step's timeline.json
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor

from loop.errors import run_command

# S stages, M microbatches; of each: forward and backward (2), their start and stop (2)


@dataclass
class Mark:
    """One microbatch of one stage in one direction: CUDA events, or seconds on the CPU."""

    stage: int
    microbatch: int
    is_backward: bool
    start: Any
    stop: Any = None


class Timeline:
    """Marks what this rank computes in the order in which it is issued. On a GPU nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """A new step begins."""
        self.marks: list[Mark] = []
        self.origin, self.started_at = self.now(), time.time()

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def computing(self, stage: int, microbatch: int, is_backward: bool) -> Iterator[None]:
        mark = Mark(stage, microbatch, is_backward, self.now())
        self.marks.append(mark)
        yield
        mark.stop = self.now()

    def not_begun(self) -> Mark | None:
        """The first mark that a GPU has not reached: it waits for what that one needs. May be asked by another thread."""
        return next((mark for mark in self.marks if not mark.start.query()), None)

    def seconds(self, num_stages: int, num_microbatches: int) -> Tensor:
        """Clock times [S, M, 2, 2] in float64, 0 where this rank computed nothing; waits for the device."""
        times_SM22 = torch.zeros(num_stages, num_microbatches, 2, 2, dtype=torch.float64)
        for mark in self.marks:
            for i, moment in enumerate((mark.start, mark.stop)):
                since = moment - self.origin if isinstance(moment, float) else self.origin.elapsed_time(moment) / 1000
                times_SM22[mark.stage, mark.microbatch, int(mark.is_backward), i] = self.started_at + since
        return times_SM22


def busy_and_idle(times_SM22: Tensor) -> tuple[list[float], list[float]]:
    """Seconds that each stage computed, and did not, between the first start and the last stop of any stage."""
    whole = times_SM22.max() - times_SM22[times_SM22 > 0].min()
    busy_S = (times_SM22[..., 1] - times_SM22[..., 0]).sum(dim=(1, 2))
    return busy_S.tolist(), (whole - busy_S).tolist()


def write(path: Path, step: int, schedule: str, times_SM22: Tensor) -> None:
    """Replaces the timeline of the step before."""
    since = times_SM22 - times_SM22.min()
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"step": step, "schedule": schedule, "seconds_SM22": since.tolist()}))
    partial.replace(path)


def draw(path: Path, out: Path) -> None:
    """One line a stage, one box a microbatch and direction, to scale. Needs matplotlib (extra [plots]).

    Raises:
        ValueError: no timeline there.
    """
    from matplotlib.figure import Figure

    try:
        timeline = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{path}: not found. Expected the directory of a run that was trained in stages") from None
    times_SM22 = torch.tensor(timeline["seconds_SM22"])
    num_stages, num_microbatches = times_SM22.shape[:2]
    busy, idle = busy_and_idle(times_SM22 + 1)
    figure = Figure(figsize=(12, 0.8 + 0.7 * num_stages), layout="constrained")
    axis = figure.subplots()
    for stage in range(num_stages):
        for microbatch in range(num_microbatches):
            for direction, color in enumerate(("tab:blue", "tab:orange")):
                start, stop = times_SM22[stage, microbatch, direction].tolist()
                axis.barh(stage, stop - start, left=start, color=color, edgecolor="white", height=0.9)
                axis.text((start + stop) / 2, stage, str(microbatch), ha="center", va="center", fontsize=7, color="white")
    labels = [f"stage {s}\n{100 * i / (b + i):.0f} % idle" for s, (b, i) in enumerate(zip(busy, idle))]
    axis.set_yticks(range(num_stages), labels)
    axis.invert_yaxis()
    axis.set_xlim(0, times_SM22.max().item())
    axis.set_xlabel("seconds")
    axis.set_title(f"step {timeline['step']}, {timeline['schedule']}: forward (blue), backward (orange), by microbatch")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loop.timeline", description="Draws the last step's schedule.")
    parser.add_argument("run_dir", type=Path, help="such as checkpoints/chess-tutor-35b")
    args = parser.parse_args()
    draw(args.run_dir / "timeline.json", args.run_dir / "timeline.png")
    print(args.run_dir / "timeline.png")


if __name__ == "__main__":
    run_command(main)
