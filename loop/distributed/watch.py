"""Ends this process with a message when another rank does not answer in time or has died.
Costs one thread that sleeps nearly all the time."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator

from torch import AcceleratorError
from torch.distributed import DistError

from loop.errors import FAILED, end_process, is_out_of_memory

INTERVAL_S = 0.5
SPARE_S = 10  # of the timeout, at most half, is left to the launcher to end the other ranks
REMEDY = "The same command continues from the newest checkpoint"


class Watch:
    """Ends the process with one line if this rank waits for other ranks longer than the limit.

    All ranks that wait for a rank that hangs end in this way. A rank that died is noticed sooner, when its connection closes.
    Only the reason that comes first is printed.
    """

    def __init__(self) -> None:
        self.name, self.limit_s, self.is_main = "", 0.0, True
        self.awaited: Callable[[], str] | None = None  # says what this rank waits for; None while the rank computes
        self.since = 0.0  # when the rank began to wait
        self.queued = False  # whether the message is only queued on a GPU, while this process goes on
        self.ending = threading.Lock()  # kept by the thread that ends the process, so that only its reason is printed

    def start(self, name: str, timeout_s: int, is_main: bool) -> None:
        """Starts the watching thread.

        Args:
            name: of this rank, such as "rank 1 (stage 1)".
            timeout_s: seconds after which the whole run must have ended.
        """
        self.name, self.limit_s, self.is_main = name, max(timeout_s - SPARE_S, timeout_s / 2), is_main
        threading.Thread(target=self.run, name="watch", daemon=True).start()

    def run(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            if self.awaited is not None and time.monotonic() - self.since > self.limit_s:
                self.end(f"no answer in {self.limit_s:.0f} s (see distributed.timeout_s)")

    def begin(self, awaited: Callable[[], str], queued: bool = False) -> None:
        """Notes that this rank waits from now on; a second call begins another wait."""
        self.since, self.queued = time.monotonic(), queued
        self.awaited = awaited

    def done(self) -> None:
        """Notes that this rank computes again."""
        self.awaited = None

    @contextmanager
    def waiting(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Notes that this rank waits for `what` inside the block; an error in the block ends the process."""
        self.begin(what if callable(what) else lambda: str(what))
        with self.ends_when_peers_are_gone():
            yield
        self.done()

    @contextmanager
    def ends_when_peers_are_gone(self) -> Iterator[None]:
        """Ends the process on an error that is raised while this rank waits; other errors pass through. While a message is
        queued, this process computes, and only errors of torch.distributed are about the message."""
        try:
            yield
        except RuntimeError as error:
            if self.awaited is None or not self.name or is_out_of_memory(error) or isinstance(error, AcceleratorError):
                raise  # an error of this rank's own GPU may show in any wait
            if self.queued and not isinstance(error, DistError):
                raise
            self.end("the connection is gone")

    def sentence(self) -> str:
        """What this rank waits for, or that it computes. Raises where a GPU that is asked answers with an error."""
        awaited = self.awaited  # another thread may set it to None
        return f"{self.name or 'the run'} " + (f"waited for {awaited()}" if awaited is not None else "was computing")

    def end(self, reason: str) -> None:
        """Prints one line and ends the process at once, without cleaning up: cleaning up would wait for the other ranks."""
        with self.ending:
            end_process(FAILED, lambda: f"{self.sentence()}: {reason}. {REMEDY}")
