"""Whether a run compiles its elementwise work, which takes seconds at a start: always on a GPU, on a CPU if the run is long.
The answer depends on settings, model and rows alone, never on a clock, and a run keeps it: compiled code rounds otherwise, and
an interrupted run would else go on with other bits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from data.batches import Batches
from loop import checkpoint
from loop.config import Config
from model.ops.compiled import ALL

START_S = 10.0  # of the first start on a machine; later ones take a fifth
SAVED_S = 4e-9  # on a CPU for each token, layer and hidden feature
PATHS_FILE = "paths.json"  # in a run's directory


def compiles(config: Config, model: Any, device: torch.device, num_tokens: int = 0) -> bool:
    """Whether a run takes compiled code.

    Args:
        model: the text model's configuration in transformers.
        num_tokens: that the whole run trains on.
    """
    if config.train.compile != "auto":
        return config.train.compile
    if device.type == "cuda":
        return True
    kept = kept_answer(config.run_dir)
    if kept is not None:
        return kept
    saved_s = SAVED_S * num_tokens * model.num_hidden_layers * model.hidden_size
    return saved_s > 2 * START_S and shutil.which(os.environ.get("CXX", "g++")) is not None


def total_tokens(config: Config, batches: Batches) -> int:
    """That the whole run trains on."""
    steps = config.train.total_steps(batches.steps_per_epoch)
    return len(batches.rows.ids_N) * steps * config.train.rows_per_step // batches.num_rows


def kept_answer(run_dir: Path) -> bool | None:
    """What a run that has a checkpoint has answered before; None where there is none."""
    try:
        answer = json.loads((run_dir / PATHS_FILE).read_text())["compiles"] if checkpoint.list_checkpoints(run_dir) else None
    except (OSError, ValueError, KeyError, TypeError):  # an older run, or a file that somebody has changed
        return None
    return answer if isinstance(answer, bool) else None


def start_up() -> str:
    """What compiling has taken, in a line."""
    num = sum(len(function.code) for function in ALL)
    return f"compiled code for {num} elementwise functions was ready in {sum(f.seconds for f in ALL):.1f} s (train.compile)"
