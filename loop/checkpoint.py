"""Writes, verifies and reads the checkpoints of a run, on rank 0. A crash never leaves an incomplete checkpoint.
Costs the time of writing, hashing and syncing its files; the loop has this done in a thread (see state.py)."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import clear_partial, make_readable, open_regular, partial_of, sha256, sync

STATE, OPTIMIZER, MANIFEST = "state.json", "optimizer.safetensors", "manifest.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft names them
VERSION = 1  # of what state.json and manifest.json hold


@dataclass
class Saved:
    """The contents of one checkpoint; tensors on the CPU, none of which share memory."""

    state: dict[str, Any]  # step, eval_loss, settings
    adapter: dict[str, Tensor]  # in peft's names
    adapter_config: dict[str, Any]
    optimizer: dict[str, Tensor]
    files: dict[str, bytes] = field(default_factory=dict)  # others, by name, which make the directory load as it lies


def save(run_dir: Path, saved: Saved, keep: int) -> Path:
    """Writes checkpoint `step-NNNNNNNN`, then removes all but the `keep` best by held-out loss and the newest.

    Every file is synced, the manifest is written last, and one rename makes the checkpoint appear. A crash at any
    moment leaves the earlier checkpoints, and at most a `.partial` or `.removed` directory, which `newest` removes.

    Raises:
        ValueError: the checkpoint could not be written.
    """
    path = run_dir / f"step-{saved.state['step']:08d}"
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_files(partial, saved)
        if path.is_dir():  # saved before its evaluation; should the process end between the renames, `newest` finds `partial`
            path.rename(removed_of(path))
        elif path.exists():
            path.rename(damaged_of(path))
        partial.rename(path)
        sync(run_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(run_dir if run_dir.exists() else ".").free / 1e9
        raise ValueError(
            f"{path}: could not be written ({error}); {free:.1f} GB are free. Make room and give the same command again: "
            "it continues from the newest checkpoint"
        ) from None
    checkpoints = list_checkpoints(run_dir)
    evaluated = [checkpoint for checkpoint in checkpoints if math.isfinite(eval_loss(checkpoint))]
    kept = {*sorted(evaluated, key=eval_loss)[:keep], checkpoints[-1], path}
    for outdated in set(checkpoints) - kept:
        outdated.rename(removed_of(outdated))  # renamed first: a crash leaves no checkpoint without files
    clear_removed(run_dir)
    return path


def removed_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.removed")


def damaged_of(path: Path) -> Path:
    """A new name for what stands in a checkpoint's place and is none."""
    aside = path.with_name(f".{path.name}.damaged")
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    return aside


def clear_removed(run_dir: Path) -> None:
    for leftover in run_dir.glob(".step-*.removed"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_files(partial: Path, saved: Saved) -> None:
    """Writes and syncs all files of a checkpoint, the manifest last."""
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in saved.adapter.items()}, partial / ADAPTER, {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in saved.optimizer.items()}, partial / OPTIMIZER)
    write_json(partial / ADAPTER_CONFIG, saved.adapter_config)
    write_json(partial / STATE, {"version": VERSION, **saved.state})
    for name, content in saved.files.items():
        (partial / name).write_bytes(content)
    files = sorted(partial.iterdir())
    for file in files:
        make_readable(file)
    write_json(partial / MANIFEST, {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files})
    for file in [*files, partial / MANIFEST, partial]:
        sync(file)


def eval_loss(path: Path) -> float:
    """A checkpoint's held-out loss; infinite where it is not finite, was not computed, or cannot be read."""
    try:
        loss = read_json(path / STATE)["eval_loss"]
    except (OSError, ValueError, KeyError):
        return math.inf
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint directories, oldest step first."""
    return sorted(path for path in run_dir.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def newest(run_dir: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies. Names damaged checkpoints in a warning, and renames them to
    `.step-NNNNNNNN.damaged`; removes what a crash left incomplete.

    Raises:
        WrittenByNewer: a newer version of this program wrote the newest checkpoint.
    """
    for partial in run_dir.glob(".step-*.partial"):
        path = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
        if removed_of(path).exists() and not path.exists():  # the process ended between the two renames of `save`
            (partial if verify(partial, path) is None else removed_of(path)).rename(path)
    clear_partial(run_dir)
    clear_removed(run_dir)
    for path in reversed(list_checkpoints(run_dir)):
        problem = verify(path)
        if problem is None:
            return path
        aside = damaged_of(path)
        path.rename(aside)
        warn(f"checkpoint passed over, now {aside}: {problem}")
    return None


def best(run_dir: Path) -> Path:
    """The checkpoint with the lowest held-out loss; the newest where none was evaluated.

    Raises:
        ValueError: the run has no checkpoint.
    """
    verified = [path for path in list_checkpoints(run_dir) if verify(path) is None]
    if not verified:
        raise ValueError(f"{run_dir}: no checkpoint there. Expected a run's directory with step-NNNNNNNN directories")
    return min(reversed(verified), key=eval_loss)


def find_checkpoint(run_dir: Path, which: str) -> Path:
    """The best or the newest checkpoint, or that of a step; a run that is still training is left as it is.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    if which == "best":
        return best(run_dir)
    if which == "newest":
        found = [path for path in list_checkpoints(run_dir) if verify(path) is None]
        if not found:
            raise ValueError(f"{run_dir}: no checkpoint there. Expected a run's directory with step-NNNNNNNN directories")
        return found[-1]
    if not which.isdigit():
        raise ValueError(f"--checkpoint is {which!r}, expected best, newest, or the number of a step")
    path = run_dir / f"step-{int(which):08d}"
    if not path.is_dir():
        there = ", ".join(str(int(path.name[5:])) for path in list_checkpoints(run_dir)) or "none"
        raise ValueError(f"{path}: no such checkpoint, there are: {there}")
    if problem := verify(path):
        raise ValueError(f"{problem}. Choose another --checkpoint")
    return path


def verify(path: Path, named: Path | None = None) -> str | None:
    """Compares a checkpoint with its manifest and its name; returns the first difference, or None.

    Args:
        named: the name that it will have, if not its own.

    Raises:
        WrittenByNewer: a newer version of this program wrote the checkpoint.
    """
    try:
        manifest = read_json(path / MANIFEST)
        missing = {STATE, ADAPTER, OPTIMIZER, ADAPTER_CONFIG} - manifest.keys()
        if missing:
            return f"{path / MANIFEST}: does not list {', '.join(sorted(missing))}"
        for name, expected in manifest.items():
            if "/" in name or not isinstance(expected, dict) or expected.keys() != {"size", "sha256"}:
                return f'{path / MANIFEST}: {name!r} has {str(expected)[:80]}, expected a file name and its "size" and "sha256"'
            file = path / name
            with open_regular(file, "a file of a checkpoint"):
                size = file.stat().st_size
            if size != expected["size"]:
                return f"{file}: {size} bytes, its manifest says {expected['size']}"
            if sha256(file) != expected["sha256"]:
                return f"{file}: its contents do not match its manifest"
        return verify_state(path / STATE, named or path)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except WrittenByNewer:
        raise
    except ValueError as error:
        return str(error)


def verify_state(file: Path, path: Path) -> str | None:
    """Compares state.json with what this version writes, and with the checkpoint's name."""
    state = read_json(file)
    if isinstance(state.get("version"), int) and state["version"] > VERSION:
        raise WrittenByNewer(f"{file}: version {state['version']}, written by a newer version of this program, which knows "
                             f"{VERSION}. Update it, or choose another run=NAME")
    step, loss = state.get("step"), state.get("eval_loss")
    if type(step) is not int or step < 1 or path.name != f"step-{step:08d}":
        return f"{file}: step is {step!r}, expected the number in the directory's name: is this a copy of another checkpoint?"
    if not isinstance(state.get("settings"), dict):
        return f"{file}: settings is {str(state.get('settings'))[:80]}, expected the settings that the run was trained with"
    if loss is not None and not isinstance(loss, float):
        return f"{file}: eval_loss is {str(loss)[:80]}, expected a number or null"
    return None


def load(path: Path) -> Saved:
    """Reads a verified checkpoint, all but its `files`."""
    return Saved(read_json(path / STATE), load_file(path / ADAPTER), read_json(path / ADAPTER_CONFIG),
                 load_file(path / OPTIMIZER))


class WrittenByNewer(ValueError):
    """A checkpoint is of a version that this program does not know."""


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: the file holds something else, or is no regular file.
    """
    with open_regular(file, "a file of a checkpoint") as opened:
        text = opened.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a thousand nested brackets
        raise ValueError(f"{file}: not readable JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: found {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
