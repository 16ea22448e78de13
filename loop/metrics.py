"""Everything a person or a machine reads about a run: console lines, progress bar, metrics.jsonl and memory.jsonl, their
pictures, the log. Rank 0 writes; on other ranks every call does nothing."""

from __future__ import annotations

import json
import math
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Iterable, TextIO

import torch
from tqdm import tqdm

from loop.memory import peak_gib


class LoadingBar(tqdm):
    """How much of the weights was read, how fast, and the peak memory so far."""

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
        run_dir: where metrics.jsonl, memory.jsonl, curves.png and memory.png go.
        log_path: the console's lines with time stamps, appended.
        enabled: False on every rank but 0.
    """

    def __init__(self, run_dir: Path, log_path: str, enabled: bool) -> None:
        self.run_dir, self.enabled = run_dir, enabled
        self.bar: tqdm | None = None
        self.metrics: TextIO | None = None
        self.memory_file: TextIO | None = None
        self.memory_kind, self.planned_gib = "memory", list[float]()
        self.log_file: TextIO | None = None
        self.no_curves = False
        if enabled:
            try:
                self.log_file = open(log_path, "a", encoding="utf-8")
            except OSError as error:
                self.say(f"no log is written: {log_path}: {error.strerror}. Choose another place with log=FILE")

    def say(self, line: str) -> None:
        """One line for the person at the console."""
        if not self.enabled:
            return
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        if self.log_file:
            try:
                self.log_file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
                self.log_file.flush()
            except OSError as error:  # training is worth more than its log
                failed, self.log_file = self.log_file.name, None
                self.say(f"the log ends here: {failed}: {error.strerror}")

    def plan(self, planned_gib: list[float], device: torch.device) -> None:
        """The peak that each rank is to have, for memory.png; not on the CPU, where what is drawn is another quantity."""
        on_gpu = device.type == "cuda"
        self.memory_kind, self.planned_gib = ("allocated", planned_gib) if on_gpu else ("resident", [])

    def start(self, done: int, total: int) -> None:
        """Opens metrics.jsonl and memory.jsonl, cut back to the step the run continues from, and the progress bar."""
        if self.enabled:
            self.metrics = open_cut_back(self.run_dir / "metrics.jsonl", done)
            self.memory_file = open_cut_back(self.run_dir / "memory.jsonl", done)
            self.bar = tqdm(total=total, initial=done, unit="step", disable=None, dynamic_ncols=True)

    def record(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; numbers are not rounded, and null where they are not finite."""
        if self.metrics:
            self.metrics.write(json.dumps(finite(values)) + "\n")
            self.metrics.flush()

    def step(self, total: int, values: dict[str, Any]) -> None:
        """One optimizer step."""
        self.record(values)
        self.say(
            f"step {values['step']}/{total}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad norm {values['grad_norm']:.3f}  {values['tokens_per_s']:,.0f} tokens/s  {values['peak_gib']:.2f} GiB"
        )
        if self.bar is not None:
            self.bar.update(1)

    def memory(self, step: int, marks: Iterable[dict[str, dict[str, float]]]) -> None:
        """One line of memory.jsonl a rank: what it had in each phase since its line before (see `Memory.marks`).

        An evaluation has a line of its own. What building and loading took stands in the first line after a start.
        """
        if self.memory_file:
            self.memory_file.writelines(
                json.dumps({"step": step, "rank": rank, **by_phase}) + "\n" for rank, by_phase in enumerate(marks))
            self.memory_file.flush()

    def eval(
        self, step: int, loss: float, by_source: dict[str, float], marks: Iterable[dict[str, dict[str, float]]] = ()
    ) -> None:
        """One evaluation, and what memory it took; also refreshes the pictures."""
        self.memory(step, marks)
        self.record({"step": step, "eval_loss": loss, "eval_loss_by_source": by_source})
        sources = "" if len(by_source) < 2 else "  " + "  ".join(f"{name} {value:.4f}" for name, value in by_source.items())
        self.say(f"step {step}  eval loss {loss:.4f}{sources}")
        if self.enabled:
            self.draw_pictures()

    def draw_pictures(self) -> None:
        try:
            from loop.curves import draw_curves, draw_memory
        except ImportError:
            if not self.no_curves:
                self.say("curves.png and memory.png are not drawn: matplotlib is missing (pip install matplotlib)")
            self.no_curves = True
            return
        name, metrics, memory = self.run_dir.name, self.run_dir / "metrics.jsonl", self.run_dir / "memory.jsonl"
        try:
            draw_curves(read_metrics(metrics), self.run_dir / "curves.png", name)
            draw_memory(read_metrics(memory), self.run_dir / "memory.png", name, self.memory_kind, self.planned_gib)
        except OSError as error:
            self.say(f"{self.run_dir}: the pictures are not drawn: {error.strerror}")

    def sync(self) -> None:
        """Puts metrics.jsonl and memory.jsonl on the disk, before a checkpoint that relies on them."""
        for file in (self.metrics, self.memory_file):
            if file:
                os.fsync(file.fileno())

    def close(self) -> None:
        for closing in (self.bar, self.metrics, self.memory_file, self.log_file):
            if closing is not None:
                closing.close()


def finite(value: Any) -> Any:
    """The same with null for what JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or memory.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def cut_back(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; a run from step 0 starts with an empty file."""
    kept = [record for record in read_metrics(path) if 0 < step >= record["step"]] if path.exists() else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    partial.replace(path)


def open_cut_back(path: Path, step: int) -> TextIO:
    """The same, open for the lines to come."""
    cut_back(path, step)
    return open(path, "a", encoding="utf-8")
