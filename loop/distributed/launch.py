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

from loop.config import PipelineConfig
from loop.distributed.hosts import meet_in_time
from loop.errors import ROOT, run_command

SHUTDOWN_S = 5  # ranks that have not ended so many seconds after SIGTERM are killed; a stopped process never ends by itself
PR_SET_PDEATHSIG = 1


def die_with_parent(number: int) -> None:
    """Asks Linux to send this process signal `number` when its parent ends; does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def launched_ranks() -> int:
    """How many processes the launcher started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start_stages(config: PipelineConfig) -> int:
    """The number of stages. Where one process was started for several, does not return: the process becomes their launcher."""
    from torch.cuda import device_count

    launched = launched_ranks()
    num_stages, num_ranks = choose_ranks(config, launched, device_count())
    if num_ranks > launched:
        replicas = f" and {num_ranks // num_stages} replicas" if num_ranks > num_stages else ""
        print(f"starting {num_ranks} processes, one for each of {num_stages} stages{replicas}", flush=True)
        restart_as_ranks(num_ranks)
    return num_stages


def choose_ranks(config: PipelineConfig, world_size: int, num_gpus: int) -> tuple[int, int]:
    """How many stages, and how many processes.

    Several processes that a launcher started stay as they are. One process becomes one process a stage on the CPU, and
    one a GPU where there are several GPUs, as far as they make whole replicas. On one GPU the model is not split.

    Raises:
        ValueError: more stages than GPUs.
    """
    if world_size > 1:
        return config.num_stages(otherwise=world_size), world_size
    if num_gpus == 1:
        return 1, 1
    num_stages = config.num_stages(otherwise=max(num_gpus, 2))
    if num_gpus and num_stages > num_gpus:
        raise ValueError(f"pipeline.split {config.split} makes {num_stages} stages, but {num_gpus} GPUs are visible")
    return num_stages, max(num_gpus // num_stages, 1) * num_stages


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
    meet_in_time(sys.argv[1:])
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
    run_command(main)
