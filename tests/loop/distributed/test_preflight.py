"""A user's mistakes are named in one line, before torch is imported and before a process is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loop.config import load_config
from loop.distributed.preflight import check, check_script, is_first

ROOT = Path(__file__).parents[3]
ROW = {"messages": [{"role": "user", "content": "Knight?"}, {"role": "assistant", "content": "Yes."}],
       "metadata": {"source": "book"}}
# runs entry points one after the other in one process; prints exit status, what was said, and which libraries are loaded
EACH = """
import contextlib, io, json, runpy, sys
for entry, arguments in json.loads(sys.argv[1]):
    said, sys.argv = io.StringIO(), [entry, *arguments]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_path(entry, run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    loaded = sorted({"torch", "transformers", "numpy", "huggingface_hub"} & sys.modules.keys())
    print(json.dumps([status, said.getvalue(), loaded]))
"""
MISTAKES = [  # entry point, overrides, what the line says
    ("train", ["train.sead=1"], "train.sead=1: Key 'sead' not in 'TrainConfig'. Did you mean: 'seed'?"),
    ("train", ["train.learning_rate=1e308"], "train.learning_rate is 1e+308, expected a finite number from 1e-12 to 1"),
    ("train", [f"train.seed={2**70}"], f"train.seed is {2**70}, expected 0 to 9,223,372,036,854,775,807"),
    ("train", ["data.train=no.jsonl"], "no.jsonl: No such file or directory. Expected a JSONL file of chat rows"),
    ("train", ["data.eval=pipe"], "pipe: not a regular file, but a pipe, a device or a socket"),
    ("train", ["data.train=/dev/zero"], "/dev/zero: not a regular file"),
    ("train", ["data.train=broken.jsonl"], "broken.jsonl:1: not JSON: "),
    ("train", ["data.train=roles.jsonl"], "roles.jsonl:1: roles out of order: found user; expected"),
    ("train", ["data.eval=empty.jsonl"], "empty.jsonl: no rows. Expected a JSONL file"),
    ("train", ["model.path=modell"], "model.path: modell: no such directory. Expected one, or a hub name such as"),
    ("train", ["model.path=bare"], "bare: no *.safetensors files. Expected the weights beside config.json"),
    ("train", ["model.path=gpt2"], "gpt2/config.json: model_type 'gpt2' is not supported; supported are llama, qwen3, "),
    ("train", ["model.path=listed"], "listed/config.json: found a list, expected an object"),
    ("train", ["model.path=deep"], "deep/config.json: not valid JSON (maximum recursion depth exceeded"),
    ("train", ["model.path=endless"], "num_hidden_layers is 1000000000, expected a whole number from 1 to 1,000"),
    ("train", ["lora.target=[q_prj]"], "lora.target: no linear of the model is called 'q_prj'; there are down_proj, "),
    ("train", ["lora.experts=true"], "lora.experts is true, but the model has no routed experts"),
    ("train", ["train.keep_layers=37"], "train.keep_layers is 37, but the stage has 36 layers"),
    ("train", ["run=file"], "checkpoints/file: not a directory. Results go to checkpoints/<run>/"),
    ("pipeline_train", ["--split", "72"], "pipeline.split [72]: the model has 72 sublayers"),
    ("pipeline_train", ["--split", "30,20"], "pipeline.split [30, 20]: the model has 72 sublayers"),
    ("pipeline_train", ["--split", "x"], "pipeline.split is 'x', expected sublayer numbers such as 40"),
    ("launch", ["train.sead=1"], "train.sead=1: Key 'sead'"),
    ("launch", ["data.train=no.jsonl"], "no.jsonl: No such file or directory"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with models, rows and a configuration in which all is well."""
    monkeypatch.chdir(tmp_path)
    shapes = json.loads((ROOT / "configs/models/Qwen3-4B-Thinking-2507.json").read_text())
    contents = {"model": shapes, "bare": shapes, "gpt2": shapes | {"model_type": "gpt2"}, "listed": [],
                "endless": shapes | {"num_hidden_layers": 10**9}, "deep": None}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content) if content is not None else "[" * 100_000)
        if name != "bare":
            (tmp_path / name / "model.safetensors").touch()
    rows = {"rows": json.dumps(ROW), "broken": json.dumps(ROW)[:-9], "empty": "\n \n",
            "roles": json.dumps(ROW | {"messages": ROW["messages"][:1]})}
    for name, text in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(text + "\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/file").touch()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({
        "run": "tiny", "model": {"path": "model", "base": "float32"}, "lora": {"rank": 4, "alpha": 8, "target": ["q_proj"]},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "sources": ["book"]},
        "train": {"epochs": 1, "rows_per_step": 8, "microbatch_tokens": 512, "learning_rate": 0.01}}))
    return tmp_path


def command(entry, overrides):
    arguments = ["--config", "config.yaml", *overrides]
    if entry == "launch":
        launcher = ["--nproc-per-node", "2", str(ROOT / "train.py")]
        return str(ROOT / "loop/distributed/launch.py"), launcher + arguments
    return str(ROOT / f"{entry}.py"), arguments


def test_mistakes_are_named_in_one_line_without_torch(place):
    commands = [command(entry, overrides) for entry, overrides, _ in MISTAKES]
    done = subprocess.run([sys.executable, "-c", EACH, json.dumps(commands)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(MISTAKES), done.stderr
    for (_, overrides, words), (status, said, loaded) in zip(MISTAKES, results):
        assert said.startswith("error: ") and words in said and said.count("\n") == 1, (overrides, said)
        assert status == 2 and loaded == [], (overrides, status, loaded)


def test_all_is_well(place, monkeypatch):
    config = load_config("config.yaml")
    assert check(config, splits=True) is config
    config = load_config("config.yaml", ["data.train=broken.jsonl", "data.bad_rows=skip"])
    assert check(config, splits=False) is config, "the row is left out and counted"
    config = load_config("config.yaml", ["model.path=Qwen/Qwen3-4B-Thinking-2507", "pipeline.split=72"])
    with pytest.raises(ValueError, match="has 72 sublayers"):  # of a model on the hub whose shapes are built in
        check(config, splits=True)
    assert check(load_config("config.yaml", ["model.path=someone/model"]), splits=True)


def test_hosts_without_the_rows_check_the_model(place, monkeypatch):
    config = load_config("config.yaml", ["data.train=no.jsonl"])
    with pytest.raises(ValueError, match="no.jsonl"):
        check(config, splits=False)
    assert check(config, splits=False, has_rows=False) is config
    monkeypatch.setenv("GROUP_RANK", "1")
    assert check(config, splits=False) is config
    with pytest.raises(ValueError, match="bare: no"):
        check(load_config("config.yaml", ["model.path=bare"]), splits=False)


def test_a_working_directory_that_was_removed(place):
    config = load_config("config.yaml", [f"data.train={place}/rows.jsonl", f"data.eval={place}/rows.jsonl"])
    (place / "gone").mkdir()
    os.chdir(place / "gone")
    (place / "gone").rmdir()
    with pytest.raises(ValueError, match="the working directory was removed"):
        check(config, splits=False)


def test_ranks_that_make_no_whole_replicas(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 ranks for a model in 2 stages, expected a multiple of 2"):
        check(load_config("config.yaml", ["pipeline.split=40"]), splits=True)


@pytest.mark.parametrize("environment, speaks", [
    ({}, True), ({"LOCAL_RANK": "1"}, False), ({"LOCAL_RANK": "0", "RANK": "4"}, True),
    ({"TORCHELASTIC_RESTART_COUNT": "1"}, False)])
def test_who_speaks(monkeypatch, environment, speaks):
    for name in ("LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first() is speaks


def test_other_scripts_are_not_looked_at(place):
    check_script([str(place / "train.py"), "--config", "no.yaml"])


@pytest.mark.slow
def test_torchs_own_launcher_says_it_once(place):
    """It used to be said by each rank, at each start: six times for two ranks and two restarts."""
    arguments = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2", *command("train", ["train.sead=1"])[:1],
                 "--config", "config.yaml", "train.sead=1"]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and done.stderr.count("error: train.sead=1") == 1, done.stderr
