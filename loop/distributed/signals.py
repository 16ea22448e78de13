"""Stops a run on SIGINT, SIGTERM or SIGHUP: all ranks agree on the last finished step, save it, and end, while their main
threads compute or hang in a collective. Costs two sleeping threads; a stop costs what a checkpoint costs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist

from loop.distributed.watch import REMEDY, Watch
from loop.errors import FAILED, FOR_USER, STOPPING, UNFINISHED, end_process, heeded, name_of, record_exit

SAME_S = 3.0  # signals so close count as one: batch systems signal a rank and its launcher, which passes the signal on
POLL_S = 0.5
UNANSWERED_S = 3.0  # after so long a rank says which rank it waits for
LIMIT_S = 25.0  # launchers kill their ranks 30 s after a signal
KEY = "stop"  # in the store that all ranks share


class Turns:
    """Parts of the main thread's work that are not interrupted: turn 2 n is the update of step n, with its records, turn
    2 n + 1 the checkpoint of step n. Between two turns adapters and optimizer are those of the last finished step."""

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

    def hold(self) -> int:
        """Lets the main thread begin no further turn; returns the turn that it has begun last."""
        with self.changed:
            self.last = self.begun
            return self.begun

    def finish(self, turn: int) -> None:
        """Lets the main thread go on to the end of a turn, and waits for it."""
        with self.changed:
            self.last = turn
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.ended >= turn)


class Signals:
    """Hears signals in a thread of its own, and stops the run in another.

    Without `save`, training has not begun, and there is nothing to save. A rank on which the signal does not arrive hears of
    it through the store; a rank that does not answer, or has died, leaves the others without a new checkpoint.
    """

    def __init__(self) -> None:
        self.turns = Turns()
        # saves the step, on all ranks together, or waits until the save that has begun is done; says what was done
        self.save: Callable[[int, bool], str] | None = None
        self.updated: Any = None  # on a GPU, what the last update has recorded: it may still be computing
        self.watch, self.store, self.group = Watch(), None, None  # type: Watch, Any, dist.ProcessGroup | None
        self.others: threading.Thread | None = None  # waits for other ranks' signals
        self.before: dict[int, Any] = {}  # handlers, by signal
        self.stopped_at: float | None = None
        self.has_ended = threading.Event()  # set when the run no longer listens
        self.is_finished = False  # whether all is saved that the run was to train
        self.lock = threading.Lock()

    def listen(self, watch: Watch) -> None:
        """Must be called in the main thread."""
        self.watch = watch
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # wakes the thread even if the main thread is in a collective
        for number in heeded():
            self.before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self.read_signals, args=(woken,), name="signals", daemon=True).start()

    def listen_no_more(self) -> None:
        """Gives signals back the effect that they had before `listen`."""
        signal.set_wakeup_fd(-1)
        self.has_ended.set()
        if self.others is not None:
            self.others.join(2 * POLL_S)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def connect(self, store: Any, group: dist.ProcessGroup) -> None:
        """Lets a signal to one rank stop all.

        Args:
            store: of all ranks.
            group: all ranks, on the CPU, for nothing else.
        """
        self.store, self.group = store.clone(), group
        self.others = threading.Thread(target=self.wait_for_others, args=(store.clone(),), name="others", daemon=True)
        self.others.start()

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

    def read_signals(self, woken: int) -> None:
        while True:
            for number in os.read(woken, 64):
                if number == signal.SIGHUP:
                    forget_terminal()
                if number in STOPPING:
                    name = name_of(number)
                    if self.stopped_at is not None and time.monotonic() - self.stopped_at > SAME_S:
                        UNFINISHED.clear()
                        end_process(128 + number, lambda: f"stopped at once by a second signal, {name}", head="")
                    self.stop(name, 128 + number)

    def wait_for_others(self, store: Any) -> None:
        """Waits until another rank stops the run. Asks again and again: a process that ends while a thread of it waits in torch
        is aborted."""
        try:
            while not store.check([KEY]):
                if self.has_ended.wait(POLL_S):
                    return
            status, _, reason = store.get(KEY).decode().partition(" ")
        except RuntimeError:  # the process with the store is gone, which whoever waits for a rank will notice
            return
        self.stop(reason, int(status))

    def stop(self, reason: str, status: int) -> None:
        """Begins to stop the run on all ranks; returns at once.

        Args:
            reason: such as SIGTERM, after the words "stopped by".
            status: with which all ranks end.
        """
        with self.lock:
            if self.is_finished:
                end_process(status, lambda: f"stopped by {reason} when all was trained and saved", head="")
            if self.stopped_at is None:
                self.stopped_at = time.monotonic()
                threading.Thread(target=self.save_and_end, args=(reason, status), name="stop", daemon=True).start()

    def save_and_end(self, reason: str, status: int) -> None:
        self.watch.ending.acquire()  # no other reason ends this process from now on
        threading.Timer(LIMIT_S, self.give_up, (reason, FAILED, f"not finished within {LIMIT_S:.0f} s")).start()
        unanswered = threading.Timer(UNANSWERED_S, self.say_unanswered, (reason,))
        unanswered.start()
        try:
            if self.store is not None and not self.store.check([KEY]):
                self.store.set(KEY, f"{status} {reason} on {self.watch.name}")
            said = self.save_last_step(unanswered)
        except Exception as error:
            if self.is_finished:
                os._exit(status)
            is_mine = isinstance(error, ValueError) or self.group is None  # such as a full disk
            self.give_up(reason, FOR_USER if isinstance(error, ValueError) else FAILED,
                         str(error) if is_mine else "another rank has ended or does not answer")
        if self.watch.is_main:
            record_exit(status, f"stopped by {reason}: {said}")
            with suppress(OSError):
                print(f"stopped by {reason}: {said}", flush=True)
        with suppress(RuntimeError):
            self.greatest([0])  # all end together: a launcher ends the others after the first
        os._exit(status)

    def save_last_step(self, unanswered: threading.Timer) -> str:
        turn, is_unready = self.greatest([self.turns.hold(), self.save is None])
        unanswered.cancel()
        step, is_begun = divmod(turn, 2)
        if is_unready or self.save is None or step == 0:
            return "nothing was trained since its start"
        self.turns.finish(turn)
        if is_begun:
            return f"{self.save(step, True)}. {REMEDY}"
        while self.updated is not None and not self.updated.query():
            time.sleep(0.01)
        # the current stream may wait behind a kernel that hangs
        with torch.cuda.stream(torch.cuda.Stream(self.updated.device)) if self.updated is not None else nullcontext():
            return f"{self.save(step, False)}. {REMEDY}"

    def greatest(self, values: list[int]) -> list[int]:
        """The greatest values on any rank; waits for all ranks."""
        together = torch.tensor(values)
        if self.group is not None:
            dist.all_reduce(together, dist.ReduceOp.MAX, self.group)
        return together.tolist()

    def say_unanswered(self, reason: str) -> None:
        with suppress(OSError):
            print(f"error: {self.watch.sentence()}: stopped by {reason}, but other ranks do not answer", file=sys.stderr,
                  flush=True)

    def give_up(self, reason: str, status: int, why: str) -> None:
        end_process(status, lambda: f"{self.watch.sentence()} when it was stopped by {reason}. Steps since the newest "
                                    f"checkpoint are lost: {why}. {REMEDY}")


def forget_terminal() -> None:
    """Leaves what is still written to a terminal to nobody: the terminal is closed, and writing to it would be an error."""
    for number in (1, 2):
        if os.isatty(number):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
