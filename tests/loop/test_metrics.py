"""metrics.jsonl survives what a crash leaves, and the console says what the file says."""

import json

import torch

from loop.metrics import RunLog, open_cut_back, read_metrics

CPU = torch.device("cpu")


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "loss": 0.9}]) + '{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 2, 3]
    open_cut_back(path, 2).close()
    assert read_metrics(path) == lines
    open_cut_back(path, 0).close()
    assert path.read_text() == ""


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


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, str(tmp_path / "log"), CPU, enabled=False)
    log.start(0, 5)
    log.eval(0, 1.0, {})
    log.say("hello")
    log.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = RunLog(tmp_path, str(tmp_path / "log"), CPU, enabled=True)
    log.start(0, 5)
    log.record({"step": 1, "loss": float("nan"), "lr": 0.1 + 0.2, "by": {"x": float("inf")}})
    log.close()
    written = (tmp_path / "metrics.jsonl").read_text()
    assert written == '{"step": 1, "loss": null, "lr": 0.30000000000000004, "by": {"x": null}}\n'
