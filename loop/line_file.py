"""Files of a run that grow by whole lines of JSON, such as metrics.jsonl: written whatever the disk does, read whatever a crash
leaves. Costs nothing beside the lines that wait for room on a full disk."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

from data.files import write_text

LOCK = ".lock"  # in the directory of each run; held by the process that trains there
METRICS_FILE, MEMORY_FILE, SAMPLES_FILE = "metrics.jsonl", "memory.jsonl", "samples.jsonl"
EVALUATION = {"eval_loss", "stage_busy_s", "eval", "answer"}  # keys of lines that an evaluation writes


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl or memory.jsonl; leaves out lines that are damaged, such as a last one that a crash cut short."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line.strip(b"\0"))  # a power cut may leave a hole of zero bytes
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


class LineFile:
    """A file that grows by whole lines. Lines that a full disk refuses are kept, and written with the next ones."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.waiting: list[str] = []  # lines that could not be written yet

    def cut_back(self, step: int, evaluated: bool) -> None:
        """Opens the file; keeps its lines up to `step`, without the evaluation after that step unless `evaluated`, and none
        for a run from step 0."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step] if step and self.path.exists() else []
        if not evaluated:
            kept = [record for record in kept if record["step"] < step or not record.keys() & EVALUATION]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.number = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.size = os.fstat(self.number).st_size

    def append(self, lines: list[str]) -> None:
        self.waiting += lines
        data = "".join(self.waiting).encode()
        try:
            while data:
                data = data[os.write(self.number, data) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.number, self.size)  # no part of a line stays
            if len(self.waiting) == len(lines):
                self.say(f"{self.path}: {error.strerror}. Its lines wait until there is room; the next checkpoint needs them")
            return
        if len(self.waiting) > len(lines):
            self.say(f"{self.path}: all lines are written again")
        self.waiting, self.size = [], os.fstat(self.number).st_size

    def sync(self) -> None:
        if self.waiting:
            self.append([])
        if self.waiting:
            raise ValueError(f"{self.path}: {len(self.waiting)} lines could not be written, and a checkpoint relies on them. "
                             "Make room and give the same command again: it continues from the newest checkpoint")
        os.fsync(self.number)

    def is_lost(self) -> bool:
        """Whether another file, or none, is at this path now."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.number))
        except FileNotFoundError:
            return True

    def close(self) -> None:
        os.close(self.number)
