"""Starts the ranks of a run: torchrun, after a check of the command, without its traceback, and with exit codes that tell.

python -m loop.distributed.launch --nproc-per-node 2 train.py --config configs/4b.yaml
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, NoReturn

from loop.config import PipelineConfig
from loop.distributed.hosts import meet_in_time
from loop.distributed.preflight import SCRIPTS, STOPS_AT_ERRORS, check_script, launched_ranks
from loop.errors import ROOT, run_command

SHUTDOWN_S = 5  # seconds that the other ranks have to end after one has failed; then they are killed
FOR_THE_USER = (2, 3)  # exit codes of `run_command` for what another start cannot mend
STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)  # that torch's launcher passes on to the ranks
PR_SET_PDEATHSIG = 1


def die_with_parent(number: int) -> None:
    """Asks Linux to send this process signal `number` when its parent ends; does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


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


@dataclass
class Ends:
    """How the ranks of this host ended: their exit codes by rank, a negative one for the signal that ended the process."""

    by_themselves: dict[int, int] = field(default_factory=dict)  # before the launcher stopped the others
    of_all: dict[int, int] = field(default_factory=dict)


def watch_ends() -> Ends:
    """Lets torch's launcher note how ranks end, wait less after a failure, and restart no rank that said what to mend.

    torch has no option for any of it. After a failure it waits 30 s for the other ranks; a stopped process never ends by
    itself. When the launcher itself receives a signal, the ranks keep these 30 s: they save a checkpoint.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    ends = Ends()
    close, monitor = SubprocessContext.close, LocalElasticAgent._monitor_workers

    def codes(context: Any) -> dict[int, int]:
        polled = {local: handler.proc.poll() for local, handler in context.subprocess_handlers.items()}
        return {int(context.envs[local]["RANK"]): code for local, code in polled.items() if code is not None}

    def close_sooner(context: Any, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        if death_sig is None:  # not because of a signal: a rank failed, or all have ended
            ends.by_themselves, timeout = codes(context), SHUTDOWN_S
        close(context, death_sig, timeout)
        ends.of_all = codes(context)

    def restart_only_what_can_succeed(agent: Any, group: Any) -> Any:
        result = monitor(agent, group)
        if any(failure.exitcode in FOR_THE_USER for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    setattr(SubprocessContext, "close", close_sooner)
    setattr(LocalElasticAgent, "_monitor_workers", restart_only_what_can_succeed)
    os.environ[STOPS_AT_ERRORS] = "1"
    return ends


def exit_status(codes: Iterable[int], received: int | None) -> int:
    """The status of the launcher.

    Args:
        codes: of all ranks.
        received: the signal that the launcher itself received, if one stopped the run.
    """
    codes = set(codes)
    for code in FOR_THE_USER:
        if code in codes:
            return code
    if not codes - {0}:
        return 0 if codes or received is None else 128 + received
    if len(codes - {0}) == 1 and max(codes) - 128 in STOPS:  # a signal to one rank, which stops all
        return max(codes)
    stopped = {0, *(code for number in STOPS for code in (128 + number, -number))}  # negative: while it imported
    return 128 + received if received is not None and codes <= stopped else 1


def check_before_start(arguments: list[str]) -> None:
    """Checks the command line of the script that is to be launched, if it is one of this project's.

    Raises:
        ValueError: something that the user has to change.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--nnodes", default=os.environ.get("PET_NNODES", "1"))
    first = next((i for i, argument in enumerate(arguments) if Path(argument).resolve() in SCRIPTS), None)
    if first is not None:
        hosts = parser.parse_known_args(arguments[:first])[0].nnodes
        check_script(arguments[first:], has_rows=hosts in ("1", "1:1"))  # which host is the first one is not known yet


def main() -> None:
    check_before_start(sys.argv[1:])
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in ("elastic", "elastic.agent.server.api"):  # ranks print their own messages; the second has a level of its own
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    ends, received = watch_ends(), None
    meet_in_time(sys.argv[1:])
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError:
        pass
    except SignalException as error:
        received = int(error.sigval)
    for rank, code in ends.of_all.items():  # a rank that was ended by a signal printed nothing
        if ends.by_themselves.get(rank, 0) < 0:  # Linux sends SIGKILL when memory is full
            print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        elif code == -signal.SIGKILL:
            print(f"error: rank {rank} was ended by SIGKILL, since it did not end in time", file=sys.stderr)
    sys.exit(exit_status(ends.of_all.values(), received))


if __name__ == "__main__":
    run_command(main)
