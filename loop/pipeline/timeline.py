"""Records when each stage of a pipeline computed what in one step, and draws a picture of this.
Costs two events a microbatch and direction on a GPU, and two floats on the CPU.

python -m loop.pipeline.timeline checkpoints/RUN        # draws timeline.png there, of the step before the last evaluation
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor

from data.files import write_text
from loop.errors import run_command

# S stages, M microbatches; of each: forward and backward (2), their start and stop (2)
NUMBERED = 0.015  # of the picture's width: the least that a box with a number takes


@dataclass
class Mark:
    """When one microbatch was computed in one direction: CUDA events, or seconds on the CPU."""

    microbatch: int
    is_backward: bool
    start: Any
    stop: Any = None


class Timeline:
    """Marks when this rank computes what, in the order in which the computations are issued. Marking never waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.marks: list[Mark] = []
        self.origin, self.started_at = self.now(), time.time()

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def computing(self, microbatch: int, is_backward: bool) -> Iterator[None]:
        mark = Mark(microbatch, is_backward, self.now())
        self.marks.append(mark)
        yield
        mark.stop = self.now()

    def not_begun(self) -> Mark | None:
        """The first mark that the GPU has not reached; the GPU waits for what this computation needs. Safe in any thread."""
        return next((mark for mark in self.marks if not mark.start.query()), None)

    def seconds(self, stage: int, num_stages: int, num_microbatches: int) -> Tensor:
        """Clock times [S, M, 2, 2] in float64 of this rank's `stage`, 0 for the other stages; waits for the device."""
        times_SM22 = torch.zeros(num_stages, num_microbatches, 2, 2, dtype=torch.float64)
        for mark in self.marks:
            for i, moment in enumerate((mark.start, mark.stop)):
                since = moment - self.origin if isinstance(moment, float) else self.origin.elapsed_time(moment) / 1000
                times_SM22[stage, mark.microbatch, int(mark.is_backward), i] = self.started_at + since
        return times_SM22


def busy_and_idle(times_SM22: Tensor) -> tuple[list[float], list[float]]:
    """Each stage's seconds of computing and of waiting, between the first start and the last stop of any stage."""
    whole = times_SM22.max() - times_SM22[times_SM22 > 0].min()
    busy_S = (times_SM22[..., 1] - times_SM22[..., 0]).sum(dim=(1, 2))
    return busy_S.tolist(), (whole - busy_S).tolist()


def write(path: Path, step: int, schedule: str, times_SM22: Tensor) -> None:
    """Writes the timeline of a step in place of an older one, unless the disk is full."""
    since = times_SM22 - times_SM22.min()
    with suppress(OSError):
        write_text(path, json.dumps({"step": step, "schedule": schedule, "seconds_SM22": since.tolist()}))


def draw(path: Path, out: Path) -> None:
    """Draws a line for each stage and a box for each microbatch and direction, to scale. Needs matplotlib (extra [plots]).

    Raises:
        ValueError: `path` does not exist.
    """
    from matplotlib.figure import Figure

    try:
        timeline = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{path}: not found. Expected the directory of a run that was trained in stages") from None
    times_SM22 = torch.tensor(timeline["seconds_SM22"])
    num_stages = len(times_SM22)
    busy, idle = busy_and_idle(times_SM22 + 1)
    figure = Figure(figsize=(12, 0.8 + 0.7 * num_stages), layout="constrained")
    axis = figure.subplots()
    num_microbatches = times_SM22.shape[1]
    for stage, microbatch, direction in itertools.product(*map(range, times_SM22.shape[:3])):
        start, stop = times_SM22[stage, microbatch, direction].tolist()
        label = "_" if stage or microbatch else ("forward", "backward")[direction]  # "_": not in the legend
        axis.barh(stage, stop - start, left=start, color=("#1f5fa8", "#b4560f")[direction], edgecolor="white", height=0.9,
                  label=label)
        if stop - start > NUMBERED * times_SM22.max():
            axis.text((start + stop) / 2, stage, str(microbatch), ha="center", va="center", fontsize=7, color="white")
    labels = [f"stage {s}\n{100 * i / (b + i):.0f} % idle" for s, (b, i) in enumerate(zip(busy, idle))]
    title = (f"{path.parent.name}, step {timeline['step']}, {timeline['schedule']}: when each stage was busy, a box for each "
             f"microbatch; idle by the schedule alone: {100 * (num_stages - 1) / (num_microbatches + num_stages - 1):.0f} %")
    axis.set(ylim=(num_stages - 0.5, -0.5), xlim=(0, times_SM22.max().item()), xlabel="seconds", title=title,
             yticks=range(num_stages), yticklabels=labels)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loop.pipeline.timeline", description="Draws when each stage was busy "
                                     "in the step before the last evaluation.")
    parser.add_argument("run_dir", type=Path, help="such as checkpoints/chess-tutor-35b")
    run_dir = parser.parse_args().run_dir
    draw(run_dir / "timeline.json", run_dir / "timeline.png")
    print(run_dir / "timeline.png")


if __name__ == "__main__":
    run_command(main)
