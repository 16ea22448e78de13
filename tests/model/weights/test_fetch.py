"""A model by its name where there is no network: from the cache, or with what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
REPO = "Qwen/Qwen3-4B-Thinking-2507"
UNREACHABLE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def run_offline(tmp_path):
    """Runs a command of the trainer with an empty cache in `tmp_path`; returns its status, what it printed and its errors."""

    def run(*command):
        environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": UNREACHABLE, "PYTHONPATH": str(ROOT)}
        environment = {name: value for name, value in environment.items() if name not in ("HF_HUB_CACHE", "HF_HUB_OFFLINE")}
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=100)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.slow
def test_rows_are_shown_with_a_tokenizer_that_lies_in_the_cache(run_offline, write_rows, make_row, tiny_tokenizers, tmp_path):
    rows = write_rows([make_row(f"question {number}", f"answer {number}") for number in range(20)])
    command = ("loop.inspect", "--config", str(ROOT / "configs/4b.yaml"), f"data.train={rows}", "data.eval=5")
    status, _, said = run_offline(*command)
    assert status == 2 and "Traceback" not in said
    assert f"the tokenizer of {REPO} is not in the Hugging Face cache and could not be downloaded" in said
    assert f'hf download {REPO} --exclude "*.safetensors"' in said and "set model.path to a directory with config.json" in said

    repository = tmp_path / "hub/models--Qwen--Qwen3-4B-Thinking-2507"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    shutil.copytree(tiny_tokenizers["qwen3"].name_or_path, repository / "snapshots" / ("0" * 40))
    status, shown, said = run_offline(*command)
    assert status == 0 and "train / textbook: 15 rows read, 15 kept" in shown and "eval / textbook: 5 rows read" in shown, said


@pytest.mark.slow
def test_weights_that_are_not_here_are_named_with_how_to_fetch_them(run_offline):
    status, shown, said = run_offline("model.weights.fetch", REPO)
    assert status != 0 and shown == "" and "Traceback" not in said
    assert f"model.path: {REPO} is not in the Hugging Face cache" in said and f"hf download {REPO}   then copy" in said
