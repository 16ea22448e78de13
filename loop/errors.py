"""How a process ends: errors that a user can correct as one line, all others with their traceback, signals as one line; with an
exit status that says which, and exit.json in the run's directory. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from data.files import write_text

if TYPE_CHECKING:
    from concurrent.futures import Future

ROOT = Path(__file__).resolve().parents[1]
FAILED, FOR_USER, NO_MEMORY_LEFT = 1, 2, 3  # exit statuses; after a signal it is 128 and the signal's number
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end a run after its last step was saved
EXIT_FILE = "exit.json"
# texts in the errors that torch raises for its allocators, CUDA, cuBLAS and cuDNN, NCCL, and C++
NO_MEMORY = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "_STATUS_ALLOC_FAILED", "std::bad_alloc")
RECORDED_IN: list[Path] = []  # the run's directory, once this process has locked it
UNFINISHED: list[Future[str]] = []  # work of other threads, which this process finishes before it ends
FINISH_S = 20.0  # but no longer than this where it must end at once: launchers kill their ranks 30 s after a signal


class OutOfMemory(RuntimeError):
    """Memory is full. The message says where, for what, and what to change (see out_of_memory.py)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of any device had no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in NO_MEMORY)
    return isinstance(error, MemoryError)


def run_command(main: Callable[[], object]) -> None:
    """Runs an entry point; prints one line for errors that a user can correct, unless TRACEBACK=1 is set.

    Exit status 2: a ValueError of this project, or a system error that names a file. Exit status 3: memory is full. 128 and the
    signal's number: told to stop by a signal. 1: everything else.
    """
    for heard in heeded():  # also while this process imports, until a run listens itself (distributed/signals.py)
        signal.signal(heard, lambda number, _: end_process(128 + number, lambda: f"stopped by {name_of(number)}", head=""))
    try:
        main()
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OutOfMemory as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.stdout.flush()
        end_process(NO_MEMORY_LEFT, partial(str, error))
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK") or not is_for_user(error):
            report_failure(error)
            raise
        ignore_signals()
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        record_exit(FOR_USER, message)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(FOR_USER)
    except Exception as error:
        report_failure(error)
        raise


def is_for_user(error: Exception) -> bool:
    """Whether an error is a ValueError raised in this project's own code, or a system error that names a file."""
    if isinstance(error, OSError):
        return error.filename is not None
    source = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return source.is_relative_to(ROOT) and ".venv" not in source.parts


def heeded() -> list[signal.Signals]:
    """The signals of STOPPING that are not ignored, as SIGHUP is under nohup, and SIGINT in a background job."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


def ignore_signals() -> None:
    """For a process that is about to end anyway: a launcher that saw another rank end must not change how this one does."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def name_of(number: int) -> str:
    return signal.Signals(number).name


def report_failure(error: Exception) -> None:
    ignore_signals()
    record_exit(FAILED, repr(error))


def end_process(status: int, message: Callable[[], str], head: str = "error: ") -> NoReturn:
    """Records and prints why, and ends the process in any thread, when what is `UNFINISHED` is done. Nothing is cleaned up,
    which could wait for ranks that wait for this one; and nothing that fails on the way, such as a terminal that is closed,
    keeps the process alive."""
    try:
        said = message()
        record_exit(status, said)
        os.write(2, f"{head}{said}\n".encode())
        for work in UNFINISHED:
            work.exception(FINISH_S)
    finally:
        os._exit(status)


def record_exits_in(run_dir: Path) -> None:
    """Has `record_exit` write into a run's directory from now on; removes what an earlier process wrote there."""
    RECORDED_IN[:] = [run_dir]
    (run_dir / EXIT_FILE).unlink(missing_ok=True)


def record_exit(status: int, reason: str, **more: Any) -> None:
    """Writes why this process ends into exit.json, if it has a run's directory; a full disk does not change how it ends."""
    for run_dir in RECORDED_IN:
        record = {"status": status, "reason": reason, **more, "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                  "host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OSError):
            write_text(run_dir / EXIT_FILE, json.dumps(record) + "\n")
