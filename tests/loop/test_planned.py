"""The plan beside a run: what the loop is edited to do there reaches nobody, and a run does not depend on it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loop import planned
from loop.config import load_config
from loop.distributed.groups import Ranks
from loop.memory.growth import Growth
from loop.planned import Plan, comparison, sentence

START = ("    losses = []\n    for number, microbatch in enumerate(batch.microbatches):\n"
         "        with memory.during(\"forward\", number):\n            on_device, x_1TD = hidden_states(stage, microbatch)\n"
         "        with memory.during(\"loss\"")
END = "        losses.append(loss.detach())\n"
PRINT = "        print(\"MY LOSS\", float(loss), type(loss).__name__)\n"
ASSERT = "        assert losses[0] > 1.5\n"  # what is read from a tensor is 1 or true in a plan
GUARD = "        if torch.isnan(loss).any():\n            raise ValueError(\"not a number\")\n"
EDITS = {  # of forward_backward, and whether the plan survives it
    "prints, assert, counter": (
        [(END, END + PRINT + ASSERT), ("def forward_backward(", "COUNT = 0\n\n\ndef forward_backward("),
         (START, "    global COUNT\n    COUNT += 1\n    print(\"COUNT\", COUNT)\n" + START)], True),
    "guard": ([(END, END + GUARD)], False),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_loop_breaks_nothing_but_the_loop(write_config, edited_copy, run_copy, run_train, read_metrics, tmp_path,
                                                         edit):
    config = write_config(train__max_steps=3, eval__max_rows=4)
    expected = run_train(config, run="plain")
    changes, survives = EDITS[edit]
    patience = [("WAIT_S = 60", "WAIT_S = 200")]  # for a busy machine
    copy = edited_copy({"loop/accumulate.py": changes, "loop/planned.py": patience})
    done = run_copy(copy, config, "train.plan=true")
    assert read_metrics(tmp_path / "checkpoints/tiny") == expected
    lines = [line for line in done.stdout.splitlines() if not re.match(r"step \d", line)]
    said = {
        "planned": [line for line in lines if line.startswith("planned peak of tensors")],
        "compared": [line for line in lines if line.startswith("peak of tensors: ")],
        "printed": [line for line in lines if re.match("MY LOSS|COUNT", line)],
    }
    rest = [line for line in lines if not any(line in of_kind for of_kind in said.values())]
    assert [line.split()[0] for line in rest] == ["40", "saved", "finished:"], "nothing else is on the console"
    assert len(said["planned"]) == survives and ("not planned" in said["compared"][0]) != survives
    counted, printed = ([line for line in said["printed"] if line.startswith(word)] for word in ("COUNT", "MY LOSS"))
    if edit == "guard":
        assert not said["printed"]
    else:
        assert counted == ["COUNT 1", "COUNT 2", "COUNT 3"], "those of the plan are its own"
        assert printed and all(line.endswith("Tensor") and "Fake" not in line for line in printed)
    assert "Traceback" not in done.stderr and "Fake" not in done.stderr


@pytest.mark.slow
def test_the_plan_is_the_planners_and_ends_with_its_run(write_config, run_train, capsys, monkeypatch):
    """The process sees no GPU and nothing of a launcher, and takes what the run has tokenized."""
    config_file = write_config(train__epochs=1)
    run_train(config_file)
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(planned, "WAIT_S", 240)  # for a busy machine
    config, arrived = load_config(config_file, ["train.plan=true"]), []
    plan = Plan(config, Ranks(), lambda line, records: arrived.append((line, records)))
    environment = Path(f"/proc/{plan.process.pid}/environ").read_text().split("\0")
    assert "CUDA_VISIBLE_DEVICES=" in environment and "OMP_NUM_THREADS=1" in environment
    assert not [setting for setting in environment if setting.startswith(("WORLD_SIZE", "TORCHELASTIC"))]
    assert os.getpriority(os.PRIO_PROCESS, plan.process.pid) == planned.NICENESS
    said = plan.comparison([0.0123])
    ((line, (record,)),) = arrived
    planned_gib = record["peak_gib"]
    assert sum(record["kinds_gib"].values()) == pytest.approx(planned_gib) and record["kinds_gib"]["attention"] > 0
    assert re.match(rf"planned peak of tensors: {planned_gib:.3g} GiB; on rank 0 in the (loss|backward) of microbatch", line)
    assert said.startswith(f"peak of tensors: planned {planned_gib:.3g} GiB, measured 0.0123 GiB (")
    assert plan.process.returncode is not None
    command = [sys.executable, "-m", "loop.plan", "--config", str(config_file), "--split", "none", "--json", "--device", "cpu"]
    whole = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(planned.ROOT)})
    assert json.loads(whole.stdout)["ranks"][0]["peak_gib"] == planned_gib


@pytest.mark.slow
def test_after_a_resume_the_steps_that_are_left_are_planned(write_config, run_train, capsys, monkeypatch, tmp_path):
    """Step 8 is the largest. A start after it measures less, and so plans less."""
    monkeypatch.setattr(planned, "WAIT_S", 240)  # for a busy machine
    config = write_config(train__plan=True, checkpoint__every=2, checkpoint__keep=9, eval__every=100)
    compared = []
    for _ in range(2):
        run_train(config)
        said = capsys.readouterr().out
        compared += re.findall(r"peak of tensors: planned (\S+) GiB, measured (\S+) GiB \((\S+) %\)", said)
        shutil.rmtree(tmp_path / "checkpoints/tiny/step-00000010")
    whole, resumed = compared
    assert "continuing from checkpoints/tiny/step-00000008" in said
    assert float(resumed[1]) < 0.9 * float(whole[1]), "else this test shows nothing"
    assert abs(float(whole[2])) < 1 and abs(float(resumed[2])) < 1


@pytest.mark.slow
def test_it_dies_with_the_process_that_started_it(write_config):
    code = ("import sys, time, torch\nfrom loop.planned import start_process\nfrom loop.config import load_config\n"
            "from loop.distributed.groups import Ranks\n"
            f"print(start_process(load_config({str(write_config())!r}), Ranks()).pid, flush=True)\ntime.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(planned.ROOT)})
    child = Path("/proc") / parent.stdout.readline().strip()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 240  # at low priority, on a busy machine: it looks for its parent once it has imported torch
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists()


def test_a_plan_that_does_not_come_is_not_waited_for_long(write_config, monkeypatch, tmp_path):
    sleeping = tmp_path / "sleeping"
    sleeping.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeping.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeping))
    monkeypatch.setattr(planned, "WAIT_S", 0.2)
    plan = Plan(load_config(write_config(), ["train.plan=true"]), Ranks(), lambda *_: None)
    started = time.monotonic()
    assert plan.comparison([1.5]) == "peak of tensors: not planned, measured 1.50 GiB"
    assert time.monotonic() - started < 10 and plan.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("executable", ["/bin/false", "/no/such/program"])
def test_a_plan_that_fails_or_cannot_be_started_costs_the_run_nothing(write_config, monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    plan = Plan(load_config(write_config(), ["train.plan=true"]), Ranks(), lambda *_: pytest.fail("planned"))
    said = plan.comparison([1.5])
    assert said.startswith("peak of tensors: not planned, measured 1.50 GiB")
    assert ("shows why" in said) == ("false" in executable)


def test_only_rank_0_plans_and_only_if_it_is_wanted(write_config, monkeypatch):
    monkeypatch.setattr(planned, "start_process", lambda *_: pytest.fail("started"))
    config = write_config()
    assert Plan(load_config(config), Ranks(), lambda *_: None).process is None
    assert Plan(load_config(config, ["train.plan=true"]), Ranks(1, 2), lambda *_: None).process is None


def test_what_is_said():
    records = [{"peak_gib": 0.5, "moment": "backward of microbatch 1", "held_gib": {"weights": 0.3, "logits": 0.001}},
               {"peak_gib": 12.3456}]
    assert sentence(records) == ("planned peak of tensors: 0.5, 12.35 GiB; on rank 0 in the backward of microbatch 1: "
                                 "weights 0.30")
    assert comparison([0.5, 12.0], [0.51, 12.0]).endswith("planned 0.5, 12.00 GiB, measured 0.51, 12.00 GiB (+2.0 %, +0.0 %)")
    assert comparison([0.5], [0.5], Growth(1, 3 * 2**20)).endswith(
        "(+0.0 %, both with the 3.0 MiB that each microbatch leaves behind)")
    assert comparison([0.5], [0.0]) == "planned peak of tensors: 0.5 GiB; no step was measured"
    assert torch.equal(torch.tensor(planned.measured_gib(2**30, Ranks())), torch.ones(1))
