"""The planner against real runs, against the targets of the true models, and what it says of wrong arguments."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loop import plan
from loop.memory import GIB
from model.tiny import write_tiny

ROOT = Path(__file__).parents[2]


def percent_off(log):
    """Measured against planned of each rank, as a run's last lines have it."""
    said = [line for line in log.splitlines() if "measured" in line][-1]
    return [float(number) for number in re.findall(r"([+-][\d.]+) %", said)]


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": write_tiny(root / "qwen3", kind="qwen3", num_hidden_layers=4),
        "moe": write_tiny(root / "moe", num_hidden_layers=4, full_attention_interval=2, hidden_size=128),
    }


@pytest.mark.parametrize("settings", [
    [], ["train.recompute=false"], ["model.base=int8", "train.optimizer=adamw8bit", "train.microbatch_tokens=1024"],
    ["train.keep_layers=1", "model.base=bf16"], ["train.max_steps=1"]], ids=str)
def test_a_run_takes_what_was_planned(write_config, run_train, capsys, settings):
    run_train(write_config(train__epochs=1), *settings)
    off, = percent_off(capsys.readouterr().out)
    assert abs(off) <= 3


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_so_does_a_mixture_of_experts(write_config, run_train, capsys, tiny_models, kind):
    run_train(write_config(train__max_steps=4, eval__max_rows=4), f"model.path={tiny_models[kind]}", "model.base=nf4")
    off, = percent_off(capsys.readouterr().out)
    assert abs(off) <= 3


@pytest.mark.parametrize("kind, program", [
    ("qwen3", ["pipeline_train.py", "--split", "3", "pipeline.schedule=gpipe"]),
    ("moe", ["pipeline_train.py", "--split", "4", "pipeline.schedule=1f1b"]),
    ("moe", ["train.py"])])
def test_so_do_two_ranks(write_config, tiny_models, tmp_path, kind, program):
    config = write_config(train__max_steps=4, eval__max_rows=4)
    command = [sys.executable, "-m", "loop.launch", "--standalone", "--nproc-per-node", "2", str(ROOT / program[0]),
               *program[1:], "--config", str(config), f"model.path={tiny_models[kind]}", "model.base=nf4",
               "train.microbatch_tokens=256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env={
        "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    off = percent_off(done.stdout)
    assert len(off) == 2 and all(abs(percent) <= 3 for percent in off)


def test_a_run_goes_on_without_a_plan(write_config, run_train, capsys, monkeypatch):
    from loop import forecast

    def broken(*args, **kwargs):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(forecast, "rehearse", broken)
    lines = run_train(write_config(train__max_steps=2))
    said = capsys.readouterr()
    assert "memory could not be planned (NotImplementedError: no such kernel)" in said.err
    assert "not planned, measured" in said.out and len([line for line in lines if "lr" in line]) == 2


def planned(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    plan.main()
    return capsys.readouterr().out


def test_targets_of_the_true_models(capsys, monkeypatch):
    """One rank each; bench/memory.py has them all."""
    monkeypatch.chdir(ROOT)
    for config, limit, settings in (("4b", 8.0, ["--split", "none"]), ("35b", 13.5, ["pipeline.schedule=1f1b"])):
        args = ["--config", f"configs/{config}.yaml", "--device", "cuda", *settings]
        monkeypatch.setattr(sys, "argv", ["plan", *args])
        workload = plan.read_workload(plan.parse())
        peak = workload.plan(0, worst_routing=False).peak
        assert peak.num_bytes / GIB <= limit
        assert sum(peak.held.values()) == peak.num_bytes


def test_json_adds_up(capsys, monkeypatch, write_config):
    ranks = json.loads(planned(capsys, monkeypatch, "--config", str(write_config()), "--ranks", "3", "--json"))["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1, 2] and {rank["stage"] for rank in ranks} == {0}
    for rank in ranks:
        assert sum(rank[f"{name}_gib"] for name in plan.CATEGORIES) == pytest.approx(rank["peak_gib"])
        assert rank["peak_gib"] > 0 and ".py:" in rank["line"] and rank["fits"] is True


def test_a_card_that_is_too_small_is_said_so_and_fit_finds_what_fits(capsys, monkeypatch, write_config):
    config = str(write_config())
    whole = planned(capsys, monkeypatch, "--config", config, "--card", "1.0005")
    assert "DOES NOT FIT" in whole and "backward of microbatch" in whole or "loss of microbatch" in whole
    best = planned(capsys, monkeypatch, "--config", config, "--fit", "--card", "2", "--ranks", "1")
    assert "train.recompute=false" in best, "a tiny model fits without any recomputation"
    with pytest.raises(ValueError, match="nothing fits a card of 1.0005 GiB"):
        planned(capsys, monkeypatch, "--config", config, "--fit", "--card", "1.0005")


@pytest.mark.parametrize("arguments, message", [
    (["model.path=nowhere/at-all"], "shapes are built in: Qwen3-4B-Thinking-2507, Qwen3.5-35B-A3B"),
    (["--split", "99"], "the model has 4 sublayers"),
    (["--split", "2", "--ranks", "3"], "--ranks 3: expected a multiple of 2"),
    (["--split", "here"], "--split here: expected sublayer numbers"),
    (["--ranks", "9"], "--ranks 9: train.rows_per_step=8 leaves some of the 9 replicas without a row"),
    (["train.keep_layers=5"], "train.keep_layers is 5, but the stage has 2 layers"),
    (["train.keep_layers=1", "train.recompute=false"], "train.recompute is false: all are kept"),
    (["model.path=Qwen/Qwen3.5-35B-A3B", "train.microbatch_tokens=128", "data.max_tokens=8192"], "the 1,730 tokens of a row"),
    (["model.path=broken"], "broken/config.json: not valid JSON"),
    (["model.path=list"], "list/config.json: model_type, hidden_size"),
])
def test_mistakes_are_named(capsys, monkeypatch, write_config, arguments, message):
    config = str(write_config())
    for name, text in (("broken", '{"model_type": "qwen3", '), ("list", "[1]")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        planned(capsys, monkeypatch, "--config", config, *arguments)
