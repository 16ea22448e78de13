"""Runs entry points: errors that a user can correct are printed as one line, all others with their traceback.
Imports no torch."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[1]
# texts in the errors that torch raises for its allocators, CUDA, cuBLAS and cuDNN, NCCL, and C++
NO_MEMORY = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "_STATUS_ALLOC_FAILED", "std::bad_alloc")


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

    Exit status 2: a ValueError of this project, or a system error that names a file. Exit status 3: memory is full.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted. The same command continues from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OutOfMemory as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(3)  # without cleaning up, which could wait for ranks that wait for this rank
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK") or not is_for_user(error):
            raise
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def is_for_user(error: Exception) -> bool:
    """Whether an error is a ValueError raised in this project's own code, or a system error that names a file."""
    if isinstance(error, OSError):
        return error.filename is not None
    source = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return source.is_relative_to(ROOT) and ".venv" not in source.parts
