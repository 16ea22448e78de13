"""Reads regular files only, and writes files that are whole whatever happens: a crash, a full disk or a power cut leaves the
old file or the new one. Costs a wait for the disk a file."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from io import BufferedReader
from pathlib import Path
from typing import Callable


def open_regular(path: str | Path, expected: str) -> BufferedReader:
    """Opens a file for reading. A named pipe would wait for a writer, and a device such as /dev/zero never ends.

    Raises:
        ValueError: the file is missing, may not be read, or is no regular file; ends with what was `expected`.
    """
    try:
        file = open(Path(path).expanduser(), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}. Expected {expected}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path}: not a regular file, but a pipe, a device or a socket. Expected {expected}")
    return file


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` write a file of that name in a directory of its own, waits until the disk has the file, and moves it to
    `path` in one step. What was at `path` before stays there until then.

    Raises:
        OSError: also what `write` raises; `path` is as it was.
    """
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        file = partial / path.name
        write(file)
        make_readable(file)
        sync(file)
        file.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk names no file
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole, as `write_whole` does."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def partial_of(path: Path) -> Path:
    """The directory in which something is written before it is moved to `path`."""
    return path.with_name(f".{path.name}.partial")


def clear_partial(directory: Path) -> None:
    """Removes what writers that were killed left in a directory."""
    for leftover in directory.glob(".*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def make_readable(file: Path) -> None:
    """Gives a file the access that the user's umask grants: safetensors makes files that only their owner can read."""
    beside = file.with_name(f"{file.name}.mode")
    beside.touch()
    file.chmod(stat.S_IMODE(beside.stat().st_mode))
    beside.unlink()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until the disk has the contents of a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
