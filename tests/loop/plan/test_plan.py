"""The planner against real runs, against the targets of the true models, and what it says of wrong arguments."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loop.config import load_config
from loop.memory.phases import GIB
from loop.pipeline.split import Cost, RowLengths, sublayer_costs
from loop.plan import __main__ as plan
from loop.plan.advice import start_command
from loop.plan.seconds import Forecast
from loop.plan.workload import Workload
from loop.rates import CARDS
from model.tiny.write import write_tiny
from tests.processes import Run

ROOT = Path(__file__).parents[3]


def percent_off(monkeypatch, log, *arguments):
    """Measured against planned of each rank: what a run's last lines say, and what the planner says of the same settings."""
    said = [line for line in log.splitlines() if "measured" in line][-1]
    measured = [float(number) for number in re.findall(r"[\d.]+(?=,|\sGiB)", said.partition("measured")[2])]
    workload = read(monkeypatch, *arguments, "--device", "cpu", "--ranks", str(len(measured)))
    peaks = [workload.rank_plan(rank, worst_routing=False).peak.num_bytes / GIB for rank in range(len(measured))]
    return [100 * (taken / peak - 1) for taken, peak in zip(measured, peaks, strict=True)]


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": write_tiny(root / "qwen3", kind="qwen3", num_hidden_layers=4),
        "moe": write_tiny(root / "moe", num_hidden_layers=4, full_attention_interval=2, hidden_size=128, num_experts=4,
                          num_experts_per_tok=2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    [], ["train.recompute=false"], ["model.base=int8", "train.optimizer=adamw8bit", "train.microbatch_tokens=1024"],
    ["train.keep_layers=1", "model.base=bf16"], ["train.max_steps=1"]], ids=str)
def test_a_run_takes_what_was_planned(write_config, run_train, capsys, monkeypatch, settings):
    config = write_config(train__epochs=1)
    run_train(config, *settings)
    off, = percent_off(monkeypatch, capsys.readouterr().out, "--config", str(config), *settings)
    assert abs(off) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_so_does_a_mixture_of_experts(write_config, run_train, capsys, monkeypatch, tiny_models, kind):
    config = write_config(train__max_steps=4, eval__max_rows=4)
    settings = [f"model.path={tiny_models[kind]}", "model.base=nf4"]
    run_train(config, *settings)
    off, = percent_off(monkeypatch, capsys.readouterr().out, "--config", str(config), *settings)
    assert abs(off) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind, program", [
    ("qwen3", ["pipeline_train.py", "--split", "3", "pipeline.schedule=gpipe"]),
    ("moe", ["pipeline_train.py", "--split", "4", "pipeline.schedule=1f1b"]),
    ("moe", ["train.py"])])
def test_so_do_two_ranks(write_config, monkeypatch, tiny_models, tmp_path, kind, program):
    config = write_config(train__max_steps=4, eval__max_rows=4)
    arguments = [*program[1:], "--config", str(config), f"model.path={tiny_models[kind]}", "model.base=nf4",
                 "train.microbatch_tokens=256"]
    run = Run(ROOT / program[0], *arguments, ranks=2, directory=tmp_path)
    assert run.wait() == [0, 0], run.said
    split = [] if "--split" in arguments else ["--split", "none"]
    off = percent_off(monkeypatch, run.said, *arguments, *split)
    assert len(off) == 2 and all(abs(percent) <= 3 for percent in off)


def read(monkeypatch, *arguments):
    """What a plan is made for, as the command reads it."""
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    args = plan.parse()
    return plan.read_workload(args, load_config(args.config, args.overrides))


def planned(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    plan.main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_targets_of_the_true_models(capsys, monkeypatch):
    """One rank each; bench/memory.py has them all."""
    monkeypatch.chdir(ROOT)
    for config, limit, settings in (("4b", 8.0, ["--split", "none"]), ("35b", 13.5, ["pipeline.schedule=1f1b"])):
        args = ["--config", f"configs/{config}.yaml", "--device", "cuda", *settings]
        peak = read(monkeypatch, *args).rank_plan(0, worst_routing=False).peak
        assert peak.num_bytes / GIB <= limit
        assert sum(peak.held.values()) == peak.num_bytes


@pytest.mark.slow
@pytest.mark.parametrize("shape", sorted(ROOT.glob("configs/models/*.json")), ids=lambda shape: shape.stem)
def test_every_shape_that_is_built_in_can_be_planned(write_config, shape):
    """The last four layers and the head, with few tokens."""
    config = load_config(write_config(), ["model.base=nf4", "lora.target=all-linear", "train.microbatch_tokens=128"])
    lengths = RowLengths(64, 64, 32, 0.5)
    costs = sublayer_costs(shape, config, lengths)
    workload = Workload(config, shape, "cuda", 2, 2, None, lengths, split=(len(costs) - 8,), generation=12)
    held = workload.rank_plan(1).peak.held
    assert held["weights"] + held["adapters"] == pytest.approx(sum(costs[-8:], Cost()).num_bytes, rel=0.01)
    assert Forecast(workload, CARDS["rtx5090"]).step(workload.split, 0).seconds > 0


def test_the_plan_says_what_the_other_schedule_would_hold(capsys, monkeypatch, write_config, tiny_models):
    """Where that is much less: not with as many microbatches as stages, and not under 1f1b itself."""
    config = str(write_config())
    arguments = ["--config", config, f"model.path={tiny_models['qwen3']}", "--split", "4", "--device", "cuda",
                 "train.rows_per_step=16", "--row-tokens", "128"]
    many, few = "train.microbatch_tokens=128", "train.microbatch_tokens=1024"
    said = planned(capsys, monkeypatch, *arguments, many)
    said = re.findall("with pipeline.schedule=1f1b: (.*) GiB on each, and as fast", said)
    answer = json.loads(planned(capsys, monkeypatch, *arguments, many, "pipeline.schedule=1f1b", "--json"))
    assert [float(gib) for gib in said] == [round(max(rank["peak_gib"] for rank in answer["ranks"]), 1)]
    for settings in ([few], [many, "pipeline.schedule=1f1b"]):
        assert "with pipeline.schedule" not in planned(capsys, monkeypatch, *arguments, *settings)


@pytest.mark.slow
def test_a_stage_that_is_built_once_shows_the_same_under_each_setting(monkeypatch, write_config, tiny_models):
    arguments = ["--config", str(write_config()), f"model.path={tiny_models['moe']}", "--split", "4", "--device", "cuda"]
    workload = read(monkeypatch, *arguments)
    for settings in ({"microbatch_tokens": 256}, {"keep_layers": 2}, {"recompute": False}, {}):
        other = workload.with_train(**settings)
        reused, alone = (one.rank_plan(1) for one in (other, replace(other, built={})))
        assert reused.peak.num_bytes == alone.peak.num_bytes and reused.peak.held == alone.peak.held
        assert reused.worst.num_bytes == alone.worst.num_bytes
    assert len(workload.built) == 1


@pytest.mark.parametrize("config_file, given, split, expected", [
    ("configs/4b.yaml", [], (), "bash launch.sh 4b train.recompute=false"),
    ("configs/35b.yaml", ["run=mine"], (40,), "bash launch.sh 35b run=mine train.recompute=false"),
    ("configs/35b.yaml", [], (), "torchrun train.py --config configs/35b.yaml train.recompute=false"),
    ("configs/30b.yaml", ["train.recompute=true"], (48,),
     "torchrun pipeline_train.py --config configs/30b.yaml train.recompute=false")])
def test_the_recommendation_is_a_command(write_config, config_file, given, split, expected):
    lengths, stages = RowLengths(64, 64, 32, 0.5), len(split) + 1
    workload = Workload(load_config(write_config()), Path(), "cuda", stages, stages, None, lengths, split)
    assert start_command(config_file, given, workload, ["train.recompute=false"]) == expected


def test_json_adds_up(capsys, monkeypatch, write_config):
    ranks = json.loads(planned(capsys, monkeypatch, "--config", str(write_config()), "--ranks", "3", "--json"))["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1, 2] and {rank["stage"] for rank in ranks} == {0}
    for rank in ranks:
        assert sum(rank["held_gib"].values()) == pytest.approx(rank["peak_gib"])
        assert rank["peak_gib"] > 0 and ".py:" in rank["line"] and rank["fits"] is True


@pytest.mark.slow
def test_a_card_that_is_too_small_is_said_so_and_fit_finds_what_fits(capsys, monkeypatch, write_config):
    config = str(write_config())
    whole = planned(capsys, monkeypatch, "--config", config, "--card", "1.0005")
    assert "DOES NOT FIT" in whole and "backward of microbatch" in whole or "loss of microbatch" in whole
    best = planned(capsys, monkeypatch, "--config", config, "--fit", "--card", "2", "--ranks", "1")
    table = [re.split(r"  +", line) for line in best.splitlines() if re.match(r"current|\d\. fastest", line)]
    assert table[0][:3] == ["current settings", "512", "0 of 2"] and [row[0] for row in table[1:]] == [
        "1. fastest", "2. fastest", "3. fastest"]
    assert all(row[2] == "2 of 2" for row in table[1:]), "a tiny model fits without any recomputation"
    command = next(line for line in best.splitlines() if line.startswith("  torchrun "))
    assert command.startswith(f"  torchrun train.py --config {config} ") and "train.recompute=false" in command
    assert "GiB of a card unused" in best and "4 times the rank: " in best
    with pytest.raises(ValueError, match="nothing fits a card of 1.0005 GiB"):
        planned(capsys, monkeypatch, "--config", config, "--fit", "--card", "1.0005")


@pytest.mark.parametrize("arguments, message", [
    (["model.path=nowhere/at-all"], "shapes are built in: Qwen3-0.6B, Qwen3-1.7B, Qwen3-14B"),
    (["--split", "99"], "the model has 4 sublayers"),
    (["--split", "2", "--ranks", "3"], "--ranks 3: expected a multiple of 2"),
    (["--split", "here"], "pipeline.split is 'here', expected sublayer numbers"),
    (["--ranks", "9"], "--ranks 9: train.rows_per_step=8 leaves some of the 9 replicas without a row"),
    (["train.keep_layers=5"], "train.keep_layers is 5, but the stage has 2 layers"),
    (["train.keep_layers=1", "train.recompute=false"], "train.recompute is false: all are kept"),
    (["model.path=Qwen/Qwen3.5-35B-A3B", "train.microbatch_tokens=128", "data.max_tokens=8192"], "the 1,730 tokens of a row"),
    (["model.path=broken"], "broken/config.json: not valid JSON"),
    (["model.path=list"], "list/config.json: found a list, expected an object"),
])
def test_mistakes_are_named(capsys, monkeypatch, write_config, arguments, message):
    config = str(write_config())
    for name, text in (("broken", '{"model_type": "qwen3", '), ("list", "[1]")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        planned(capsys, monkeypatch, "--config", config, *arguments)


def test_other_settings_are_tried_and_one_rank_is_planned_alone(capsys, monkeypatch, write_config):
    arguments = ["--config", str(write_config()), "--ranks", "2", "--rank", "1", "--try", "train.recompute=false",
                 "--try", "train.keep_layers=9"]
    first, recomputing, failed = map(json.loads, planned(capsys, monkeypatch, *arguments, "--json").splitlines())
    assert [rank["rank"] for rank in first["ranks"]] == [1]
    assert recomputing["setting"] == "train.recompute=false" and recomputing["peak_gib"] > first["ranks"][0]["peak_gib"]
    assert "keep_layers is 9, but the stage has 2 layers" in failed["error"]
    said = planned(capsys, monkeypatch, *arguments).splitlines()
    assert said[-2].startswith("train.recompute=false  ") and said[-2].endswith("GiB at most")
    assert said[-1].startswith("train.keep_layers=9: not planned, ValueError: ")
    with pytest.raises(ValueError, match="--rank 2: expected one of 2 ranks, counted from 0"):
        planned(capsys, monkeypatch, *arguments[:5], "2")
