"""How long a checkpoint of a run takes to write and to sync where the run would write it.
Takes the disk space of one checkpoint, and its size in the host's memory."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import torch

from loop import checkpoint
from loop.check.findings import Finding, in_gib
from loop.config import Config
from model.build import build_empty

SLOW_S = 60


def saving(config: Config, model_dir: Path) -> Finding:
    """Writes adapters and optimizer states of the run's sizes, all zero, and removes them again."""
    stage, _ = build_empty(model_dir, config.model.base, config.lora, seed=0, device=torch.device("meta"), recompute=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in stage.adapters().items()}
    kind = torch.uint8 if config.train.optimizer == "adamw8bit" else torch.float32
    saved = checkpoint.Saved(
        {"step": 0}, {name: torch.zeros(shape) for name, shape in shapes.items()}, {},
        {f"{name}/{state}": torch.zeros(shape, dtype=kind) for name, shape in shapes.items() for state in ("first", "second")})
    size = sum(tensor.nbytes for tensors in (saved.adapter, saved.optimizer) for tensor in tensors.values())
    config.run_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(config.run_dir).free
    needed = size * (config.checkpoint.keep + 2)  # the best, the newest, and one that is being written
    words = f"{in_gib(size)} a checkpoint, {in_gib(needed)} for all that are kept"
    if free < needed:
        return Finding("saving", "checkpoints", words,
                       f"only {in_gib(free)} are free at {config.run_dir.resolve()}: make room, or lower checkpoint.keep")
    with tempfile.TemporaryDirectory(dir=config.run_dir, prefix=".check-") as directory:
        started = time.perf_counter()
        checkpoint.write_files(Path(directory) / "step", saved)
        took = time.perf_counter() - started
    return Finding("saving", "checkpoints", f"{words}; written and synced in {took:.1f} s, {size / took / 1e9:.2f} GB/s",
                   f"that is slow: use another disk, or a larger checkpoint.every than {config.checkpoint.every}"
                   if took > SLOW_S else "", {"bytes": size, "seconds": took})
