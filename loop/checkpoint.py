"""A checkpoint is a commit: it is there whole and verified, or it is not there. Rank 0 alone reads and writes.
Costs one copy of adapters and optimizer state in CPU memory while it is written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE, ADAPTER, OPTIMIZER, MANIFEST = "state.json", "adapter_model.safetensors", "optimizer.safetensors", "manifest.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and how much of it stays."""

    every: int = 500  # optimizer steps
    keep: int = 3  # best by held-out loss; the newest stays too

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"checkpoint.every is {self.every}, expected at least 1 step")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}, expected at least 1")


@dataclass
class Saved:
    """The contents of one checkpoint."""

    state: dict[str, Any]  # step, eval_loss, settings
    adapter: dict[str, Tensor]  # in peft's names
    adapter_config: dict[str, Any]
    optimizer: dict[str, Tensor]


def save(run_dir: Path, saved: Saved, keep: int) -> Path:
    """Writes checkpoint `step-NNNNNNNN`, then removes what rotation no longer keeps.

    Every file is synced, the manifest is written last, and one rename makes the checkpoint appear. A crash at any
    moment leaves the earlier checkpoints, and at most a `.partial` directory that the next save removes.
    """
    path = run_dir / f"step-{saved.state['step']:08d}"
    partial = run_dir / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_files(partial, saved)
        if path.exists():  # an unverifiable one of the same step, left from before a resume
            shutil.rmtree(path)
        partial.rename(path)
        sync(run_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(run_dir).free / 1e9
        raise ValueError(
            f"{path}: could not be written ({error}); {free:.1f} GB are free. Make room and give the same command again: "
            "it continues from the newest checkpoint"
        ) from None
    rotate(run_dir, keep, just_saved=path)
    return path


def write_files(partial: Path, saved: Saved) -> None:
    """All files of a checkpoint, synced, the manifest last."""
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in saved.adapter.items()}, partial / ADAPTER, {"format": "pt"})
    save_file({name: tensor.clone() for name, tensor in saved.optimizer.items()}, partial / OPTIMIZER)
    write_json(partial / "adapter_config.json", saved.adapter_config)
    write_json(partial / STATE, saved.state)
    files = sorted(file for file in partial.iterdir())
    write_json(partial / MANIFEST, {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files})
    for file in [*files, partial / MANIFEST, partial]:
        sync(file)


def rotate(run_dir: Path, keep: int, just_saved: Path) -> None:
    """Removes all but the `keep` best by held-out loss and the newest, by step number and never by clock."""
    checkpoints = list_checkpoints(run_dir)
    best_first = sorted(checkpoints, key=lambda path: (eval_loss(path), path.name))
    kept = {*best_first[:keep], *checkpoints[-1:], just_saved}
    for path in checkpoints:
        if path not in kept:
            # renamed first, so that a crash half way leaves no checkpoint with files missing
            doomed = path.rename(run_dir / f".{path.name}.removed")
            shutil.rmtree(doomed)


def eval_loss(path: Path) -> float:
    """A checkpoint's held-out loss; infinite where it is not a number or cannot be read."""
    try:
        loss = json.loads((path / STATE).read_text())["eval_loss"]
    except (OSError, ValueError, KeyError):
        return math.inf
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint directories, oldest step first."""
    return sorted(path for path in run_dir.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def newest(run_dir: Path, warn: Any = print) -> Path | None:
    """The newest checkpoint that verifies. Damaged ones are named and moved out of the way, as `.step-NNNNNNNN.damaged`;
    what a crash left half done is cleared."""
    for leftover in [*run_dir.glob(".step-*.partial"), *run_dir.glob(".step-*.removed")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for path in reversed(list_checkpoints(run_dir)):
        problem = verify(path)
        if problem is None:
            return path
        aside = path.with_name(f".{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        warn(f"checkpoint passed over, now {aside}: {problem}")
    return None


def best(run_dir: Path) -> Path:
    """The checkpoint with the lowest held-out loss.

    Raises:
        ValueError: the run has none yet.
    """
    verified = [path for path in list_checkpoints(run_dir) if verify(path) is None]
    if not verified:
        raise ValueError(f"{run_dir}: no checkpoint there. Expected a run's directory with step-NNNNNNNN directories")
    return min(verified, key=eval_loss)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        missing = {STATE, ADAPTER, OPTIMIZER, "adapter_config.json"} - manifest.keys()
        if missing:
            return f"{path / MANIFEST}: does not list {', '.join(sorted(missing))}"
        for name, expected in manifest.items():
            file = path / name
            if file.stat().st_size != expected["size"]:
                return f"{file}: {file.stat().st_size} bytes, its manifest says {expected['size']}"
            if sha256(file) != expected["sha256"]:
                return f"{file}: its contents do not match its manifest"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path / MANIFEST}: not a manifest"
    return None


def load(path: Path) -> Saved:
    """Reads a verified checkpoint."""
    return Saved(
        state=json.loads((path / STATE).read_text()),
        adapter=load_file(path / ADAPTER),
        adapter_config=json.loads((path / "adapter_config.json").read_text()),
        optimizer=load_file(path / OPTIMIZER),
    )


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that decide the course of the run and are not as they were, a phrase each."""
    keys = sorted(old.keys() | new.keys())
    return [f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's or directory's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
