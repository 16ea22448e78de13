"""How a run that was launched ends: which ranks are named, what is started again, and the one exit status."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loop.distributed.launch import exit_status
from loop.distributed.launch import launch as start_ranks

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

    def start(*deeds, patient_s=30):
        code = f"from loop.distributed import launch; launch.AFTER_SIGNAL_S = {patient_s}; launch.run_command(launch.main)"
        command = [sys.executable, "-c", code, "--nproc-per-node", str(len(deeds)), "rank.py", *deeds]
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
@pytest.mark.parametrize("deeds, status, said", [
    (("exit=2", "wait"), 2, ""), (("exit=3", "wait"), 3, ""), (("exit=1", "wait"), 1, ""), (("exit=0", "exit=0"), 0, ""),
    (("die=9", "wait"), 1, "error: rank 0 was ended by SIGKILL\n"),  # not 143, which looks like a preemption
    (("wait", "die=11"), 1, "error: rank 1 was ended by SIGSEGV\n"),
    (("exit=143", "exit=143"), 143, ""),  # a signal to one rank, which made both save and end
    (("exit=1", "ignore"), 1, "error: rank 1 was ended by SIGKILL, since it did not end in time\n"),
], ids=lambda value: ",".join(value) if isinstance(value, tuple) else None)
def test_a_rank_ends_by_itself(launch, deeds, status, said):
    process = launch(*deeds)
    errors = process.communicate(timeout=240)[1]
    assert (process.returncode, errors) == (status, said)


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
def test_a_rank_that_does_not_stop_is_killed_and_named(launch, tmp_path):
    process = launch("ignore", "wait", patient_s=2)
    wait_for(lambda: len(starts(tmp_path)) == 2, process)
    process.terminate()
    errors = process.communicate(timeout=240)[1]
    assert (process.returncode, errors) == (1, "error: rank 0 was ended by SIGKILL, since it did not end in time\n")


@pytest.mark.slow
def test_a_rank_that_stops_is_not_hurried_by_the_first_that_has_stopped(launch, tmp_path):
    """Found: the launcher's SIGTERM counted as a second signal, and the rank that was still saving ended at once."""
    process = launch("wait", "wait=4")
    wait_for(lambda: len(starts(tmp_path)) == 2, process)
    for pid in ranks_of(process):
        os.kill(pid, signal.SIGTERM)
    assert process.communicate(timeout=240)[1] == "" and process.returncode == 143


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_ends_nothing(launch, tmp_path):
    """Found: torch's launcher takes SIGHUP though it was ignored, and passes it on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = launch("wait", "wait")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(lambda: len(starts(tmp_path)) == 2, process)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    assert process.wait(240) == 143


def ranks_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("codes, status", [
    ([0, 0], 0), ([], 0), ([2, -15], 2), ([-9, 3, 143], 3), ([-9, 143], 1), ([-9, 1], 1), ([-9, 0], 1), ([143, 143], 143),
    ([143, 1], 1), ([130, -2], 130), ([129, 0], 129), ([143, -9], 1), ([143, 2], 2), ([-15, -15], 143), ([7, 0], 7)])
def test_one_true_status(codes, status):
    assert exit_status(codes) == status


@pytest.mark.parametrize("arguments, said", [
    ([], "a script"), (["--nproc-per-node", "0", "x.py"], "at least one rank"),
    (["--nnodes", "2", "x.py"], "--master-addr HOST"),
    (["--nnodes", "2", "--node-rank", "2", "--master-port", "1", "x.py"], "below that of all hosts")])
def test_a_wrong_command_is_named(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        start_ranks(arguments)
    assert said in capsys.readouterr().err
