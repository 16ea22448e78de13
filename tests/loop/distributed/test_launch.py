"""How a run that was launched ends: which ranks are named, what is started again, and the one exit status."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loop.distributed.launch import exit_status

ROOT = Path(__file__).parents[3]
# a rank that does what the argument of its number says, and notes that it has started
RANK = """
import os, signal, sys, time
deed, _, value = sys.argv[1 + int(os.environ["RANK"])].partition("=")
def stop(number, _):
    time.sleep(float(value or 0))  # as if it saved a checkpoint
    os._exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN if deed == "ignore" else stop)
with open("started", "a") as file:
    print(os.environ["RANK"], file=file)
while open("started").read().count("\\n") < 2:
    time.sleep(0.05)
if deed == "exit":
    sys.exit(int(value))
if deed == "die":
    os.kill(os.getpid(), int(value))
time.sleep(300)
"""


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher with a rank for each deed; ends it with the test."""
    (tmp_path / "rank.py").write_text(RANK)
    started = []

    def start(*deeds, options=()):
        command = [sys.executable, "-m", "loop.distributed.launch", "--standalone", "--nproc-per-node", str(len(deeds)),
                   *options, "rank.py", *deeds]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def starts(tmp_path):
    file = tmp_path / "started"
    return file.read_text().split() if file.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("deeds, restarts, status, said, num_starts", [
    (("exit=2", "wait"), 3, 2, "", 2),  # what the user has to mend is not tried again
    (("exit=3", "wait"), 3, 3, "", 2),
    (("exit=1", "wait"), 1, 1, "", 4),
    (("die=9", "wait"), 0, 1, "error: rank 0 was ended by SIGKILL\n", 2),  # not 143, which looks like a preemption
    (("wait", "die=11"), 0, 1, "error: rank 1 was ended by SIGSEGV\n", 2),
    (("exit=0", "exit=0"), 0, 0, "", 2),
    (("exit=1", "ignore"), 0, 1, "error: rank 1 was ended by SIGKILL, since it did not end in time\n", 2),
], ids=lambda value: ",".join(value) if isinstance(value, tuple) else None)
def test_a_rank_ends_by_itself(launch, tmp_path, deeds, restarts, status, said, num_starts):
    process = launch(*deeds, options=("--max-restarts", str(restarts)))
    errors = process.communicate(timeout=240)[1]
    assert (process.returncode, errors) == (status, said)
    assert len(starts(tmp_path)) == num_starts


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_launcher_is_told_to_stop(launch, tmp_path, number, status):
    """The ranks have longer than after a failure: they save a checkpoint."""
    process = launch("wait=7", "wait")
    wait_for(lambda: len(starts(tmp_path)) == 2, process)
    process.send_signal(number)
    errors = process.communicate(timeout=240)[1]
    assert (process.returncode, errors) == (status, "")


@pytest.mark.slow
def test_a_rank_that_does_not_stop_is_killed_and_named(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    process = launch("ignore", "wait")
    wait_for(lambda: len(starts(tmp_path)) == 2, process)
    process.terminate()
    errors = process.communicate(timeout=240)[1]
    assert (process.returncode, errors) == (1, "error: rank 0 was ended by SIGKILL, since it did not end in time\n")


@pytest.mark.slow
def test_ctrl_c_while_torch_is_imported(launch):
    process = launch("wait")
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=240)[1]
    assert (process.returncode, errors) == (130, "stopped by SIGINT\n")


@pytest.mark.parametrize("codes, received, status", [
    ([0, 0], None, 0), ([], None, 0), ([2, -15], None, 2), ([-9, 3, 143], None, 3), ([-9, 143], None, 1), ([-9, 1], None, 1),
    ([143, 143], None, 143), ([143, 1], None, 1), ([143, 143], 15, 143),
    ([130, -2], 2, 130), ([129, 0], 1, 129), ([143, -9], 15, 1),
    ([143, 1], 15, 1), ([143, 2], 15, 2), ([], 15, 143), ([0, 0], 15, 0)])
def test_one_true_status(codes, received, status):
    assert exit_status(codes, received) == status
