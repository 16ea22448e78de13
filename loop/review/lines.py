"""Appends JSON lines that the disk has once the call returns, and reads them back without one that a crash cut short.
Reads the whole file at each line: a review has some hundred lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data.files import sync


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one line and waits for the disk; removes what a crash left of the line before.

    Raises:
        OSError: the disk is full, for example; the file holds whole lines only.
    """
    with open(path, "a+b") as file:
        file.seek(0)
        whole_bytes = file.read().rfind(b"\n") + 1
        try:
            file.truncate(whole_bytes)
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole_bytes)
            raise
    if not whole_bytes:  # perhaps a new file
        sync(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; none where there is no file.

    Raises:
        ValueError: a line is no JSON object.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # behind the last line's end is nothing whole
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: found {line[:60]!r}, expected a JSON object. Restore the file, or move it away")
        records.append(record)
    return records
