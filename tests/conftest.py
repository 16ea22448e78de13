"""What several tests share: tokenizers, rows, and a run that takes seconds: a random Llama of two layers."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

import train
from data.batches import Microbatch, StepBatch
from model.tiny.tokenizer import write_tokenizer
from model.tiny.write import write_tiny
from tests.processes import Run

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # real rows and the Qwen3 tokenizer, where they are there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
for number in (signal.SIGINT, signal.SIGHUP):  # ignored in background jobs and under nohup, and processes inherit that
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def usual_recursion_limit():
    """torch's compiler raises it for the whole process, and what is said of nested files depends on it."""
    sys.setrecursionlimit(1000)


@pytest.fixture(scope="session")
def tiny_tokenizers(tmp_path_factory):
    """Byte-level ChatML tokenizers with the published kinds of generation prompt."""
    loaded = {}
    for kind in ("llama", "qwen3", "qwen3_5_moe"):
        directory = tmp_path_factory.mktemp(kind)
        write_tokenizer(directory, kind, None)
        loaded[kind] = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    return loaded


@pytest.fixture(scope="session")
def qwen3_tokenizers():
    """The Qwen3 tokenizer under the chat templates of its three generations."""
    directory = SHARED / "qwen3-tokenizer"
    if not directory.is_dir():
        pytest.skip("the Qwen3 tokenizer is not here")
    styles = {style: AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
              for style in ("qwen3", "thinking-2507", "qwen3.5")}
    head, generation_prompt = styles["qwen3"].chat_template.split("{%- if add_generation_prompt %}")
    assert "enable_thinking" in generation_prompt
    # 2507 knows no switch: its generation prompt always ends in an open block
    styles["thinking-2507"].chat_template = (
        head + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    )
    styles["qwen3.5"].chat_template = (directory / "chat_template_qwen3_5.jinja").read_text()
    return styles


@pytest.fixture
def write_rows(tmp_path):
    """Writes chat rows as JSONL: dicts as they are, strings as raw lines."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def chat_row(*contents, source="textbook", system=None):
    """A row of user and assistant turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": messages, "metadata": {"source": source}}


@pytest.fixture
def make_row():
    return chat_row


def pytest_collection_modifyitems(items):
    """Each worker gets a part of the tests that begins with its share of the slow ones, so that none ends with a slow one."""
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    ordered = []
    for worker in range(num_workers):
        ordered += slow[worker::num_workers]
        while fast and len(ordered) < len(items) * (worker + 1) // num_workers:
            ordered.append(fast.pop(0))
    items[:] = ordered + fast


# A run that takes seconds


def write_llama(directory):
    """A random Llama of two layers."""
    return write_tiny(directory, kind="llama", num_hidden_layers=2, hidden_size=64, intermediate_size=128,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def write_two_sources(directory):
    """40 training and 12 held-out rows of two sources."""
    rng = random.Random(0)
    for name, number in (("train", 40), ("eval", 12)):
        with open(directory / f"{name}.jsonl", "w") as file:
            for i in range(number):
                square = rng.choice("abcdefgh") + rng.choice("12345678")
                messages = [{"role": "user", "content": f"Knight to {square}?" + " Why?" * rng.randrange(8)},
                            {"role": "assistant", "content": f"It eyes {square}." * rng.randrange(1, 4)}]
                file.write(json.dumps({"messages": messages, "metadata": {"source": ("book", "game")[i % 2]}}) + "\n")
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory):
    return write_two_sources(tmp_path_factory.mktemp("rows"))


def tiny_settings(tiny_llama, tiny_rows, log, changes):
    """The configuration of a run that takes seconds, with changes such as train__epochs=1."""
    config = {
        "run": "tiny",
        "model": {"path": str(tiny_llama), "base": "float32"},
        "lora": {"rank": 4, "alpha": 8, "target": ["q_proj", "v_proj", "down_proj"]},
        "data": {"train": str(tiny_rows / "train.jsonl"), "eval": str(tiny_rows / "eval.jsonl"),
                 "sources": ["book", "game"], "max_tokens": 256},
        "train": {"epochs": 2, "rows_per_step": 8, "microbatch_tokens": 512, "learning_rate": 0.01, "optimizer": "adamw",
                  "plan": False},
        "eval": {"every": 3},
        "checkpoint": {"every": 4, "keep": 1},
        "log": str(log),
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            config[section][field] = value
        else:
            config[section] = value
    return config


@pytest.fixture
def write_config(tiny_llama, tiny_rows, tmp_path, monkeypatch):
    """Writes a configuration into a fresh directory, which becomes the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tiny_settings(tiny_llama, tiny_rows, tmp_path / "train.log", changes)))
        return path

    return write


@pytest.fixture(scope="session")
def finished_run(tiny_llama, tiny_rows, tmp_path_factory):
    """The directory of a run that has ended, for tests that only read: console.txt is what it said."""
    directory = tmp_path_factory.mktemp("finished")
    config, console = directory / "config.yaml", io.StringIO()
    config.write_text(yaml.safe_dump(tiny_settings(tiny_llama, tiny_rows, directory / "train.log", {})))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(console):
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["train.py", "--config", str(config)])
        train.main()
    (directory / "console.txt").write_text(console.getvalue())
    return directory / "checkpoints/tiny"


@pytest.fixture
def run_train(tmp_path, monkeypatch):
    """Runs train.py in this process; returns the lines of metrics.jsonl."""

    def run(config_path, *overrides, run="tiny"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config_path), f"run={run}", *overrides])
        train.main()
        return metrics(tmp_path / "checkpoints" / run)

    return run


def metrics(run_dir):
    """What must not depend on how often a run was interrupted."""
    return comparable(json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())


def comparable(lines):
    return [{k: v for k, v in line.items() if k not in ("step_s", "tokens_per_s", "peak_gib", "tensors_gib")} for line in lines]


@pytest.fixture
def read_metrics():
    return metrics


@pytest.fixture
def make_step():
    """A step of microbatches of rows of these lengths, every third position supervised."""
    return step_of


def step_of(lengths_by_microbatch):
    def microbatch(lengths):
        ids_T = torch.zeros(sum(lengths), dtype=torch.int64)
        predict_N = ids_T[::3]
        bounds_R1 = torch.tensor([0, *lengths]).cumsum(0).int()
        return Microbatch(ids_T, ids_T, bounds_R1, lengths, predict_N, predict_N,
                          predict_N, (), len(ids_T))

    microbatches = [microbatch(lengths) for lengths in lengths_by_microbatch]
    num, length = len(microbatches), sum(lengths_by_microbatch[0])
    return StepBatch(1, 0, microbatches, length, range(num), [[]] * num, num, num * length, num * length // 3)


@pytest.fixture
def edited_copy(tmp_path):
    """A copy of the source in which some text was replaced: {file: [(old, new), ...]}."""

    def edit(changes):
        copy = tmp_path / "source"
        for package in ("data", "model", "loop"):
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
        shutil.copy(ROOT / "train.py", copy)
        for name, replaced in changes.items():
            text = (copy / name).read_text()
            for old, new in replaced:
                assert text.count(old) == 1, f"{name}: {old!r} is not there once, mend this test"
                text = text.replace(old, new)
            (copy / name).write_text(text)
        return copy

    return edit


@pytest.fixture
def run_copy(tmp_path):
    """Runs train.py of a copy of the source in a process of its own; returns it when it has ended well."""

    def run(copy, config, *overrides):
        done = Run(copy / "train.py", "--config", config, *overrides, directory=tmp_path)
        assert done.wait(240) == [0], done.said
        return done

    return run
