"""Starts ranks: torchrun without its own traceback, since a rank that fails has already said why, and without orphans.

python -m loop.launch --nproc-per-node 2 train.py --config configs/4b.yaml
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
SHUTDOWN_S = 5  # ranks that have not followed SIGTERM for so long are killed; a stopped process never follows
PR_SET_PDEATHSIG = 1


def die_with_parent(number: int) -> None:
    """Has the system send this process a signal when the process that started it is gone (Linux; else nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def restart_as_ranks(num_ranks: int) -> NoReturn:
    """Replaces this process by a torchrun of the same command with `num_ranks` processes on this host.

    Works inside a worker of torchrun, too: the outer one then has one worker, which is the inner torchrun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM)  # the inner torchrun outlives exec, and must not outlive the outer one
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_ranks, 1)))
    sys.stdout.flush()
    command = [sys.executable, "-m", "loop.launch", "--standalone", "--nproc-per-node", str(num_ranks), *sys.argv]
    os.execv(sys.executable, command)


def main() -> None:
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what happened themselves
    # torchrun's own 30 s, after which it kills what did not follow SIGTERM, cannot be set for the case that a rank failed
    close = PContext.close
    setattr(PContext, "close", lambda self, death_sig=None, timeout=0: close(self, death_sig, SHUTDOWN_S))
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:  # it could not say so itself; SIGKILL is also how a system ends what takes its memory
                print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode > 0]
        sys.exit(min(codes, default=1))
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
