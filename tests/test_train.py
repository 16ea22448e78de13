"""Whole runs of train.py: it learns, it resumes to the last bit, it stops where it should."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Run

ROOT = Path(__file__).parents[1]


def test_a_run_learns_and_leaves_everything_a_user_looks_for(finished_run, read_metrics):
    lines = read_metrics(finished_run)
    evals = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evals] == [0, 3, 4, 6, 8, 9, 10]
    assert evals[-1]["eval_loss"] < 0.85 * evals[0]["eval_loss"]
    assert set(evals[0]["eval_loss_by_source"]) == {"book", "game"}
    first = next(line for line in lines if "loss" in line)
    assert first.keys() >= {"step", "epoch", "loss", "lr", "grad_norm", "rows", "tokens", "supervised_tokens"}
    assert (first["rows"], first["epoch"]) == (8, 0)
    assert {p.name for p in finished_run.iterdir()} >= {"config.yaml", "metrics.jsonl", "curves.png", "data", "step-00000010"}
    for text in [(finished_run.parents[1] / name).read_text() for name in ("console.txt", "train.log")]:
        assert "step 10/10  loss" in text and "eval loss" in text and "saved" in text
    assert lines[-1]["step"] == 10


def test_a_finished_run_is_left_as_it_is(write_config, run_train):
    config = write_config(train__max_steps=4)
    assert run_train(config) == run_train(config)


def test_a_finished_run_says_so_before_it_reads_the_model(write_config, run_train, monkeypatch, capsys):
    """A second start took a minute: it read the weights, and then had nothing to do."""
    run_train(write_config(train__max_steps=2))
    monkeypatch.setattr("loop.run.build_empty", None)
    run_train(write_config(train__max_steps=2))
    assert "checkpoints/tiny is finished already, 2 of 2 steps. Train longer with train.epochs" in capsys.readouterr().out


def test_a_run_begins_with_the_adapter_of_another(finished_run, write_config, run_train, capsys):
    adapter = finished_run / "step-00000010"
    first, *_ = run_train(write_config(model__adapter=str(adapter), train__max_steps=1))
    last = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()][-1]
    assert first["step"] == 0 and first["eval_loss"] == last["eval_loss"]
    assert f"the adapters begin as those of {adapter}" in capsys.readouterr().out


@pytest.mark.parametrize("changes, message", [
    ({"lora__rank": 8}, "its r is 4, and this run's is 8, by the section lora:"),
    ({"lora__target": ["q_proj"]}, r"its target_modules is \['down_proj', .*, and this run's is \['q_proj'\]"),
    ({"model__adapter": "nowhere"}, "nowhere: no adapter_model.safetensors there. Expected the directory of an adapter")])
def test_an_adapter_of_other_settings_is_refused(finished_run, write_config, run_train, changes, message):
    with pytest.raises(ValueError, match=f"model.adapter: .*{message}"):
        run_train(write_config(**{"model__adapter": str(finished_run / "step-00000010"), **changes}))


def test_all_linears_are_adapted_by_one_word(write_config, run_train, tmp_path):
    run_train(write_config(lora__target="all-linear", train__max_steps=1))
    saved = tmp_path / "checkpoints/tiny/step-00000001"
    named = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert json.loads((saved / "adapter_config.json").read_text())["target_modules"] == named
    found = {name.split(".")[-3] for name in load_file(saved / "adapter_model.safetensors")}
    assert sorted(found) == named


def test_a_second_run_in_the_same_directory_is_refused(write_config, run_train, tmp_path):
    (tmp_path / "checkpoints/tiny").mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", (
        "import fcntl, sys; lock = open('checkpoints/tiny/.lock', 'a'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('taken', flush=True); sys.stdin.read()"
    )], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "taken\n"
    try:
        for override in ("resume=auto", "resume=never"):
            with pytest.raises(ValueError, match="checkpoints/tiny: another process trains there.*run=NAME"):
                run_train(write_config(), override)
    finally:
        holder.communicate()
    assert run_train(write_config(train__max_steps=1))[-1]["step"] == 1


def test_peft_loads_the_adapter(finished_run, tiny_llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    saved = finished_run / "step-00000010"
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, trust_remote_code=False)
    model = PeftModel.from_pretrained(base, saved)
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    on_disk = load_file(saved / "adapter_model.safetensors")
    assert len(on_disk) == len(loaded) == 2 * 2 * 3
    for name, tensor in on_disk.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)


def test_changed_settings_are_named_and_force_or_never_get_past_them(write_config, run_train, tmp_path):
    run_train(write_config(train__max_steps=2))
    with pytest.raises(ValueError, match="train.max_steps was 2, is 3.*resume=never.*resume=force"):
        run_train(write_config(train__max_steps=3))
    assert run_train(write_config(train__max_steps=3), "resume=force")[-1]["step"] == 3
    assert run_train(write_config(train__max_steps=2), "resume=never")[-1]["step"] == 2
    assert (tmp_path / "checkpoints/tiny.1/step-00000003").is_dir(), "the earlier run is kept"


def test_a_step_that_is_not_finite_is_skipped_and_its_rows_named(write_config, run_train, monkeypatch, capsys):
    from loop import accumulate

    honest = accumulate.hidden_states

    def broken(stage, microbatch):
        on_device, x_1TD = honest(stage, microbatch)
        return on_device, x_1TD * (float("nan") if 5 in microbatch.lines else 1)

    monkeypatch.setattr(accumulate, "hidden_states", broken)
    lines = [line for line in run_train(write_config(eval__max_rows=4, train__epochs=1)) if "lr" in line]
    skipped = [line for line in lines if line["skipped"]]
    assert len(skipped) == 1 and skipped[0]["loss"] is None and len(lines) == 5
    said = next(line for line in capsys.readouterr().out.splitlines() if "skipped" in line)
    assert "loss nan in the rows at lines" in said and " 5" in said
    assert lines[-1]["loss"] is not None, "the weights stayed finite"


def test_five_steps_in_a_row_that_are_not_finite_end_the_run(write_config, run_train, monkeypatch):
    from loop import accumulate

    monkeypatch.setattr(
        accumulate, "forward_backward", lambda stage, memory, batch: torch.full((len(batch.microbatches),), torch.nan))
    with pytest.raises(ValueError, match="not finite in 5 steps in a row, the last at step 5"):
        run_train(write_config())


@pytest.mark.slow
@pytest.mark.parametrize("compiles", [False, True])
def test_killed_at_any_step_and_run_again_a_run_is_the_uninterrupted_one(write_config, read_metrics, tmp_path, compiles):
    """Two ranks, int8 base, dropout, 8-bit optimizer; killed before the first checkpoint, after it, and after a resume."""
    def start(run):
        return Run(ROOT / "train.py", "--config", config, f"run={run}", ranks=2, directory=tmp_path)

    config = write_config(model__base="int8", lora__dropout=0.1, train__optimizer="adamw8bit", train__recompute=True,
                          train__compile=compiles)
    assert start("whole").wait() == [0, 0]
    whole = read_metrics(tmp_path / "checkpoints/whole")

    killed = tmp_path / "checkpoints/killed/metrics.jsonl"
    for num_lines in (3, 8, 12):
        run = start("killed")
        before = killed.read_text() if killed.exists() else None
        deadline = time.monotonic() + 120
        while run.running and time.monotonic() < deadline:
            text = killed.read_text() if killed.exists() else ""
            if text != before and text.count("\n") >= num_lines:
                break
            time.sleep(0.005)
        run.kill()
        assert killed.read_text().count("\n") < len(whole), "killed too late to show anything"
    run = start("killed")
    assert run.wait() == [0, 0] and "continuing from" in run.said and ("compiled code for" in run.said) == compiles
    assert read_metrics(tmp_path / "checkpoints/killed") == whole
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        paths = [tmp_path / f"checkpoints/{run}/step-00000010/{name}" for run in ("whole", "killed")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.slow
def test_two_ranks_compute_what_one_computes(write_config, run_train, read_metrics, tmp_path):
    config = write_config(train__epochs=1)
    alone = run_train(config, run="alone")
    assert Run(ROOT / "train.py", "--config", config, "run=two", ranks=2, directory=tmp_path).wait() == [0, 0]
    two = read_metrics(tmp_path / "checkpoints/two")
    assert len(alone) == len(two)
    for a, b in zip(alone, two):
        assert a["step"] == b["step"]
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-5), f"{key} at step {a['step']}"
    lines = [json.loads(line) for line in (tmp_path / "checkpoints/two/memory.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rank"]) for line in lines if "update" in line] == [(n, r) for n in range(1, 6) for r in (0, 1)]
    for line, other in zip(lines[::2], lines[1::2]):
        assert line.keys() == other.keys() and line["rank"] == 0 and other["rank"] == 1
        for phase in line.keys() - {"step", "rank"}:
            assert line[phase] != other[phase], "each rank's own"
            assert all(0.01 < size[phase]["gib"] <= size[phase]["peak_gib"] for size in (line, other))
    assert lines[0].keys() == {"step", "rank", "built", "loaded", "eval"}
    assert lines[2].keys() == {"step", "rank", "forward", "loss", "backward", "sync", "update"}


def test_the_largest_settings_overflow_nowhere(write_config, run_train):
    """Each used to have no bound: seeds over 64 bits and rates over float32 ended in tracebacks."""
    lines = run_train(write_config(), f"train.seed={2**63 - 1}", "train.learning_rate=1", "train.weight_decay=100",
                      "train.max_grad_norm=1e12", "lora.alpha=1000000", "train.epochs=100000", "train.max_steps=2",
                      f"distributed.timeout_s={7 * 24 * 3600}", "eval.every=1000000000", "data.max_tokens=16777216",
                      "train.microbatch_tokens=16777216", "train.rows_per_step=1000000000", "checkpoint.keep=1000000000")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


@pytest.mark.slow
def test_a_users_mistake_ends_in_one_line_without_a_traceback(write_config, tmp_path):
    config = write_config(data__train="no-such.jsonl")
    alone = Run(ROOT / "train.py", "--config", config, directory=tmp_path)
    assert alone.wait() == [2]
    command = [sys.executable, "-m", "loop.distributed.launch", "--nproc-per-node", "2",
               str(ROOT / "train.py"), "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launched = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert launched.returncode == 2
    for said in (alone.said, launched.stdout + launched.stderr):
        assert said.count("error: no-such.jsonl: No such file or directory") == 1 and "Traceback" not in said
