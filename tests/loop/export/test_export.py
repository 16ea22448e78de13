"""The command: what it writes loads elsewhere, is there whole or not at all, and is proved first."""

import fcntl
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from data.template import FILES
from loop import checkpoint
from loop.export import __main__ as export
from loop.export import write
from loop.run import Trained
from model.config import LoraConfig
from model.tiny.write import write_tiny

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"llama": LINEARS, "qwen3": LINEARS, "qwen3_5_moe": LINEARS + ["in_proj_qkv", "in_proj_z", "out_proj"]}


@pytest.fixture
def command(monkeypatch):
    """Runs the command in this process."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["loop.export", *map(str, arguments)])
        export.main()

    return run


@pytest.fixture
def trained(write_config, run_train, tmp_path):
    """Trains a tiny model of a kind for a few steps; returns the run's directory."""
    def train(kind="llama", layout="fused", base="float32", **changes):
        write_tiny(tmp_path / "model", kind=kind, layout=layout, num_hidden_layers=4)
        run_train(write_config(model__path="model", model__base=base, lora__target=TARGETS[kind], train__max_steps=4,
                               train__learning_rate=0.02, **changes))
        return tmp_path / "checkpoints/tiny"

    return train


@pytest.mark.slow
@pytest.mark.parametrize("kind, layout, base, experts, options", [
    ("llama", "fused", "float32", False, ["--format", "adapter"]),
    ("qwen3_5_moe", "per-expert", "float32", True, ["--format", "adapter", "--for", "vllm"]),
    ("qwen3", "fused", "int8", False, []),
    ("qwen3_5_moe", "fused", "nf4", False, ["--base-weights", "as-trained", "--dtype", "float32"]),
    ("qwen3_5_moe", "fp8", "bf16", True, ["--base-weights", "original"]),
])
def test_what_is_exported_is_proved_first(trained, command, tmp_path, capsys, kind, layout, base, experts, options):
    run_dir = trained(kind, layout, base, lora__experts=experts)
    path = run_dir / "step-00000004"
    command(path, tmp_path / "out", *options)
    said = capsys.readouterr().out
    assert f"exported: {tmp_path / 'out'}" in said
    record = json.loads((tmp_path / "out" / export.RECORD).read_text())
    assert record["checkpoint"] == str(path) and record["figures"]["logits of the untuned model"] > 1e-3
    assert not list(tmp_path.glob(".out*"))
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    if "adapter" in options:
        inner = "language_model.layers" if kind == "qwen3_5_moe" and "vllm" in options else "layers"
        names = set(load_file(tmp_path / "out/adapter_model.safetensors"))
        assert names == {name.replace("model.layers", f"model.{inner}") for name in load_file(path / checkpoint.ADAPTER)}
        base_name = checkpoint.read_json(tmp_path / "out/adapter_config.json")["base_model_name_or_path"]
        assert base_name == str(tmp_path / "model")
    with pytest.raises(ValueError, match="out: is there already, and is not overwritten"):
        command(run_dir, tmp_path / "out", *options)


def drop(directory):
    file = directory / checkpoint.ADAPTER
    save_file({name: 0 * tensor if "lora_B" in name else tensor for name, tensor in load_file(file).items()}, file)


def rename(directory):
    file = directory / checkpoint.ADAPTER
    save_file({name.replace("model.layers", "model.language_model.layers"): tensor for name, tensor in load_file(file).items()},
              file)


def reopen(directory):
    (directory / "chat_template.jinja").write_text((directory / "chat_template.jinja").read_text() + "<think>")


@pytest.mark.parametrize("damage, problem", [
    (drop, "dropped"), (rename, "peft does not load every adapter"), (reopen, "renders another prompt than training"),
])
def test_what_is_not_what_was_trained_is_not_exported(finished_run, command, tmp_path, monkeypatch, damage, problem):
    honest = write.write

    def damaged(trained, form, directory):
        honest(trained, form, directory)
        damage(directory)

    monkeypatch.setattr(write, "write", damaged)
    with pytest.raises(ValueError, match=problem):
        command(finished_run, tmp_path / "out", "--format", "adapter")
    assert not list(tmp_path.iterdir())


def test_an_export_can_be_proved_again_where_it_was_moved(finished_run, command, tmp_path, capsys):
    command(finished_run, tmp_path / "out", "--format", "adapter")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    command("--verify", moved)
    shutil.copytree(finished_run, tmp_path / "run")
    command(tmp_path / "run", "--verify", moved)
    assert f"{moved} computes what {tmp_path / 'run'}/step-" in capsys.readouterr().out
    with pytest.raises(ValueError, match="http://127.0.0.1:9/v1/models: no reply"):
        command(moved, "--prove", "http://127.0.0.1:9")
    drop(moved)
    with pytest.raises(ValueError, match="dropped"):
        command("--verify", moved)
    (moved / export.RECORD).write_text('{"form": {"kind": "peft"}}')
    with pytest.raises(ValueError, match="export.json: expected what python -m loop.export writes"):
        command("--verify", moved)


def test_killed_at_any_sync_it_leaves_nothing_under_the_name(finished_run, command, tmp_path, monkeypatch):
    """A killed process cleans nothing up; the next one does. The last sync is that of the new name."""
    honest, synced = write.sync, []
    monkeypatch.setattr(export, "proved", lambda *_: {})

    def sync(path):
        synced.append(path)
        if len(synced) == call:
            raise KeyboardInterrupt
        honest(path)

    call, directory = 0, tmp_path / "whole"
    monkeypatch.setattr(write, "sync", sync)
    command(finished_run, directory / "out", "--format", "adapter")
    expected, num_syncs = {path.name for path in (directory / "out").iterdir()}, len(synced)
    assert num_syncs == len(expected) + 2 and expected > {export.RECORD, checkpoint.ADAPTER, *FILES}
    directory = tmp_path / "killed"
    for call in range(1, num_syncs):
        synced.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            command(finished_run, directory / "out", "--format", "adapter")
        assert [path.name for path in directory.iterdir()] == [".out.partial"]
    (directory / "..out.partial-offloaded-x").mkdir()
    call = 0
    command(finished_run, directory / "out", "--format", "adapter")
    assert {path.name for path in directory.rglob("*")} == {"out", *expected}


def test_one_process_writes_at_a_time_and_room_is_made_first(finished_run, command, tmp_path, monkeypatch):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "of another process").touch()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="out: another process writes it"):
        command(finished_run, tmp_path / "out")
    assert (partial / "of another process").exists()
    os.close(lock)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    with pytest.raises(ValueError, match=r"out: takes 0.0 GB, 0.1 GB are free. Make room"):
        command(finished_run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_base_model_is_refused(trained, command, tmp_path):
    run_dir = trained()
    write_tiny(tmp_path / "other", kind="llama", num_hidden_layers=4, seed=1)
    with pytest.raises(ValueError, match="other: another model than the one that .*step-00000004 was trained on"):
        command(run_dir, tmp_path / "out", "--set", f"model.path={tmp_path / 'other'}")


def test_vllm_is_given_no_experts_that_it_would_not_find(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"}')
    config = SimpleNamespace(lora=LoraConfig(4, 8, ("q_proj",), experts=True), model=SimpleNamespace(path=str(tmp_path)))
    with pytest.raises(ValueError, match="routed experts for a ...ForConditionalGeneration only.*Take --format merged"):
        write.write_adapter(Trained(tmp_path, config, tmp_path, "", None), for_vllm=True, directory=tmp_path)


@pytest.mark.parametrize("arguments, problem", [
    ([], "expected RUN_OR_CHECKPOINT OUT, or"), (["run"], "expected RUN_OR_CHECKPOINT OUT, or"),
    (["run", "out", "--prove", "URL"], "expected RUN_OR_CHECKPOINT OUT, or"),
    (["run", "out", "--for", "vllm"], "--for vllm chooses the names of an adapter: add --format adapter"),
    (["run", "out", "--format", "adapter", "--dtype", "bf16"], "are for --format merged"),
    (["run", "--prove", "URL", "--rows", "0"], "--rows is 0, expected at least 1"),
    (["nowhere", "out"], "nowhere: no run there"),
    (["--verify", "nowhere"], "nowhere/export.json: no such file"),
])
def test_mistakes_are_named(command, arguments, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(problem)):
        command(*arguments)
    assert not list(tmp_path.iterdir())
