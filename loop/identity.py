"""What a run is: the settings, rows and base model that decide its results. A resumed run must have the same.
Costs a hash of the rows, 2 MB read of the model's files, and some 100 bytes a tensor of the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from data.files import sha256
from data.tokenized import TokenizedRows
from loop.checkpoint import ADAPTER
from loop.config import Config, by_name
from loop.distributed.groups import Ranks
from model.weights.identity import quick_identity

DECISIVE = ("model.", "lora.", "data.", "train.", "eval.")  # sections whose settings decide a run's results
# settings of these sections that may change when a run is resumed: the results differ by rounding only, at dropout 0
FREE = ("train.microbatch_tokens", "train.recompute", "train.keep_layers", "train.deterministic", "train.router_stats",
        "train.plan", "train.fast_paths", "train.compile", "train.memory_trace", "data.train", "data.eval", "eval.every",
        "eval.samples", "model.path")
WEIGHTS = "weights"  # the name under which `course` has the checksum of all weights, once they are loaded
WEIGHTS_FILE = "weights.json"  # in a run's directory: the checksum of each tensor

Course = dict[str, Any]


def course(config: Config, model_dir: Path, train_rows: TokenizedRows, eval_rows: TokenizedRows) -> Course:
    """The settings, rows and base model that decide a run's results, by name."""
    settings = {name: value for name, value in by_name(config).items() if name.startswith(DECISIVE) and name not in FREE}
    for name, rows in (("training rows", train_rows), ("held-out rows", eval_rows)):
        digest = hashlib.sha256(rows.ids_N.numpy().tobytes())
        digest.update(rows.supervised_N.numpy().tobytes())
        settings[name] = digest.hexdigest()[:16]
    settings["base model"] = quick_identity(model_dir)
    if config.model.adapter and (file := Path(config.model.adapter).expanduser() / ADAPTER).is_file():
        settings["model.adapter"] = sha256(file)[:16]  # wherever it lies
    decisive: Course = json.loads(json.dumps(settings))  # as a checkpoint has them: tuples become lists
    return decisive


def changes(old: Course, new: Course) -> str:
    """Which settings of a checkpoint are others now; empty if none is. Weights that are not loaded yet are left out."""
    return "; ".join(f"{name} was {old.get(name, 'not recorded')}, is {new.get(name, 'no setting any more')}"
                     for name in sorted(old.keys() | new.keys())
                     if old.get(name) != new.get(name) and (name != WEIGHTS or WEIGHTS in new))


def agree_on_weights(checksums: dict[str, int], model_path: str, ranks: Ranks) -> dict[str, int]:
    """The checksum of each tensor of the model, on every rank; all ranks call this together.

    Args:
        checksums: of the tensors that this rank has loaded.

    Raises:
        ValueError: this rank has loaded other weights than rank 0's replica; the other ranks exit without a message.
    """
    def packed(values: dict[str, int]) -> torch.Tensor:
        return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)

    by_stage = ranks.gather_stages({f"stage {ranks.stage}": packed(checksums)})
    everything: dict[str, int] = {}
    for values in by_stage.values():
        everything |= json.loads(bytes(values.cpu().numpy()))
    sent = ranks.broadcast_tensors({"all": packed(everything)} if ranks.is_main else None)
    everything = json.loads(bytes(sent["all"].numpy()))
    wrong = [name for name, checksum in checksums.items() if everything[name] != checksum]
    num_wrong = int(ranks.all_reduce(torch.tensor([len(wrong)], device=ranks.device)))
    if wrong:
        raise ValueError(f"{model_path}: {ranks.name} has loaded other weights than rank 0: {named(wrong)}. "
                         "Copy the model's files from one host to the others")
    if num_wrong:
        raise SystemExit(1)
    return everything


def digest(checksums: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(sorted(checksums.items())).encode()).hexdigest()[:16]


def changed_tensors(run_dir: Path, checksums: dict[str, int]) -> str:
    """The tensors that a run's record of its weights has otherwise, for a message; empty where there is no record."""
    try:
        known = json.loads((run_dir / WEIGHTS_FILE).read_text())
        return named([name for name in sorted(checksums.keys() | known.keys()) if known.get(name) != checksums.get(name)])
    except (OSError, ValueError, AttributeError):
        return ""


def named(tensors: list[str]) -> str:
    more = f" and {len(tensors) - 3:,} more" if len(tensors) > 3 else ""
    return f"{len(tensors):,} tensor(s) differ, {', '.join(tensors[:3])}{more}" if tensors else ""
