"""A signal stops a run after its last finished step was saved, and the run goes on as if nothing had happened."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from loop import checkpoint, fit
from model.tiny.write import write_tiny
from tests.processes import Run

ROOT = Path(__file__).parents[3]
NUM_STEPS = 60


def wait_until(condition, run, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.running, run.said
        assert time.monotonic() < deadline, run.said
        time.sleep(0.01)


def reached(run_dir, step):
    path = run_dir / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},' in path.read_text()


def send(run, number, *ranks):
    for rank in ranks or range(len(run.processes)):
        os.kill(run.processes[rank].pid, number)


def assert_same(read_metrics, directory, one, other):
    """Metrics, and the bytes of the last checkpoint."""
    one, other = directory / "checkpoints" / one, directory / "checkpoints" / other
    kept = ("step", "loss", "eval_loss", "grad_norm", "lr", "eval_loss_by_source")
    lines = [[{key: line[key] for key in kept if key in line} for line in read_metrics(run)
              if line.keys() & {"loss", "eval_loss"}] for run in (one, other)]
    assert lines[0] == lines[1] and lines[0]
    names = [[path.name for path in checkpoint.list_checkpoints(run)] for run in (one, other)]
    assert names[0] == names[1]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        paths = [checkpoint.newest(run) / name for run in (one, other)]
        assert paths[0].read_bytes() == paths[1].read_bytes(), name


@pytest.fixture
def long_config(write_config):
    def write(**changes):
        return write_config(**{"train__max_steps": NUM_STEPS, "eval__every": 20, "checkpoint__every": 40, **changes})

    return write


@pytest.fixture
def start(tmp_path):
    started = []

    def start(script, config, run, *overrides, ranks=1):
        started.append(Run(script, "--config", config, f"run={run}", *overrides, ranks=ranks, directory=tmp_path))
        return started[-1]

    yield start
    for run in started:
        run.kill()


@pytest.mark.slow
def test_one_process_saves_its_last_step_on_each_signal_and_goes_on_to_the_same_end(long_config, start, read_metrics, tmp_path):
    config = long_config(train__optimizer="adamw8bit", lora__dropout=0.1)
    assert start(ROOT / "train.py", config, "whole").wait() == [0]
    run_dir = tmp_path / "checkpoints/stopped"
    for number, step in ((signal.SIGINT, 5), (signal.SIGTERM, 25), (signal.SIGHUP, 45)):
        run = start(ROOT / "train.py", config, "stopped")
        wait_until(reached(run_dir, step), run)
        send(run, number)
        assert run.wait(60) == [128 + number], run.said
        newest = checkpoint.newest(run_dir)
        assert int(newest.name[5:]) >= step and "Traceback" not in run.said
        assert f"stopped by {number.name}: saved {newest.relative_to(tmp_path)}. The same command continues" in run.stdout
        record = json.loads((run_dir / "exit.json").read_text())
        assert record["status"] == 128 + number and record["reason"].startswith(f"stopped by {number.name}: saved")
    run = start(ROOT / "train.py", config, "stopped")
    assert run.wait() == [0] and "continuing from" in run.said
    assert_same(read_metrics, tmp_path, "stopped", "whole")
    assert json.loads((run_dir / "exit.json").read_text())["status"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "pipeline_train.py"])
def test_a_signal_to_one_rank_stops_all(script, long_config, start, read_metrics, tmp_path):
    """Two replicas in train.py, two stages in pipeline_train.py. Found: SIGTERM to one process printed nothing."""
    config = long_config(pipeline={"split": [2]}, checkpoint__keep=9)
    assert start(ROOT / script, config, "whole", ranks=2).wait() == [0, 0]
    run_dir = tmp_path / "checkpoints/stopped"
    for rank, step in ((1, 7), (0, 30)):
        run = start(ROOT / script, config, "stopped", ranks=2)
        wait_until(reached(run_dir, step), run)
        send(run, signal.SIGTERM, rank)
        assert run.wait(60) == [143, 143], run.said
        where = f" on rank {rank}" + (f" (stage {rank})" if script == "pipeline_train.py" else "") if rank else ""
        assert f"stopped by SIGTERM{where}: saved checkpoints/stopped/step-" in run.stdout
        assert run.stdout.count("stopped by") == 1 and "error" not in run.stderr
    assert start(ROOT / script, config, "stopped", ranks=2).wait() == [0, 0]
    kept = {path.name for path in checkpoint.list_checkpoints(run_dir)}
    for extra in kept - {path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints/whole")}:
        pytest.fail(f"{extra} was only there until the next one")
    assert_same(read_metrics, tmp_path, "stopped", "whole")


@pytest.mark.slow
def test_main_threads_that_hang_in_a_collective_do_not_keep_a_run_from_being_saved(
        long_config, edited_copy, start, read_metrics, tmp_path):
    config = long_config()
    assert start(ROOT / "train.py", config, "whole", ranks=2).wait() == [0, 0]
    copy = edited_copy({"loop/fit.py": [(
        "        with memory.step(batch):\n",
        "        if step == 11 and ranks.rank == 1:\n            time.sleep(600)\n        with memory.step(batch):\n")]})
    run_dir = tmp_path / "checkpoints/stopped"
    run = start(copy / "train.py", config, "stopped", ranks=2)
    wait_until(reached(run_dir, 10), run)
    time.sleep(0.5)  # rank 0 waits in a sum
    send(run, signal.SIGTERM)
    assert run.wait(60) == [143, 143], run.said
    assert checkpoint.newest(run_dir).name == "step-00000010"
    assert start(ROOT / "train.py", config, "stopped", ranks=2).wait() == [0, 0]
    assert_same(read_metrics, tmp_path, "stopped", "whole")


@pytest.mark.slow
def test_a_run_that_is_stopped_in_an_evaluation_evaluates_again(long_config, edited_copy, start, read_metrics, tmp_path):
    config = long_config()
    assert start(ROOT / "train.py", config, "whole").wait() == [0]
    run_dir = tmp_path / "checkpoints/stopped"
    for step in (20, 40):  # at step 40 a checkpoint is due as well
        copy = edited_copy({"loop/fit.py": [(
            "        log.eval(step, ", f"        if step == {step}:\n            time.sleep(600)\n        log.eval(step, ")]})
        run = start(copy / "train.py", config, "stopped")
        wait_until(reached(run_dir, step), run)
        time.sleep(0.2)
        send(run, signal.SIGTERM)
        assert run.wait(60) == [143], run.said
        assert checkpoint.newest(run_dir).name == f"step-{step:08d}"
        shutil.rmtree(copy)
    assert start(ROOT / "train.py", config, "stopped").wait() == [0]
    assert_same(read_metrics, tmp_path, "stopped", "whole")


@pytest.mark.slow
def test_a_signal_because_a_rank_died_saves_nothing(long_config, start, tmp_path):
    run_dir = tmp_path / "checkpoints/stopped"
    run = start(ROOT / "train.py", long_config(train__max_steps=100_000, checkpoint__every=100_000, eval__every=100_000),
                "stopped", ranks=2)
    wait_until(reached(run_dir, 7), run)
    send(run, signal.SIGKILL, 1)
    send(run, signal.SIGTERM, 0)
    assert run.wait(60) == [1, -9], run.said
    assert checkpoint.newest(run_dir) is None and "saved" not in run.stdout.replace("not saved", "")
    assert run.stderr.count("error: rank 0 ") == 1 and "Traceback" not in run.said
    assert json.loads((run_dir / "exit.json").read_text())["status"] == 1


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_waited_for_until_a_second_signal(long_config, start, tmp_path):
    run_dir = tmp_path / "checkpoints/stopped"
    run = start(ROOT / "train.py", long_config(train__max_steps=100_000, checkpoint__every=100_000, eval__every=100_000),
                "stopped", ranks=2)
    wait_until(reached(run_dir, 7), run)
    send(run, signal.SIGSTOP, 1)
    time.sleep(0.5)
    send(run, signal.SIGTERM, 0)
    wait_until(lambda: "other ranks do not answer" in run.stderr, run)
    assert run.stderr.startswith("error: rank 0 waited for ")
    time.sleep(0.5)
    send(run, signal.SIGINT, 0)
    run.processes[0].join(20)
    assert run.processes[0].exitcode == 130 and "stopped at once by a second signal, SIGINT" in run.stderr
    assert checkpoint.newest(run_dir) is None


@pytest.mark.slow
def test_before_training_a_signal_is_answered_in_a_line(long_config, tmp_path):
    """Found: a traceback during imports, and the promise of a checkpoint where there was none. A signal that is ignored, as
    SIGHUP is under nohup, stays ignored."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(long_config())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for number, seconds in ((signal.SIGINT, 1.0), (signal.SIGTERM, 2.0)):
        process = subprocess.Popen([*command, f"run={number.name}"], cwd=tmp_path, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
        if "step 1/" not in out:  # else it was quicker than this test
            assert process.returncode == 128 + number and "Traceback" not in errors, errors
            assert f"stopped by {number.name}" in out + errors and "step-" not in out
    process = subprocess.Popen(["nohup", *command, "train.max_steps=8", "run=nohup"], cwd=tmp_path, env=environment, text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(20):
        time.sleep(0.2)
        process.send_signal(signal.SIGHUP)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "finished" in out, errors


def test_a_checkpoint_is_due_by_time_as_well(write_config, run_train, read_metrics, tmp_path, monkeypatch):
    """It has no evaluation, and the next checkpoint takes its place."""
    whole = run_train(write_config(), run="whole")
    saved, honest = [], checkpoint.save

    def save(run_dir, what, keep):
        saved.append((what.state["step"], what.state["eval_loss"] is not None))
        return honest(run_dir, what, keep)

    passed_s = iter([0, 2000, 0, 0, 0, 0, 2000, 2000, 0, 0])  # at each step, since the last checkpoint
    monkeypatch.setattr(fit, "time", SimpleNamespace(
        perf_counter=time.perf_counter, monotonic=lambda: time.monotonic() + next(passed_s)))
    monkeypatch.setattr(checkpoint, "save", save)
    assert run_train(write_config(checkpoint__every_s=1600), run="timed") == whole
    assert saved == [(2, False), (4, True), (7, False), (8, True), (10, True)]
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints/timed")]
    assert names == [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints/whole")]


@pytest.mark.slow
def test_the_pipeline_of_the_35b_is_stopped_and_goes_on(write_config, start, read_metrics, tmp_path):
    model = write_tiny(tmp_path / "35b", layout="fp8", num_hidden_layers=4)
    config = write_config(model__path=str(model), model__base="nf4", lora__target=["q_proj", "in_proj_qkv", "down_proj"],
                          train__microbatch_tokens=256, train__max_steps=6, train__optimizer="adamw8bit",
                          checkpoint__every=100, eval__every=100, pipeline={"split": [3], "schedule": "1f1b"})
    assert start(ROOT / "pipeline_train.py", config, "whole", ranks=2).wait() == [0, 0]
    run_dir = tmp_path / "checkpoints/stopped"
    run = start(ROOT / "pipeline_train.py", config, "stopped", ranks=2)
    wait_until(reached(run_dir, 2), run)
    send(run, signal.SIGTERM)
    assert run.wait(60) == [143, 143], run.said
    assert start(ROOT / "pipeline_train.py", config, "stopped", ranks=2).wait() == [0, 0]
    assert_same(read_metrics, tmp_path, "stopped", "whole")


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["output", "output and errors", "terminal"])
def test_a_run_whose_reader_is_gone_is_saved_too(long_config, tmp_path, gone):
    """As after Ctrl-C in `train.py | tee log`, and when a terminal is closed. Found: the process wrote its checkpoint and then
    hung, or said that nothing was saved."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(long_config(
        train__max_steps=100_000, checkpoint__every=100_000, eval__every=100_000))]
    run_dir = tmp_path / "checkpoints/tiny"

    def wait_for_steps():
        deadline = time.monotonic() + 120
        while not reached(run_dir, 5)():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if gone == "terminal":
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(tmp_path)
            os.execve(command[0], command, environment)
        reader = threading.Thread(target=lambda: [None for _ in iter(lambda: read_until_gone(terminal), b"")], daemon=True)
        reader.start()
        wait_for_steps()
        os.kill(pid, signal.SIGSTOP)  # so that it does not write while the terminal is closed, which would wait for the reader
        os.close(terminal)
        os.kill(pid, signal.SIGCONT)
        status, expected = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 129
    else:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for stream in (process.stdout, process.stderr):
            threading.Thread(target=lambda stream=stream: [None for _ in iter(lambda: read_until_gone(stream.fileno()), b"")],
                             daemon=True).start()
        wait_for_steps()
        process.send_signal(signal.SIGSTOP)
        for stream in (process.stdout, process.stderr)[: 1 + (gone != "output")]:
            os.close(stream.fileno())
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        status, expected = process.wait(60), 130
    assert status == expected
    newest = checkpoint.newest(run_dir)
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["status"] == expected and newest.name in record["reason"]


def read_until_gone(number):
    try:
        return os.read(number, 65536)
    except OSError:
        return b""
