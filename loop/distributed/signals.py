"""Stops a run on SIGINT, SIGTERM or SIGHUP: all ranks agree on the last finished step, save it, and end, while their main
threads compute or hang in a collective. Costs two sleeping threads; a stop costs what a checkpoint costs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist

from loop.distributed.watch import Watch
from loop.errors import FAILED, STOPPING, heeded, record_exit

SAME_S = 3.0  # Ctrl-C reaches a rank twice, from the terminal and from its launcher: signals so close are one
UNANSWERED_S = 3.0  # then a rank says what it waits for: after a failure, launch.py leaves the other ranks 5 s
LIMIT_S = 25.0  # torchrun kills its ranks 30 s after a signal
KEY = "stop"  # in the store that all ranks share


class Turns:
    """What the main thread does not let itself be interrupted in: the update of step n, with its records, is turn 2 n, the
    checkpoint of step n is turn 2 n + 1. Between turns, adapters and optimizer hold exactly the last finished step."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.begun = self.ended = 1
        self.last: int | None = None  # the turn after which the main thread waits for ever; None: it goes on

    def begin(self, turn: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.last is None or turn <= self.last)
            self.begun = turn

    def end(self, turn: int) -> None:
        with self.changed:
            self.ended = turn
            self.changed.notify_all()

    def stop_after(self, turn: int | None = None) -> int:
        """Lets the main thread begin no turn after `turn`, or after the one it has begun last; returns the latter."""
        with self.changed:
            self.last = self.begun if turn is None else turn
            self.changed.notify_all()
            return self.begun

    def wait_for(self, turn: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.ended >= turn)


class Signals:
    """Hears signals in a thread of its own, and stops the run in another.

    Without `save`, training has not begun, and there is nothing to save. A rank on which the signal does not arrive hears of
    it through the store; a rank that does not answer, or has died, leaves the others without a new checkpoint.
    """

    def __init__(self) -> None:
        self.turns = Turns()
        self.save: Callable[[int], str] | None = None  # saves the step, on all ranks together, and says what was done
        self.updated: Any = None  # on a GPU, what the last update has recorded: it may still be computing
        self.watch, self.store, self.group = Watch(), None, None  # type: Watch, Any, dist.ProcessGroup | None
        self.stopped_at: float | None = None
        self.lock = threading.Lock()

    def listen(self, watch: Watch) -> None:
        """Must be called in the main thread."""
        self.watch = watch
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # wakes the thread even if the main thread is in a collective
        for number in heeded():
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self.hear, args=(woken,), name="signals", daemon=True).start()

    def listen_no_more(self) -> None:
        """Gives signals back their usual effect, after a run."""
        signal.set_wakeup_fd(-1)
        for number in heeded():
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def connect(self, store: Any, group: dist.ProcessGroup) -> None:
        """Lets a signal to one rank stop all.

        Args:
            store: of all ranks.
            group: all ranks, on the CPU, for nothing else.
        """
        self.store, self.group = store.clone(), group
        threading.Thread(target=self.hear_others, args=(store.clone(),), name="other ranks' signals", daemon=True).start()

    # The main thread's part

    def update_begins(self, step: int) -> None:
        """Waits for ever when the run stops at the step before."""
        self.turns.begin(2 * step)

    def step_ends(self, step: int) -> None:
        if torch.cuda.is_initialized():
            self.updated = torch.cuda.current_stream().record_event()
        self.turns.end(2 * step)

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        self.turns.begin(2 * step + 1)
        yield
        self.turns.end(2 * step + 1)

    # The threads' part

    def hear(self, woken: int) -> None:
        while True:
            for number in os.read(woken, 64):
                if number in STOPPING:
                    name = signal.Signals(number).name
                    if self.stopped_at is not None and time.monotonic() - self.stopped_at > SAME_S:
                        os.write(2, f"stopped at once by a second signal, {name}\n".encode())
                        os._exit(128 + number)
                    self.stop(name, 128 + number)

    def hear_others(self, store: Any) -> None:
        with suppress(RuntimeError):  # the store is gone with its process; whoever waits for a rank notices
            store.wait([KEY], timedelta(days=999))
            status, _, reason = store.get(KEY).decode().partition(" ")
            self.stop(reason, int(status))

    def stop(self, reason: str, status: int) -> None:
        """Begins to stop the run on all ranks; returns at once."""
        with self.lock:
            if self.stopped_at is None:
                self.stopped_at = time.monotonic()
                threading.Thread(target=self.save_and_leave, args=(reason, status), name="stop", daemon=True).start()

    def save_and_leave(self, reason: str, status: int) -> None:
        self.watch.lock.acquire()  # no other reason ends this process from now on
        threading.Timer(LIMIT_S, self.give_up, (reason, f"not finished within {LIMIT_S:.0f} s")).start()
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.set(KEY, f"{status} {reason}" + (f" on {self.watch.name}" if " on " not in reason else ""))
        unanswered = threading.Timer(UNANSWERED_S, self.say_unanswered, (reason,))
        unanswered.start()
        try:
            said = self.save_last_step(unanswered)
            self.together(torch.zeros(1))  # a rank that left earlier would make the launcher end the others
        except ValueError as error:  # such as a full disk
            self.give_up(reason, str(error))
        except (RuntimeError, OSError):  # a rank that this one needs is gone
            self.give_up(reason, "another rank has ended or does not answer")
        record_exit(status, f"stopped by {reason}: {said}")
        if self.watch.is_main:
            print(f"stopped by {reason}: {said}", flush=True)
        os._exit(status)

    def save_last_step(self, unanswered: threading.Timer) -> str:
        begun = self.turns.stop_after()
        begun, is_unready = self.together(torch.tensor([begun, self.save is None]))
        unanswered.cancel()
        if is_unready or begun < 2 or self.save is None:
            return "nothing was trained yet"
        self.turns.stop_after(begun)
        self.turns.wait_for(begun)
        step, is_saved = divmod(begun, 2)
        if is_saved:
            return f"step {step} was saved already. The same command continues from there"
        while self.updated is not None and not self.updated.query():
            time.sleep(0.01)
        # the current stream may wait behind a kernel that hangs
        with torch.cuda.stream(torch.cuda.Stream(self.updated.device)) if self.updated is not None else nullcontext():
            return f"{self.save(step)}. The same command continues from there"

    def together(self, values: torch.Tensor) -> list[int]:
        """The greatest value on any rank."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return [int(value) for value in values]

    def say_unanswered(self, reason: str) -> None:
        said = f"{self.watch.sentence()}: stopped by {reason}, but other ranks do not answer"
        print(f"error: {said}", file=sys.stderr, flush=True)

    def give_up(self, reason: str, why: str) -> None:
        message = f"{self.watch.sentence()}: stopped by {reason}, and its last steps were not saved: {why}"
        record_exit(FAILED, message)
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(FAILED)
