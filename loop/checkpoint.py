"""Writes, verifies and reads the checkpoints of a run, on rank 0. A crash never leaves an incomplete checkpoint.
Costs one copy of adapters and optimizer states in CPU memory while a checkpoint is written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE, OPTIMIZER, MANIFEST = "state.json", "optimizer.safetensors", "manifest.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft names them


@dataclass
class Saved:
    """The contents of one checkpoint."""

    state: dict[str, Any]  # step, eval_loss, settings
    adapter: dict[str, Tensor]  # in peft's names
    adapter_config: dict[str, Any]
    optimizer: dict[str, Tensor]


def save(run_dir: Path, saved: Saved, keep: int) -> Path:
    """Writes checkpoint `step-NNNNNNNN`, then removes all but the `keep` best by held-out loss and the newest.

    Every file is synced, the manifest is written last, and one rename makes the checkpoint appear. A crash at any
    moment leaves the earlier checkpoints, and at most a `.partial` directory, which `newest` removes.

    Raises:
        ValueError: the checkpoint could not be written.
    """
    path = run_dir / f"step-{saved.state['step']:08d}"
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_files(partial, saved)
        if path.exists():  # a damaged checkpoint of the same step, written before a resume
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
    checkpoints = list_checkpoints(run_dir)
    kept = {*sorted(checkpoints, key=eval_loss)[:keep], checkpoints[-1], path}
    for outdated in set(checkpoints) - kept:
        shutil.rmtree(outdated.rename(partial_of(outdated)))  # renamed first: a crash leaves no checkpoint without files
    return path


def partial_of(path: Path) -> Path:
    """The name of a checkpoint that is being written or removed."""
    return path.with_name(f".{path.name}.partial")


def write_files(partial: Path, saved: Saved) -> None:
    """Writes and syncs all files of a checkpoint, the manifest last."""
    partial.mkdir(parents=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in saved.adapter.items()}, partial / ADAPTER, {"format": "pt"})
    # copies, since safetensors refuses tensors that share memory
    save_file({name: tensor.to("cpu", copy=True) for name, tensor in saved.optimizer.items()}, partial / OPTIMIZER)
    write_json(partial / ADAPTER_CONFIG, saved.adapter_config)
    write_json(partial / STATE, saved.state)
    files = sorted(partial.iterdir())
    write_json(partial / MANIFEST, {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files})
    for file in [*files, partial / MANIFEST, partial]:
        sync(file)


def eval_loss(path: Path) -> float:
    """A checkpoint's held-out loss; infinite where the loss is not finite or cannot be read."""
    try:
        loss = json.loads((path / STATE).read_text())["eval_loss"]
    except (OSError, ValueError, KeyError):
        return math.inf
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint directories, oldest step first."""
    return sorted(path for path in run_dir.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def newest(run_dir: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies. Names damaged checkpoints in a warning, and renames them to
    `.step-NNNNNNNN.damaged`; removes what a crash left incomplete."""
    for leftover in run_dir.glob(".step-*.partial"):
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
        ValueError: the run has no checkpoint.
    """
    verified = [path for path in list_checkpoints(run_dir) if verify(path) is None]
    if not verified:
        raise ValueError(f"{run_dir}: no checkpoint there. Expected a run's directory with step-NNNNNNNN directories")
    return min(verified, key=eval_loss)


def verify(path: Path) -> str | None:
    """Compares a checkpoint with its manifest; returns the first difference, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        missing = {STATE, ADAPTER, OPTIMIZER, ADAPTER_CONFIG} - manifest.keys()
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
        adapter_config=json.loads((path / ADAPTER_CONFIG).read_text()),
        optimizer=load_file(path / OPTIMIZER),
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until the contents of a file or directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
