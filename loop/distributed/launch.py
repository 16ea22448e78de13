"""Starts the ranks of a run on this host, passes signals on to them, and ends with one status that tells how the run ended.

python -m loop.distributed.launch --nproc-per-node 2 train.py --config configs/4b.yaml

torchrun starts runs as well. It prints a traceback whatever fails, ends with status 1, and stops a run under nohup.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Iterable, NoReturn

from loop.config import PipelineConfig
from loop.distributed.preflight import check_script, launched_ranks
from loop.errors import FAILED, FOR_USER, NO_MEMORY_LEFT, ROOT, STOPPING, heeded, run_command

AFTER_FAILURE_S = 5.0  # how long the other ranks may take to end after one has failed; a stopped process never ends by itself
AFTER_SIGNAL_S = 30.0  # how long all ranks may take after a signal: they save a checkpoint
POLL_S = 0.1
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
    command = [sys.executable, "-m", "loop.distributed.launch", "--nproc-per-node", str(num_ranks), *sys.argv]
    os.execv(sys.executable, command)


class Launched:
    """The ranks of this host, as processes.

    Args:
        command: of every rank, without the interpreter.
        environment: of all ranks.
        first: the number of the first rank of this host.
    """

    def __init__(self, command: list[str], environment: dict[str, str], first: int, number: int) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self.ended: dict[int, int] = {}  # exit codes by rank, a negative one for the signal that ended the process
        self.by_themselves: set[int] = set()  # ranks that ended before this launcher ended any
        self.received: int | None = None  # the signal that this launcher received first
        for heard in heeded():
            signal.signal(heard, self.pass_on)
        for local in range(number):
            own = {"RANK": str(first + local), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(number)}
            # a session of their own: Ctrl-C reaches them once, by way of this launcher
            self.processes[first + local] = subprocess.Popen(
                [sys.executable, "-u", *command], env={**environment, **own}, start_new_session=True)
        if self.received is not None:  # by those that were started then
            self.send(self.received)

    def pass_on(self, number: int, _: object) -> None:
        self.received = self.received or number
        self.send(number)

    def send(self, number: int) -> None:
        for rank, process in self.processes.items():
            if rank not in self.ended:
                with suppress(ProcessLookupError):
                    process.send_signal(number)

    def wait(self) -> None:
        """Waits until all ranks have ended. When one fails, the others are told to end, and killed if they do not."""
        killed_at = float("inf")
        while len(self.ended) < len(self.processes):
            for rank, process in self.processes.items():
                if rank not in self.ended and process.poll() is not None:
                    self.ended[rank] = process.returncode
            failed = [code for code in self.ended.values() if code]
            if killed_at == float("inf") and (failed or self.received):
                self.by_themselves = {*self.ended}
                is_stopping = self.received or failed[0] - 128 in STOPPING  # a signal to one rank makes all save and end
                killed_at = time.monotonic() + (AFTER_SIGNAL_S if is_stopping else AFTER_FAILURE_S)
                if not is_stopping:
                    self.send(signal.SIGTERM)
            if time.monotonic() > killed_at:
                self.send(signal.SIGKILL)
            time.sleep(POLL_S)

    def say_killed(self) -> None:
        """Names the ranks that a signal ended, since those printed nothing. Linux sends SIGKILL when memory is full."""
        for rank, code in sorted(self.ended.items()):
            if code < 0 and rank in self.by_themselves:
                print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
            elif code == -signal.SIGKILL:
                print(f"error: rank {rank} was ended by SIGKILL, since it did not end in time", file=sys.stderr)


def exit_status(codes: Iterable[int]) -> int:
    """The status of a run whose ranks ended with these codes: what a user can mend comes first, then what failed."""
    found = {128 - code if code < 0 and -code in STOPPING else code for code in codes} - {0}  # negative: while it imported
    for code in (FOR_USER, NO_MEMORY_LEFT):
        if code in found:
            return code
    return found.pop() if len(found) == 1 and min(found) > 0 else FAILED if found else 0


def launch(arguments: list[str]) -> int:
    """Starts the ranks that the arguments ask for; returns the status when all have ended.

    Raises:
        ValueError: something that the user has to change.
    """
    parser = argparse.ArgumentParser(prog="python -m loop.distributed.launch", description="Start the ranks of a run.")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks on each host, one a GPU (1)")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts (1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="K", help="this host's number, from 0 (0)")
    parser.add_argument("--master-addr", default="127.0.0.1", metavar="HOST", help="name or address of host 0")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="a free port there; one host finds one itself")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, default=[], metavar="MODULE ...", help="or a module")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="such as train.py --config FILE")
    asked = parser.parse_args(arguments)
    command = ["-m", *asked.module] if asked.module else asked.command
    if not command or min(asked.nproc_per_node, asked.nnodes) < 1 or not 0 <= asked.node_rank < asked.nnodes:
        parser.error("expected at least one rank and one host, a host's number below that of all hosts, and a script")
    if asked.nnodes > 1 and asked.master_port is None:
        parser.error("several hosts need --master-addr HOST and --master-port PORT of host 0")
    check_script(command, has_rows=asked.node_rank == 0)
    environment = {
        "OMP_NUM_THREADS": "1", **os.environ, "WORLD_SIZE": str(asked.nnodes * asked.nproc_per_node),
        "GROUP_RANK": str(asked.node_rank), "MASTER_ADDR": asked.master_addr,
        "MASTER_PORT": str(asked.master_port or free_port())}
    for name in [name for name in environment if name.startswith("TORCHELASTIC_")]:  # of a launcher around this one
        del environment[name]
    ranks = Launched(command, environment, asked.node_rank * asked.nproc_per_node, asked.nproc_per_node)
    ranks.wait()
    ranks.say_killed()
    return exit_status(ranks.ended.values())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    sys.exit(launch(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
