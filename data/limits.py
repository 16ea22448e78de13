"""Bounds on what a file of rows, a chat template and YAML may take, so that neither can stop a run or fill the memory.
Costs a system call a row."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import BinaryIO, Callable, Iterator

import yaml

MAX_ROW_BYTES = 4 * 2**20  # of one line: 262,144 tokens are about 1 MB of English, and up to 2 MB of Chinese as \uXXXX
MAX_TURNS = 256  # assistant answers in a row; rendering so many takes 1 s, and the time grows with their square
MAX_RENDERED = 2**24  # characters of a row times its turns: the prompt of every turn repeats what was said before
RENDER_S = 5.0  # CPU time for all prompts of one row
DEEPEST = 10  # YAML's sections and lists within each other; PyYAML's parser in C overflows its stack at some ten thousand


class TooSlow(Exception):
    """`time_limit` has run out."""


def bounded_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Each line and its number of bytes; of a line with more than MAX_ROW_BYTES only the beginning."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        num_bytes, rest = len(line), line
        while num_bytes > MAX_ROW_BYTES and rest and not rest.endswith(b"\n"):
            rest = file.readline(2**20)
            num_bytes += len(rest)
        yield line, num_bytes


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[[], object]]:
    """Raises TooSlow in the block when this process has computed for `seconds`, however busy the machine is.

    The block is given a function that starts the time anew. Works for what is written in Python, such as templates. Outside
    the main thread, which alone gets signals, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    handler = signal.signal(signal.SIGPROF, stop)
    start = partial(signal.setitimer, signal.ITIMER_PROF, seconds, 1.0)  # then each second, should the block catch TooSlow
    timer = start()
    try:
        yield start
    finally:
        signal.setitimer(signal.ITIMER_PROF, *timer)
        signal.signal(signal.SIGPROF, handler or signal.SIG_DFL)


def check_nesting(text: str) -> None:
    """Reads YAML event by event, without recursion.

    Raises:
        ValueError: the YAML is nested too deep, or has aliases, with which a few lines can describe more than memory holds.
    """
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 0
        if depth > DEEPEST:
            raise ValueError(f"line {line} is nested more than {DEEPEST} deep, expected sections with their settings")
        if depth == 0 and isinstance(event, yaml.ScalarEvent):
            raise ValueError(f"expected sections such as model: and train:, found {event.value[:80]!r}")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line} has an alias, *{event.anchor}, which is not supported: write the value itself")
