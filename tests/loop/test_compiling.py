"""Whether a run compiles is decided by what it computes, and kept; compiling that fails is no obstacle."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from loop import compiling
from loop.compiling import compiles
from loop.config import load_config
from loop.distributed.groups import Ranks
from loop.paths import prove
from model.devices import OFF, ON
from model.ops import compiled

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MODEL = LlamaConfig(hidden_size=576, num_hidden_layers=30)
LONG = 10_000_000  # tokens


@pytest.fixture(autouse=True)
def default():
    yield
    OFF.clear()
    ON.clear()


def test_a_gpu_compiles_and_a_cpu_for_long_runs(write_config, monkeypatch):
    config = load_config(write_config())
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/usr/bin/g++")
    assert compiles(config, MODEL, GPU, 1) and compiles(config, MODEL, CPU, LONG) and not compiles(config, MODEL, CPU, 100_000)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert not compiles(config, MODEL, CPU, LONG)
    for asked in (True, False):
        config = load_config(write_config(), [f"train.compile={str(asked).lower()}"])
        assert all(compiles(config, MODEL, device, LONG) is asked for device in (CPU, GPU))


def test_a_run_with_a_checkpoint_keeps_its_answer(write_config, monkeypatch):
    config = load_config(write_config())
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/usr/bin/g++")
    config.run_dir.mkdir(parents=True)
    file = config.run_dir / "paths.json"
    file.write_text(json.dumps({"compiles": False}))
    assert compiles(config, MODEL, CPU, LONG)  # nothing to continue
    (config.run_dir / "step-00000002").mkdir()
    assert not compiles(config, MODEL, CPU, LONG)
    file.write_text(json.dumps({"compiles": True}))
    assert compiles(config, MODEL, CPU, 1)
    for text in ("{}", "[]", "no json", json.dumps({"compiles": "yes"})):
        file.write_text(text)
        assert not compiles(config, MODEL, CPU, 1)


def test_the_code_is_ready_before_the_first_step_and_its_time_is_said(write_config, tiny_llama):
    config, said = load_config(write_config(), ["train.compile=true"]), []
    config.run_dir.mkdir(parents=True)
    prove(config, tiny_llama, Ranks(), said.append)
    assert len(said) == 1 and said[0].startswith("compiled code for ") and said[0].endswith(" s (train.compile)")
    report = json.loads((config.run_dir / "paths.json").read_text())
    assert report["compiles"] is True and not report["paths"]["compiled"]["problem"] and ON == {"compiled"} and not OFF
    prove(replace(config, train=replace(config.train, compile=False)), tiny_llama, Ranks(), said.append)
    assert len(said) == 1 and not ON


def test_without_a_working_compiler_the_plain_functions_run_and_a_line_says_so(write_config, tiny_llama, monkeypatch):
    def broken(*_):
        raise RuntimeError("g++ was not found\nand much more")

    monkeypatch.setattr(compiled, "compile_for", broken)
    for function in compiled.ALL:
        monkeypatch.setattr(function, "code", {})
    config, said = load_config(write_config(), ["train.compile=true"]), []
    config.run_dir.mkdir(parents=True)
    prove(config, tiny_llama, Ranks(), said.append)
    assert said == ["fast path compiled is off for this run: it raised RuntimeError: g++ was not found. "
                    "In its place: one kernel of torch an operation"]
    assert not compiled.takes_code(torch.empty(4, 4))
