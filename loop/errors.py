"""Turns what a user can mend into one line, and leaves everything else its traceback."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Callable

import torch

ROOT = Path(__file__).resolve().parents[1]
# in what torch raises: its allocators, CUDA, cuBLAS and cuDNN, NCCL, C++
NO_MEMORY = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "_STATUS_ALLOC_FAILED", "std::bad_alloc")


class OutOfMemory(RuntimeError):
    """Memory ran out; the message says where, for what, and what to change (see oom.py)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of any device gave up."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)
    return isinstance(error, MemoryError)


def run_command(main: Callable[[], None]) -> None:
    """Runs an entry point. A `ValueError` that this project raised, or a file that the system refused, is a message
    to the user (exit status 2), and so is memory that ran out (3); set TRACEBACK=1 to see where it came from. Anything
    else is a bug and is shown whole."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted. The same command continues from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OutOfMemory as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(3)  # at once: what would clean up may wait for ranks that wait for this one
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK") or not is_for_user(error):
            raise
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def is_for_user(error: Exception) -> bool:
    """A ValueError raised in this project's own code, or a system error that names a file."""
    if isinstance(error, OSError):
        return error.filename is not None
    frame: TracebackType | None = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    if frame is None:
        return False
    source = Path(frame.tb_frame.f_code.co_filename).resolve()
    return source.is_relative_to(ROOT) and ".venv" not in source.parts
