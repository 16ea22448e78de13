"""Starts entry points as processes of their own, several ranks of one run if need be, without torch's launcher.

They are forked from a server that has imported torch, transformers and the trainer once; a process that imports them itself
takes seconds of a core before it does anything. Tests of the launchers and of the literal commands do not use this.
"""

import ctypes
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
# Each start of a process asks how all others ended. Where threads start processes, two of them may ask of the same one, and the
# second is told 255.
setattr(multiprocessing.process, "_cleanup", lambda: None)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "pipeline_train", "loop.plan.__main__"])
CLONE_NEWNET = 0x40000000
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def run_script(script, arguments, environment, directory, files):
    """In the new process: becomes `python SCRIPT ARGUMENTS...`, and writes what it says into two files. A script that is not of
    this checkout gets the modules that lie beside it."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until the script itself listens, a few lines on
    if namespace := environment.get("NETWORK_NAMESPACE"):
        handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        assert ctypes.CDLL(None).setns(handle, CLONE_NEWNET) == 0
    os.chdir(directory)
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    if ROOT not in Path(script).parents:
        sys.modules["model.ops.compiled"].LIBRARY._destroy()  # torch knows an operator of a name once
        for name in [name for name in sys.modules if name.partition(".")[0] in ("data", "model", "loop", "train")]:
            del sys.modules[name]
        sys.path.insert(0, str(Path(script).parent))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def free_port():
    """A port below those that the system gives to connections: another run's connection could take such a one meanwhile."""
    while True:
        port = random.SystemRandom().randrange(12000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Run:
    """The ranks of one run, which have been started.

    Args:
        script: path of an entry point.
        ranks: how many processes.
        environment: variables beside those that a launcher sets.
        directory: the working directory, where `run-N.out` and `run-N.err` receive what is said.
    """

    number = 0

    def __init__(self, script, *arguments, ranks=1, directory=".", environment=None):
        Run.number += 1
        self.files = [Path(directory).resolve() / f"run-{Run.number}.{kind}" for kind in ("out", "err")]
        with patch.dict(os.environ, ENVIRONMENT):  # the server keeps what it is started with
            port, self.processes = free_port(), []
            for rank in range(ranks):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                launched = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
                process = FORKS.Process(target=run_script, daemon=True, args=(
                    script, list(map(str, arguments)), ENVIRONMENT | launched | (environment or {}), str(directory),
                    list(map(str, self.files))))
                process.start()
                self.processes.append(process)

    @property
    def running(self):
        return any(process.is_alive() for process in self.processes)

    @property
    def stdout(self):
        return self.files[0].read_text() if self.files[0].exists() else ""

    @property
    def stderr(self):
        return self.files[1].read_text() if self.files[1].exists() else ""

    @property
    def said(self):
        return self.stdout + self.stderr

    def wait(self, seconds=300):
        """The exit status of each rank; a negative one is the signal that ended it."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        if self.running:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.said}")
        return [process.exitcode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
