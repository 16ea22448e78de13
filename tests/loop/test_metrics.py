"""metrics.jsonl survives what a crash leaves, and the console says what the file says."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loop import checkpoint
from loop.line_file import LineFile, read_metrics
from loop.memory.growth import Growth
from loop.memory.phases import Memory
from loop.metrics import RunLog, duration, trend
from tests.processes import Run

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "loss": 0.9}]) + '{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 2, 3]
    cut_back(path, 2)
    assert read_metrics(path) == lines
    cut_back(path, 2, evaluated=False)
    assert read_metrics(path) == lines[:3], "a run that was stopped before the evaluation makes it again"
    cut_back(path, 0)
    assert path.read_text() == ""


def test_damaged_lines_take_no_others_with_them(tmp_path):
    """Found: a hole of zero bytes dropped what followed, and a line without a step was a traceback."""
    path = tmp_path / "metrics.jsonl"
    good = ['{"step": 1, "loss": 1.5}', '{"step": 2, "loss": 1.25}', '{"step": 3, "loss": 1.0}']
    path.write_bytes((good[0] + "\n").encode() + b"\0" * 4096 + (good[1] + "\n").encode() + b'{"loss": 3}\n7\n\xff\xfe\n'
                     + b"[" * 100_000 + b"\n" + (good[2] + "\n").encode())
    assert [json.dumps(record) for record in read_metrics(path)] == good
    cut_back(path, 3)
    assert path.read_text().splitlines() == good


def test_a_full_disk_holds_lines_back_until_there_is_room(tmp_path):
    """Found: a traceback. Every line comes, in order and whole, once; a checkpoint is not written without them."""
    said, file = [], LineFile(tmp_path / "metrics.jsonl", lambda line: said.append(line))
    file.cut_back(0, True)
    lines = [json.dumps({"step": step, "filler": "x" * 100}) + "\n" for step in range(8)]
    file.append(lines[:2])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))  # room for two lines and a part of the third
        for line in lines[2:5]:
            file.append([line])
        with pytest.raises(ValueError, match="metrics.jsonl: 3 lines could not be written.*Make room"):
            file.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2]), "no part of a line"
    file.append(lines[5:])
    file.sync()
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)
    assert len(said) == 2 and "File too large" in said[0] and "wait until there is room" in said[0] and "again" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["removed", "renamed"])
def test_a_run_whose_directory_goes_away_says_so_and_saves(write_config, tmp_path, change):
    """Found: such a run ended well, without its metrics."""
    config = write_config(train__max_steps=100_000, checkpoint__every=100_000, eval__every=100_000)
    run = Run(ROOT / "train.py", "--config", config, directory=tmp_path)
    run_dir = tmp_path / "checkpoints/tiny"
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or '"step": 5,' not in (run_dir / "metrics.jsonl").read_text():
        assert run.running and time.monotonic() < deadline, run.said
        time.sleep(0.01)
    shutil.rmtree(run_dir, ignore_errors=True) if change == "removed" else run_dir.rename(tmp_path / "checkpoints/elsewhere")
    assert run.wait(60) == [2], run.said
    said = "stopped by checkpoints/tiny, which was removed or renamed while the run trained: saved checkpoints/tiny/step-"
    assert said in run.said
    assert checkpoint.newest(run_dir) is not None


def cut_back(path, step, evaluated=True):
    file = LineFile(path, print)
    file.cut_back(step, evaluated)
    file.close()


def test_a_log_that_cannot_be_written_is_said_and_passed_over(tmp_path, capsys):
    log = RunLog(tmp_path, str(tmp_path / "no" / "such.log"), CPU, enabled=True)
    log.say("hello")
    log.close()
    out = capsys.readouterr().out
    assert "no log is written" in out and "log=FILE" in out and "hello" in out


def test_a_log_on_a_full_disk_ends_without_the_run(tmp_path, capsys):
    log = RunLog(tmp_path, "/dev/full", CPU, enabled=True)
    log.say("hello")
    log.say("again")
    log.close()
    out = capsys.readouterr().out
    assert out.count("the log ends here: /dev/full: No space left") == 1 and "again" in out


def test_an_error_of_matplotlib_ends_no_run(tmp_path, capsys):
    """A rate of this size makes matplotlib overflow as it chooses the ticks; so may what it reads of its own settings."""
    log = RunLog(tmp_path, str(tmp_path / "log"), CPU, enabled=True)
    log.start(0, 5)
    for step in (1, 2):
        log.record({"step": step, "loss": 10**400 if step == 1 else 1.0})
        log.draw_pictures()
    log.close()
    out = capsys.readouterr().out
    assert out.count("the pictures are not drawn: OverflowError: ") == 1, out
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_pictures_are_drawn_beside_the_run_and_once_more_at_its_end(tmp_path):
    log = RunLog(tmp_path, str(tmp_path / "log"), CPU, enabled=True)
    log.start(0, 5)
    log.record({"step": 1, "loss": 2.0})
    log.draw_pictures()
    beside, picture = log.drawing, tmp_path / "curves.png"
    log.draw_pictures()
    assert log.drawing is beside, "one at a time"
    assert not picture.exists() and beside.wait(60) == 0
    first = picture.read_bytes()
    log.record({"step": 2, "loss": 1.0})
    log.close()
    assert picture.read_bytes() != first and (tmp_path / "memory.png").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "memory.png", "metrics.jsonl", "memory.jsonl", "log"}


def test_pictures_are_not_drawn_on_when_the_run_is_gone(tmp_path):
    command = [sys.executable, "-m", "loop.curves", tmp_path, "resident", "1"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 1 and not list(tmp_path.iterdir())


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, str(tmp_path / "log"), CPU, enabled=False)
    log.start(0, 5)
    log.eval(0, 1.0, {})
    log.say("hello")
    log.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_later_stage_says_itself_what_it_piles_up(tmp_path, capsys, make_step):
    memory = Memory(CPU)
    memory.growth.found, memory.growth.is_over = Growth(2, 2**20), True
    said = "memory grows by 1.0 MiB with every microbatch of step 2 (docs/debugging-memory.md)"
    for stage, expected in ((0, ""), (1, f"stage 1: {said}\n")):
        memory.growth.is_said = False
        log = RunLog(tmp_path, "", CPU, enabled=False, stage=stage)
        log.step(make_step([(8,)]), 5, loss=1.0, lr=0.1, grad_norm=1.0, skipped=False, step_s=1.0, memory=memory, marks=[])
        assert capsys.readouterr().out == expected


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = RunLog(tmp_path, str(tmp_path / "log"), CPU, enabled=True)
    log.start(0, 5)
    log.record({"step": 1, "loss": float("nan"), "lr": 0.1 + 0.2, "by": {"x": float("inf")}})
    log.close()
    written = (tmp_path / "metrics.jsonl").read_text()
    assert written == '{"step": 1, "loss": null, "lr": 0.30000000000000004, "by": {"x": null}}\n'


def test_a_line_says_step_loss_trend_speed_memory_and_time_left(write_config, run_train, capsys):
    run_train(write_config())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and "tokens/s" in line]
    assert len(lines) == 10
    assert re.fullmatch(r"step 10/10  loss \d\.\d{4} \(-\d\.\d{3} in 5 steps\)  [\d,]+ tokens/s  tensors 0\.\d+ GiB, "
                        r"process \d\.\d\d GiB  0 s left", lines[-1]), lines[-1]
    assert "in 5 steps" not in lines[2] and re.search(r"  \d+ s left$", lines[2])


@pytest.mark.parametrize("losses, said", [([], ""), ([2, 1, 1], ""), ([4, 2, 1, 1], " (-2.000 in 2 steps)"),
                                          ([9, 2, 2, 3, 3], " (+1.000 in 2 steps)")])
def test_the_trend_compares_the_last_steps_with_as_many_before(losses, said):
    assert trend(losses) == said


@pytest.mark.parametrize("seconds, said", [
    (0, "0 s"), (89, "89 s"), (90, "2 min"), (7199, "2 h 00 min"), (40_000, "11 h 07 min")])
def test_durations_are_read_at_a_glance(seconds, said):
    assert duration(seconds) == said
