"""Turns what a user can mend into one line, and leaves everything else its traceback."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Callable

ROOT = Path(__file__).resolve().parents[1]


def run_command(main: Callable[[], None]) -> None:
    """Runs an entry point. A `ValueError` that this project raised, or a file that the system refused, is a message
    to the user (exit status 2); set TRACEBACK=1 to see where it came from. Anything else is a bug and is shown whole."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted. The same command continues from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
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
