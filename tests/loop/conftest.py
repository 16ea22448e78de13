"""A run that takes seconds: a random Llama of two layers and byte-level rows."""

import json
import random
import sys

import pytest
import torch
import yaml

import train
from data.batches import Microbatch, StepBatch
from model.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return write_tiny(
        tmp_path_factory.mktemp("tiny") / "llama", kind="llama", num_hidden_layers=2, hidden_size=64, intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory):
    """40 training and 12 held-out rows of two sources."""
    directory = tmp_path_factory.mktemp("rows")
    rng = random.Random(0)
    for name, number in (("train", 40), ("eval", 12)):
        with open(directory / f"{name}.jsonl", "w") as file:
            for i in range(number):
                square = rng.choice("abcdefgh") + rng.choice("12345678")
                messages = [{"role": "user", "content": f"Knight to {square}?" + " Why?" * rng.randrange(8)},
                            {"role": "assistant", "content": f"It eyes {square}." * rng.randrange(1, 4)}]
                file.write(json.dumps({"messages": messages, "metadata": {"source": ("book", "game")[i % 2]}}) + "\n")
    return directory


@pytest.fixture
def write_config(tiny_llama, tiny_rows, tmp_path, monkeypatch):
    """Writes a configuration into a fresh directory, which becomes the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        config = {
            "run": "tiny",
            "model": {"path": str(tiny_llama), "base": "float32"},
            "lora": {"rank": 4, "alpha": 8, "target": ["q_proj", "v_proj", "down_proj"]},
            "data": {"train": str(tiny_rows / "train.jsonl"), "eval": str(tiny_rows / "eval.jsonl"),
                     "sources": ["book", "game"], "max_tokens": 256},
            "train": {"epochs": 2, "rows_per_step": 8, "microbatch_tokens": 512, "learning_rate": 0.01, "optimizer": "adamw"},
            "eval": {"every": 3},
            "checkpoint": {"every": 4, "keep": 1},
            "log": str(tmp_path / "train.log"),
        }
        for key, value in changes.items():
            section, _, field = key.partition("__")
            if field:
                config[section][field] = value
            else:
                config[section] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


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
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_s", "tokens_per_s", "peak_gib")} for line in lines]


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
