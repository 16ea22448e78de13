"""Runs an entry point, and takes away the memory of one rank as its training begins: `limited.py train --config ...`.

LIMIT_MIB is what may still be added to its address space, LIMIT_RANK the rank.
"""

import importlib
import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def limit():
    if os.environ.get("RANK", "0") != os.environ.get("LIMIT_RANK", "0"):
        return
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(os.environ["LIMIT_MIB"]) * 2**20, resource.RLIM_INFINITY))
    # as a GPU's memory would be, what is full is this process's alone: one that it starts has all that the machine has
    unlimited = Path("unlimited.sh")
    unlimited.write_text(f'#!/bin/sh\nulimit -S -v unlimited\nexec {sys.executable} "$@"\n')
    unlimited.chmod(0o755)
    sys.executable = str(unlimited.resolve())


if __name__ == "__main__":
    from loop import out_of_memory
    from loop.errors import run_command

    out_of_memory.LIMIT_S = 240  # for a busy machine
    entry = importlib.import_module(sys.argv.pop(1))
    fit = entry.fit

    def limited_fit(*args, **kwargs):
        limit()
        fit(*args, **kwargs)

    entry.fit = limited_fit
    run_command(entry.main)
