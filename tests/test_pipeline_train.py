"""Whole runs of pipeline_train.py from the literal command: cut anywhere, killed, resumed, and equal to train.py."""

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
from safetensors.torch import load_file

import pipeline_train
from model.tiny.write import write_tiny
from tests.processes import Run

ROOT = Path(__file__).parents[1]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def tiny_35b(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "35b", layout="fp8", num_hidden_layers=4)


@pytest.fixture
def moe_config(write_config, tiny_35b):
    def write(base):
        return write_config(
            model__path=str(tiny_35b), model__base=base, lora__target=TARGETS, train__learning_rate=0.003,
            train__microbatch_tokens=256, train__max_steps=6, train__optimizer="adamw8bit", checkpoint__every=2,
            checkpoint__keep=9,
        )

    return write


def torchrun(config, *arguments, **pipes):
    """`torchrun pipeline_train.py --config FILE ...`, torch's own launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", str(ROOT / "pipeline_train.py"), "--config", str(config),
               *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": "0"}
    return subprocess.Popen(command, env=environment, start_new_session=True, text=True, **pipes)


def steps(lines):
    """What a step or an evaluation found, without what depends on how it was computed."""
    kept = ("step", "loss", "lr", "grad_norm", "eval_loss", "rows", "supervised_tokens", "skipped")
    return [{key: line[key] for key in kept if key in line} for line in lines]


def assert_same_run(tmp_path, read_metrics, run, expected, tolerance):
    """Metrics of all steps, and the last checkpoint, up to rounding."""
    ours, theirs = (steps(line for line in read_metrics(tmp_path / "checkpoints" / name) if line.keys() & {"loss", "eval_loss"})
                    for name in (run, expected))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, rel=tolerance)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        mine, other = (load_file(tmp_path / f"checkpoints/{r}/step-00000006/{name}") for r in (run, expected))
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            norm = other[key].double().norm()
            assert (tensor.double() - other[key].double()).norm() <= tolerance * norm, key


def wait_for(condition, seconds=60, process=None):
    """Waits until a condition holds; fails when it does not in time, or when a process that should bring it about has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def tree(pid):
    """A process and all that descend from it, with the rank of each worker."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, todo = {}, [pid]
    while todo:
        parent = todo.pop()
        text = Path(f"/proc/{parent}/environ").read_bytes().decode(errors="replace")
        ranks = re.findall(r"\0RANK=(\d+)", text)
        line = Path(f"/proc/{parent}/cmdline").read_bytes()
        is_worker = bool(ranks) and b"torch.distributed.run" not in line and b"loop.distributed.launch" not in line
        found[parent] = int(ranks[0]) if is_worker else None
        todo += [child for child, of in parents.items() if of == parent]
    return found


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_the_35b_in_nf4_from_the_literal_command_killed_and_resumed_under_another_split(
        moe_config, run_train, read_metrics, tmp_path, tiny_35b, capfd):
    """Two stages until the launcher is killed, then three; the result is that of train.py. peft loads the adapter."""
    config = moe_config("nf4")
    run_dir = tmp_path / "checkpoints/split"
    process = torchrun(config, "--split", "3", "run=split", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    metrics = run_dir / "metrics.jsonl"
    wait_for(lambda: (run_dir / "step-00000002").is_dir() and '"step": 3' in metrics.read_text(), 240, process)
    processes = tree(process.pid)
    assert sorted(rank for rank in processes.values() if rank is not None) == [0, 1]
    os.kill(process.pid, signal.SIGKILL)
    said = process.communicate(timeout=30)[0]
    wait_for(lambda: all(is_gone(pid) for pid in processes), 30)
    assert "starting 2 processes, one for each of 2 stages" in said
    assert re.search(r"stage +device +sublayers +parameters +compute", said)
    assert re.search(r"1 +cpu \(rank 1\) +3 to 7 +[\d,]+ +[\d.]+ %", said)
    assert not (run_dir / "step-00000006").exists()

    run = Run(ROOT / "pipeline_train.py", "--config", config, "--split", "2,5", "run=split", "pipeline.schedule=1f1b",
              "train.router_stats=true", ranks=3, directory=tmp_path)
    assert run.wait() == [0, 0, 0] and "continuing from" in run.said and "with changed settings" not in run.said
    run_train(config, "train.router_stats=true", run="alone")
    routed = [[line for line in read_metrics(tmp_path / "checkpoints" / run) if "router" in line] for run in ("split", "alone")]
    assert list(routed[0][-1]["router"]) == list("0123") and routed[0][-1] == routed[1][-1]
    assert_same_run(tmp_path, read_metrics, "split", "alone", 1e-5)

    last = [line for line in read_metrics(run_dir) if "stage_busy_s" in line][-1]
    assert len(last["stage_busy_s"]) == len(last["stage_idle_s"]) == 3 and min(last["stage_busy_s"]) > 0
    memory = [json.loads(line) for line in (run_dir / "memory.jsonl").read_text().splitlines()]
    resumed = int(re.search(r"continuing from \S+/step-(\d+)", run.said)[1]) + 1  # saved when the launcher was gone
    expected = [(step, rank) for step in range(1, 7) for rank in range(2 if step < resumed else 3)]
    assert [(line["step"], line["rank"]) for line in memory if "update" in line] == expected
    assert all(line.keys() >= {"communicate", "forward", "backward"} for line in memory if "update" in line)
    assert {line["rank"] for line in memory if "loss" in line and line["step"] >= resumed} == {2}, "of the last stage alone"
    assert all(line.keys() - {"built", "loaded"} == {"step", "rank", "eval"}
               for line in memory if "eval" in line and line["step"] > 0)
    assert (run_dir / "memory.png").read_bytes().startswith(b"\x89PNG")
    from loop.pipeline.timeline import draw
    draw(run_dir / "timeline.json", tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 5000

    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(tiny_35b, dtype=torch.float32, trust_remote_code=False)
    saved = run_dir / "step-00000006"
    loaded = {name: p for name, p in PeftModel.from_pretrained(base, saved).named_parameters() if "lora_" in name}
    on_disk = load_file(saved / "adapter_model.safetensors")
    assert len(on_disk) == len(loaded) == 2 * (3 * 4 + 3 * 3 + 4)
    assert all(torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor) for name, tensor in on_disk.items())


@pytest.mark.slow
def test_the_35b_in_int8_goes_from_train_py_to_a_pipeline_and_back(moe_config, run_train, read_metrics, tmp_path):
    config = moe_config("int8")
    runs = tmp_path / "checkpoints"
    run_train(config, run="alone")
    shutil.copytree(runs / "alone", runs / "mixed")

    def forget(*gone):
        for step in gone:
            shutil.rmtree(runs / f"mixed/step-{step:08d}")

    forget(4, 6)
    run = Run(ROOT / "pipeline_train.py", "--config", config, "--split", "auto", "run=mixed", "pipeline.schedule=1f1b", ranks=2,
              directory=tmp_path)
    assert run.wait() == [0, 0] and "continuing from checkpoints/mixed/step-00000002" in run.said
    assert_same_run(tmp_path, read_metrics, "mixed", "alone", 1e-5)
    forget(2, 6)
    run_train(config, run="mixed")
    assert_same_run(tmp_path, read_metrics, "mixed", "alone", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_stage_that_fails_takes_the_run_down_and_each_other_says_what_it_waited_for(write_config, tmp_path, fault):
    timeout_s = 20  # the ranks of a busy machine start some seconds apart
    config = write_config(train__max_steps=5000, eval__every=5000, checkpoint__every=5000, distributed={"timeout_s": timeout_s})
    process = torchrun(config, "--split", "1,2", "run=fault", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = tmp_path / "checkpoints/fault/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, 240, process)
    processes = tree(process.pid)
    (last,) = [pid for pid, rank in processes.items() if rank == 2]
    os.kill(last, signal.SIGKILL if fault == "dies" else signal.SIGSTOP)
    started = time.monotonic()
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and time.monotonic() - started < 2 * timeout_s, "likewise"
    wait_for(lambda: all(is_gone(pid) for pid in processes), 30)
    lines = [line for line in errors.splitlines() if line.startswith("error:") and "waited for" in line]
    assert len(lines) == 2, errors
    assert "error: rank 2 was ended by SIGKILL" in errors, "it cannot say so itself"
    for rank, line in enumerate(sorted(lines)):
        assert line.startswith(f"error: rank {rank} (stage {rank}) waited for "), line
        # rarely it happens between the microbatches, in a sum over all ranks
        assert re.search(r"(stage \d \(rank \d\) to (send|take) the (output|gradient) of microbatch \d+ in step \d+"
                         r"|the other ranks to join in a sum)(: | when it was stopped by SIGTERM)", line), line
    assert errors.count("Traceback") == 1, "of torch's own launcher, the outer one"


def test_on_one_gpu_there_is_nothing_to_split(write_config, run_train, read_metrics, tmp_path, monkeypatch, capsys):
    config = write_config(train__max_steps=3, pipeline={"split": [2]})
    expected = run_train(config, run="alone")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the CPU plays its part
    monkeypatch.setattr(sys, "argv", ["pipeline_train.py", "--config", str(config), "run=whole"])
    pipeline_train.main()
    assert read_metrics(tmp_path / "checkpoints/whole") == expected
    output = capsys.readouterr().out
    assert "one GPU: there is nothing to split, the whole model trains on it" in output
    assert re.search(r"0 +cpu \(rank 0\) +0 to 3 .* 100.0 %", output)


def test_settings_of_the_pipeline_are_not_the_runs(write_config, run_train, tmp_path):
    config = write_config(train__max_steps=4)
    lines = run_train(config)
    assert run_train(config, "pipeline.split=1,3", "pipeline.schedule=1f1b") == lines
    assert "pipeline" not in json.dumps(json.loads((tmp_path / "checkpoints/tiny/step-00000004/state.json").read_text()))
