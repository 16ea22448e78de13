"""What the model writes while it trains: the same rows at each evaluation, and nothing else changes."""

import json
import shutil
from types import SimpleNamespace

import pytest

from loop.line_file import SAMPLES_FILE
from loop.run import for_samples


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_evaluation_writes_the_same_rows_and_changes_no_number(write_config, run_train, tiny_rows, tmp_path, capsys):
    config = write_config()
    plain = run_train(config, run="plain")
    assert run_train(config, "eval.samples=3", run="sampled") == plain
    assert not (tmp_path / "checkpoints/plain" / SAMPLES_FILE).exists()
    lines = read(tmp_path / "checkpoints/sampled" / SAMPLES_FILE)
    steps = [line["step"] for line in plain if "eval_loss" in line]
    assert [line["step"] for line in lines] == [step for step in steps for _ in range(3)]
    assert [line["line"] for line in lines] == [1, 5, 9] * len(steps)
    first = lines[0]
    assert first["prompt"].endswith("<|im_start|>assistant\n") and "Knight to" in first["prompt"]
    assert first["reference"].startswith("It eyes") and "<|im_end|>" not in first["reference"] + first["answer"]
    assert first["reference"] == read(tiny_rows / "eval.jsonl")[0]["messages"][1]["content"]
    assert lines[0]["answer"] != lines[-3]["answer"], "it has learned something"
    said = capsys.readouterr().out
    assert said.count("answer to held-out line 1:") == len(steps)


@pytest.mark.slow
def test_lines_after_the_checkpoint_are_written_anew(write_config, run_train, tmp_path):
    config = write_config(checkpoint__keep=9)
    run_train(config, "eval.samples=1")
    path = tmp_path / "checkpoints/tiny" / SAMPLES_FILE
    whole = read(path)
    for step in (8, 10):
        shutil.rmtree(tmp_path / f"checkpoints/tiny/step-{step:08d}")
    run_train(config, "eval.samples=1")
    assert read(path) == whole


def test_a_pipeline_says_that_it_writes_none(capsys):
    config, chat = SimpleNamespace(eval=SimpleNamespace(samples=2)), object()
    assert for_samples(config, chat, SimpleNamespace(num_stages=2), print) is None
    assert "eval.samples needs the whole model on one rank" in capsys.readouterr().out
