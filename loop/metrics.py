"""Writes what people and programs read about a run: console lines, log, progress bars, metrics.jsonl, memory.jsonl, pictures.
Only rank 0 writes, except the trace of a step; the pictures are drawn by a process beside the run, and once more at its end."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Iterable, Sequence, TextIO

import torch
from tqdm import tqdm

from data.batches import StepBatch
from loop.curves import draw_pictures
from loop.distributed.groups import Ranks
from loop.errors import ROOT
from loop.line_file import MEMORY_FILE, METRICS_FILE, SAMPLES_FILE, LineFile, read_metrics
from loop.memory.phases import GIB, Memory, peak_gib
from loop.memory.trace import write_page, write_snapshot
from loop.tensorboard import TensorBoard

DRAW_EVERY_S = 30
TREND_STEPS = 10
DRAWN_WITHIN_S = 60  # pictures for which the end of a run waits


Marks = dict[str, dict[str, float]]  # by phase, see `Memory.marks`


class LoadingBar(tqdm):
    """Shows how much of the weights was read, how fast, and the peak memory so far."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        super().__init__(desc="loading", unit="B", unit_scale=True, disable=None if enabled else True, leave=False)
        self.device = device

    def advance(self, num_bytes: int, total: int) -> None:
        self.total = total
        self.set_postfix_str(f"peak {peak_gib(self.device):.2f} GiB", refresh=False)
        self.update(num_bytes)


class RunLog:
    """Writes one run's lines and files.

    Args:
        run_dir: where metrics.jsonl, memory.jsonl, curves.png and memory.png are written.
        log_path: a file to which the console's lines are appended with time stamps.
        device: this rank's.
        enabled: False on every rank but 0.
        log_to: where else the numbers of metrics.jsonl are shown.
        stage: this rank's, in the first replica; what another stage than 0 piles up is printed by its own rank.
    """

    def __init__(
        self, run_dir: Path, log_path: str, device: torch.device, enabled: bool, log_to: str | None = None, stage: int = 0
    ) -> None:
        self.run_dir, self.enabled, self.log_to, self.stage = run_dir, enabled, log_to, stage
        self.board: TensorBoard | None = None
        self.bar: tqdm | None = None
        self.files: dict[str, LineFile] = {}  # by name; open from `start` on
        self.memory_kind = "allocated" if device.type == "cuda" else "resident"
        self.began = time.monotonic(), 0  # when the first step of this process began, and how many were done before
        self.losses: deque[float] = deque(maxlen=2 * TREND_STEPS)  # of the last steps
        self.planned_kinds: dict[str, float] | None = None  # GiB by kind of layer at rank 0's planned peak
        self.planned_gib: list[float] = []  # peak by rank; empty while it is not known
        self.steps_s: list[float] = []  # how long each step of this process took
        self.drawn_at = time.monotonic()
        self.drawing: subprocess.Popen[str] | None = None  # draws the pictures
        self.not_drawn = ""  # what was said last of pictures that could not be drawn
        self.log_file: TextIO | None = None
        if enabled:
            try:
                self.log_file = open(log_path, "a", encoding="utf-8")
            except OSError as error:
                self.say(f"no log is written: {log_path}: {error.strerror}. Choose another place with log=FILE")

    def say(self, line: str, on_bar: bool = False) -> None:
        """Prints one line, and appends the line to the log.

        Args:
            on_bar: the progress bar shows it too, so that it is printed only where there is none, away from a terminal.
        """
        if not self.enabled:
            return
        with suppress(OSError):  # whoever reads the output has ended; the log and the run go on
            if not on_bar or self.bar is None or self.bar.disable:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
        if self.log_file:
            try:
                self.log_file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
                self.log_file.flush()
            except OSError as error:  # a full disk must not end the training
                failed, self.log_file = self.log_file.name, None
                self.say(f"the log ends here: {failed}: {error.strerror}")

    def planned(self, line: str, records: list[dict[str, Any]]) -> None:
        """Takes the plan of memory when it arrives: one line, and a record of each rank (see loop/planned.py)."""
        self.say(line)
        self.planned_kinds = records[0]["kinds_gib"]  # the other ranks know no plan
        if self.memory_kind == "allocated":  # the plan counts tensors, but on the CPU memory.png shows the resident size
            self.planned_gib = [record["peak_gib"] for record in records]

    def start(self, done: int, total: int, evaluated: bool = True) -> None:
        """Opens the progress bar, metrics.jsonl and memory.jsonl, from which the lines after step `done` are removed, and those
        of the evaluation after it unless `evaluated`."""
        self.began = time.monotonic(), done
        if self.enabled:
            for name in (METRICS_FILE, MEMORY_FILE, *[SAMPLES_FILE] * (self.run_dir / SAMPLES_FILE).exists()):
                self.open(name, done, evaluated)
            if self.log_to == "tensorboard":
                self.board = TensorBoard(self.run_dir, read_metrics(self.run_dir / METRICS_FILE), self.say)
            self.bar = tqdm(total=total, initial=done, unit="step", disable=not has_columns(), dynamic_ncols=True)

    def open(self, name: str, done: int, evaluated: bool) -> None:
        self.files[name] = LineFile(self.run_dir / name, self.say)
        self.files[name].cut_back(done, evaluated)

    def append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        if name in self.files:
            self.files[name].append([json.dumps(record) + "\n" for record in records])

    def record(self, values: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl; numbers are not rounded, and are null where they are not finite."""
        record = json.loads(json.dumps(values), parse_constant=lambda _: None)
        self.append(METRICS_FILE, [record])
        if self.board is not None:
            self.board.record(record)

    def step(
        self, batch: StepBatch, total: int, *, loss: float, lr: float, grad_norm: float, skipped: bool, step_s: float,
        memory: Memory, marks: list[Marks],
    ) -> None:
        """Records one optimizer step and its memory. On a terminal the bar shows it, elsewhere a line."""
        peaks = [max((phase["peak_gib"] for phase in by_phase.values()), default=0.0) for by_phase in marks] or [0.0]
        self.steps_s.append(step_s)
        counted = {"tensors_gib": memory.most_bytes / GIB} if self.memory_kind == "resident" else {}
        self.record({
            "step": batch.step, "epoch": batch.epoch, "loss": loss, "lr": lr, "grad_norm": grad_norm, "skipped": skipped,
            "rows": batch.num_rows, "tokens": batch.num_tokens, "supervised_tokens": batch.num_supervised_tokens,
            "microbatches": len(batch.lines_by_slot), "microbatch_length": batch.length,
            "step_s": step_s, "tokens_per_s": batch.num_tokens / step_s, "peak_gib": max(peaks), **counted,
        })
        self.memory(batch.step, marks)
        self.losses.append(loss)
        tensors = f"tensors {counted['tensors_gib']:.3g} GiB, process " if counted else ""
        fullest = f" on rank {peaks.index(max(peaks))}" if len(peaks) > 1 else ""
        shown = (f"loss {loss:.4f}{trend(self.losses)}  {batch.num_tokens / step_s:,.0f} tokens/s  "
                 f"{tensors}{max(peaks):.2f} GiB{fullest}")
        seconds_left = (time.monotonic() - self.began[0]) / max(batch.step - self.began[1], 1) * (total - batch.step)
        self.say(f"step {batch.step}/{total}  {shown}  {duration(seconds_left)} left", on_bar=True)
        if news := memory.growth.news():
            self.say(news)
            if self.stage:
                with suppress(OSError):  # nobody reads
                    print(f"stage {self.stage}: {news}", flush=True)
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            with suppress(OSError):  # the terminal was closed
                self.bar.update(1)

    def memory(self, step: int, marks: Iterable[Marks]) -> None:
        """Appends one line a rank to memory.jsonl: the memory in each phase since the rank's last line (see `Memory.marks`).

        An evaluation has lines of its own. The first lines after a start also have the memory of building and loading.
        """
        self.append(MEMORY_FILE, ({"step": step, "rank": rank, **by_phase} for rank, by_phase in enumerate(marks)))

    def eval(
        self, step: int, loss: float, by_source: dict[str, float], marks: Iterable[Marks] = ()
    ) -> None:
        """Records one evaluation and its memory, and has the pictures drawn if they are older than 30 s."""
        self.memory(step, marks)
        self.record({"step": step, "eval_loss": loss, "eval_loss_by_source": by_source})
        sources = "" if len(by_source) < 2 else "  " + "  ".join(f"{name} {value:.4f}" for name, value in by_source.items())
        self.say(f"step {step}  eval loss {loss:.4f}{sources}")
        if time.monotonic() - self.drawn_at > DRAW_EVERY_S:
            self.draw_pictures()

    def samples(self, records: list[dict[str, Any]]) -> None:
        """Appends what the model wrote to samples.jsonl, and shows the answer to the first row."""
        if SAMPLES_FILE not in self.files:
            self.open(SAMPLES_FILE, 0, evaluated=True)
        self.append(SAMPLES_FILE, records)
        shown = records[0]
        answer = " ".join(shown["answer"].split()) or "(no words)"
        self.say(f"step {shown['step']}  answer to held-out line {shown['line']}: {answer}")

    def draw_pictures(self) -> None:
        """Has curves.png and memory.png drawn by a process beside this one: a thread would keep Python from the loop."""
        if METRICS_FILE in self.files and (self.drawing is None or self.drawing.poll() is not None):
            self.drawn()
            command = [sys.executable, "-m", "loop.curves", str(self.run_dir.resolve()), self.memory_kind, str(os.getpid())]
            with suppress(OSError):  # no room for another process: they are drawn at the end
                self.drawing = subprocess.Popen([*command, *map(str, self.planned_gib)], cwd=ROOT, text=True,
                                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self.drawn_at = time.monotonic()

    def drawn(self) -> None:
        """Waits for the process that draws, and says why it could not."""
        if self.drawing is not None:
            try:
                self.say_not_drawn(self.drawing.communicate(timeout=DRAWN_WITHIN_S)[0].strip())
            except subprocess.TimeoutExpired:
                self.drawing.kill()
            self.drawing = None

    def say_not_drawn(self, why: str) -> None:
        if why not in ("", self.not_drawn):
            self.not_drawn = why
            self.say(why)

    def sync(self) -> None:
        """Waits until metrics.jsonl and memory.jsonl are on the disk.

        Raises:
            ValueError: the disk does not take them.
        """
        for file in self.files.values():
            file.sync()

    def is_lost(self) -> bool:
        """Whether the run's directory was removed or renamed while its files were written."""
        return any(file.is_lost() for file in self.files.values())

    def trace(self, step: int, memory: Memory, ranks: Ranks) -> None:
        """Writes the page of every allocation of a step, on every rank; on CUDA also the allocator's own record."""
        assert memory.traced is not None
        path = self.run_dir / f"memory-step-{step}-rank-{ranks.rank}.html"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_page(memory.traced, path, f"{self.run_dir.name}, step {step}, rank {ranks.rank}", self.planned_kinds)
            write_snapshot(path.with_suffix(".pickle"))
            self.say(f"every allocation of this step: {path}")
        except OSError as error:  # a full disk must not end the training
            self.say(f"{path} is not written: {error.strerror}")
        memory.traced = None

    def close(self) -> None:
        self.drawn()
        if METRICS_FILE in self.files:
            self.say_not_drawn(draw_pictures(self.run_dir, self.memory_kind, self.planned_gib))
        for closing in (self.board, self.bar, *self.files.values(), self.log_file):
            if closing is not None:
                closing.close()


def has_columns() -> bool:
    """Whether a bar can be seen: some terminals do not tell how wide they are, and tqdm then draws nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def trend(losses: Sequence[float]) -> str:
    """By how much the mean of the last steps differs from that of as many before them; "" while there are less than four."""
    half = len(losses) // 2
    if half < 2:
        return ""
    change = statistics.fmean(list(losses)[-half:]) - statistics.fmean(list(losses)[-2 * half : -half])
    return f" ({change:+.3f} in {half} steps)"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
