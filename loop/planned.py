"""Starts `python -m loop.plan` beside a run, in a process of its own, and compares its plan with what the run took.
Costs one thread at low priority for 10 to 40 s, and 550 MB of the host's memory meanwhile."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any, Callable, Iterator, Sequence

import torch

from loop.config import Config, to_yaml
from loop.distributed.groups import Ranks
from loop.errors import ROOT
from loop.memory.growth import Growth
from loop.memory.phases import GIB
from model.devices import OFF, ON

NICENESS = 10
LIMIT_S = 600
WAIT_S = 60  # for a plan that is not there when its run has ended
FIRST_STEPS = 2  # in which kernels are chosen and compiled
BUSY = 1.5
# variables that a launcher sets for its workers; without them the planning process is not taken for a worker
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")

Record = dict[str, Any]  # of one rank, as `loop.plan --json` prints it


def start_process(config: Config, ranks: Ranks, *arguments: str) -> subprocess.Popen[str]:
    """Starts `loop.plan` for a run. The process prints to this one alone, sees no GPU, and ends when this one ends."""
    command = [sys.executable, "-m", "loop.plan", "--config", "/dev/stdin", "--json", "--device", ranks.device.type,
               "--ranks", str(ranks.world_size), "--split", ",".join(map(str, ranks.split)) or "none",
               "--beside", str(os.getpid()), "--without", ",".join(sorted(OFF)), "--threads", str(torch.get_num_threads()),
               *(["--card", torch.cuda.get_device_name(ranks.device)] if ranks.device.type == "cuda" else []), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    compiles = "compiled" not in OFF and ("compiled" in ON or ranks.device.type == "cuda")
    with suppress(BrokenPipeError), process.stdin as stdin:  # the process may have failed already
        stdin.write(to_yaml(replace(config, train=replace(config.train, compile=compiles))))
    os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    return process


def answers(process: subprocess.Popen[str], limit_s: float) -> Iterator[Record]:
    """The plans that a process prints, one after the other. The process is ended after `limit_s` seconds."""
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    try:
        yield from (json.loads(line) for line in process.stdout or () if line.startswith("{"))
    finally:
        timer.cancel()
        process.kill()
        process.wait()


class Plan:
    """What a run is told of its memory while it goes on. Only rank 0 plans, and only under `train.plan`.

    Args:
        config, ranks: of the run.
        arrived: takes the plan in a line and the record of each rank, in a thread of its own.
        done: steps of an earlier start, which are not planned, since this one does not measure them.
    """

    def __init__(self, config: Config, ranks: Ranks, arrived: Callable[[str, list[Record]], None], done: int = 0) -> None:
        self.arrived, self.records = arrived, list[Record]()  # by rank; empty while there is no plan
        self.time: Record | None = None
        self.process: subprocess.Popen[str] | None = None
        if config.train.plan and ranks.is_main:
            try:
                self.process = start_process(config, ranks, "--done", str(done))
            except OSError:  # no room for another process: the run goes on without a plan
                return
            self.thread = threading.Thread(target=self.listen, args=(self.process,), name="plan", daemon=True)
            self.thread.start()

    def listen(self, process: subprocess.Popen[str]) -> None:
        """Takes the plan, if one comes: a process that fails prints none."""
        for answer in answers(process, LIMIT_S):
            self.records, self.time = answer["ranks"], answer["time"]
            self.arrived(sentence(self.records, self.time), self.records)

    def of_rank(self, rank: int) -> Record | None:
        return self.records[rank] if self.records else None

    def comparison(self, measured_gib: list[float], steps_s: Sequence[float] = (), growth: Growth | None = None) -> str:
        """Planned and measured peaks and time in a line, for a run that has ended; waits up to WAIT_S seconds for the plan.

        Args:
            growth: what this rank's microbatches left behind, if they did.
        """
        if self.process is not None:
            self.thread.join(WAIT_S)
            self.process.kill()
            self.thread.join()
        failed = self.process is not None and self.process.returncode > 0
        hint = "; `python -m loop.plan` with the same configuration shows why there is no plan" if failed else ""
        return comparison(peaks(self.records), measured_gib, growth) + time_comparison(self.time, steps_s) + hint


def peaks(records: list[Record]) -> list[float]:
    return [record["peak_gib"] for record in records]


def sentence(records: list[Record], time: Record | None = None) -> str:
    """The plan in a line."""
    held = ", ".join(f"{name} {gib:.2f}" for name, gib in records[0]["held_gib"].items() if gib >= 0.005)
    took = f"; {time['step_s']:.3g} s a step, {time['tokens_per_s']:,.0f} tokens/s" if time else ""
    return f"planned peak of tensors: {per_rank(peaks(records))} GiB; on rank 0 in the {records[0]['moment']}: {held}{took}"


def time_comparison(time: Record | None, steps_s: Sequence[float]) -> str:
    """Planned and median measured seconds of a step, without the first steps; on a CPU not while others keep it busy: if
    the last minute's load is above BUSY times the cores, of which a run takes all."""
    if time is None or len(steps_s) <= FIRST_STEPS:
        return ""
    measured = statistics.median(steps_s[FIRST_STEPS:])
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    off = f"{100 * (measured / time['step_s'] - 1):+.0f} %"
    if load > BUSY and time["on_cpu"]:
        off = f"not compared: the machine's load is {load:.1f} times its cores"
    return f"; a step: planned {time['step_s']:.3g} s, took {measured:.3g} s ({off})"


def comparison(planned_gib: list[float], measured_gib: list[float], growth: Growth | None = None) -> str:
    if not planned_gib:
        return f"peak of tensors: not planned, measured {per_rank(measured_gib)} GiB"
    if not all(measured_gib):
        return f"planned peak of tensors: {per_rank(planned_gib)} GiB; no step was measured"
    off = ", ".join(f"{100 * (measured / planned - 1):+.1f} %" for planned, measured in zip(planned_gib, measured_gib))
    # the plan runs this very loop, on three microbatches where stages do not wait for each other
    grows = f", both with the {growth.num_bytes / 2**20:,.1f} MiB that each microbatch leaves behind" if growth else ""
    return f"peak of tensors: planned {per_rank(planned_gib)} GiB, measured {per_rank(measured_gib)} GiB ({off}{grows})"


def per_rank(all_gib: list[float]) -> str:
    return ", ".join(f"{gib:.3g}" if gib < 1 else f"{gib:.2f}" for gib in all_gib)


def measured_gib(most_bytes: int, ranks: Ranks) -> list[float]:
    """GiB that tensors held at most, by rank; all ranks call this together."""
    bytes_R = torch.zeros(ranks.world_size, dtype=torch.float64, device=ranks.device)
    bytes_R[ranks.rank] = most_bytes
    return (ranks.all_reduce(bytes_R) / GIB).tolist()
