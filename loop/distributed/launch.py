"""Starts the ranks of a run: torchrun, without its traceback after a rank has failed, and with a shorter shutdown.

python -m loop.distributed.launch --nproc-per-node 2 train.py --config configs/4b.yaml
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from typing import NoReturn

from loop.errors import ROOT

SHUTDOWN_S = 5  # ranks that have not ended so many seconds after SIGTERM are killed; a stopped process never ends by itself
PR_SET_PDEATHSIG = 1


def die_with_parent(number: int) -> None:
    """Asks Linux to send this process signal `number` when its parent ends; does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def restart_as_ranks(num_ranks: int) -> NoReturn:
    """Replaces this process by a launcher that runs the same command in `num_ranks` processes on this host.

    This process may itself be a worker of torchrun. The outer torchrun then has the new launcher as its only worker.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM)  # the new launcher must end when the outer torchrun ends
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_ranks, 1)))
    sys.stdout.flush()
    command = [sys.executable, "-m", "loop.distributed.launch", "--standalone", "--nproc-per-node", str(num_ranks), *sys.argv]
    os.execv(sys.executable, command)


def main() -> None:
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a rank that fails prints its own message
    # torchrun has no option for the time it leaves the other ranks after one has failed: 30 s
    close = PContext.close
    setattr(PContext, "close", lambda self, death_sig=None, timeout=0: close(self, death_sig, SHUTDOWN_S))
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:  # ended by a signal, so the rank printed nothing; Linux sends SIGKILL when memory is full
                print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode > 0]
        sys.exit(min(codes, default=1))
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
