"""Says what this rank waits for when it waits too long, when the peer is gone, and when it is told to stop.
One thread, asleep but for a moment every second."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator

from loop.errors import is_out_of_memory

INTERVAL_S = 0.5
SHUTDOWN_S = 10  # of the timeout, at most half, is left to the launcher to end the other ranks


class Watch:
    """Ends the process with one line if it waits for its peers longer than it may.

    A peer that hangs is thus found by all that wait for it. One that died is found at once: the connection closes, or
    the launcher, which sees the death first, sends SIGTERM. Whichever comes first is said, and only that.
    """

    def __init__(self) -> None:
        self.name, self.limit_s = "", 0.0
        self.describe: Callable[[], str] | None = None  # what is waited for, while it is
        self.since = 0.0
        self.lock = threading.Lock()

    def start(self, name: str, timeout_s: int) -> None:
        """From now on; to be called in the main thread.

        Args:
            name: of this rank, such as "rank 1 (stage 1)".
            timeout_s: after which the whole run is to be down.
        """
        self.name, self.limit_s = name, max(timeout_s - SHUTDOWN_S, timeout_s / 2)
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)  # a signal reaches the thread even while the main one is inside a collective
        signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=self.run, args=(woken,), name="watch", daemon=True).start()

    def run(self, woken: int) -> None:
        while True:
            readable, _, _ = select.select([woken], [], [], INTERVAL_S)
            if readable and signal.SIGTERM in os.read(woken, 64):
                self.end("told to stop", status=128 + signal.SIGTERM)
            if self.describe is not None and time.monotonic() - self.since > self.limit_s:
                self.end(f"no answer in {self.limit_s:.0f} s (see distributed.timeout_s)")

    def begin(self, describe: Callable[[], str]) -> None:
        """The rank begins to wait, or goes on to wait for something else."""
        self.since = time.monotonic()
        self.describe = describe

    def done(self) -> None:
        """The rank computes again."""
        self.describe = None

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Marks a wait that is one block; an error in it means that a peer is gone."""
        self.begin(lambda: what)
        with self.ends_when_peers_are_gone():
            yield
        self.done()

    @contextmanager
    def ends_when_peers_are_gone(self) -> Iterator[None]:
        """While this rank waits, an error of the network ends it; whatever it raises while it computes goes through."""
        try:
            yield
        except RuntimeError as error:
            if self.describe is None or not self.name or is_out_of_memory(error):
                raise
            self.end("the connection is gone")

    def end(self, reason: str, status: int = 1) -> None:
        """Prints the one line and ends the process at once: what would clean up would wait for the peer, too."""
        with self.lock:  # the first reason is the one that counts
            describe = self.describe
            if describe is not None:
                sys.stderr.write(f"error: {self.name} waited for {describe()}: {reason}\n")
                sys.stderr.flush()
            os._exit(status)
