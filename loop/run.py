"""What both entry points do around the loop: the run's directory, its data, resuming and saving."""

from __future__ import annotations

import fcntl
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, TextIO

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from data.tokenized import TokenizedRows, load_rows
from loop import checkpoint
from loop.config import Config, to_yaml
from loop.metrics import RunLog
from loop.optim import load_optimizer, optimizer_tensors
from loop.ranks import Ranks
from model.lora import peft_config, to_peft_name

LOCK = ".lock"
LOCKS: dict[Path, TextIO] = {}  # directories this process has taken, until it ends

# settings that may change in the middle of a run without changing what it computes (beyond rounding, at dropout 0)
FREE = ("train.microbatch_tokens", "train.recompute", "train.keep_layers", "train.deterministic", "train.router_stats",
        "train.memory_trace", "data.train", "data.eval")


def prepare_directory(config: Config, say: Callable[[str], None]) -> None:
    """Makes the run's directory and takes it for this process; under `resume: never` an earlier run of that name is
    moved aside, never deleted.

    Raises:
        ValueError: another process trains there, or it cannot be written.
    """
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        take_lock(run_dir)
    except OSError as error:
        raise ValueError(
            f"{error.filename or run_dir}: {error.strerror}. Results go to checkpoints/<run>/ below the current directory, "
            "which must be one that can be written"
        ) from None
    if config.resume == "never" and any(path.name != LOCK for path in run_dir.iterdir()):
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
            number += 1
        run_dir.rename(aside)
        say(f"resume=never: the earlier run is now {aside}")
        run_dir.mkdir()
        del LOCKS[run_dir.resolve()]
        take_lock(run_dir)


def take_lock(run_dir: Path) -> None:
    """Keeps other processes out of a run's directory; the system gives the lock back however this one ends."""
    if run_dir.resolve() in LOCKS:
        return
    lock = open(run_dir / LOCK, "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{run_dir}: another process trains there. Wait for it, or choose another run=NAME") from None
    LOCKS[run_dir.resolve()] = lock


def load_tokenizer(model_dir: Path) -> Any:
    """The model's own tokenizer.

    Raises:
        ValueError: it is missing or not a fast one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{model_dir}: no tokenizer could be read ({str(error).splitlines()[0]})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{model_dir}: its tokenizer has no tokenizer.json, which is needed")
    return tokenizer


def load_splits(config: Config, model_dir: Path, ranks: Ranks) -> tuple[TokenizedRows, TokenizedRows]:
    """Training and held-out rows, tokenized by rank 0 and sent to the others, which need neither files nor tokenizer."""

    def prepare() -> list[TokenizedRows]:
        tokenizer = load_tokenizer(model_dir)
        cache = config.run_dir / "data"
        return [load_rows(split, tokenizer, config.data, cache) for split in ("train", "eval")]

    prepared = ranks.on_main(prepare)
    sent = [rows.to_tensors() for rows in prepared] if prepared else [None, None]
    train, held_out = (TokenizedRows.from_tensors(ranks.broadcast_tensors(tensors)) for tensors in sent)
    return train, held_out


def course(config: Config, train_rows: TokenizedRows, eval_rows: TokenizedRows) -> dict[str, Any]:
    """All that decides the run's course and what its losses mean: a resumed run must agree in it."""
    settings: dict[str, Any] = {"eval.max_rows": config.eval.max_rows}
    for name, rows in (("training rows", train_rows), ("held-out rows", eval_rows)):
        digest = hashlib.sha256(rows.ids_N.numpy().tobytes())
        digest.update(rows.supervised_N.numpy().tobytes())
        settings[name] = digest.hexdigest()[:16]
    for section in ("model", "lora", "train", "data"):
        settings |= {f"{section}.{key}": value for key, value in asdict(getattr(config, section)).items()}
    return {key: value for key, value in json.loads(json.dumps(settings)).items() if key not in FREE}


def resume(
    config: Config, settings: dict[str, Any], adapters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
    ranks: Ranks, say: Callable[[str], None],
) -> int:
    """Puts adapters and optimizer back as the newest verified checkpoint has them, on every rank.

    Returns:
        The step it was saved at; 0 where there is none.

    Raises:
        ValueError: the settings that decide the run's course are not the checkpoint's (`resume: auto`).
    """

    def read() -> dict[str, Tensor]:
        path = checkpoint.newest(config.run_dir, say)
        if path is None:
            return {"step": torch.tensor(0)}
        saved = checkpoint.load(path)
        changed = checkpoint.changed_settings(saved.state["settings"], settings)
        if changed and config.resume != "force":
            raise ValueError(
                f"{path} was trained with other settings: {'; '.join(changed)}. Put them back, choose another run=NAME, "
                "start anew with resume=never, or continue all the same with resume=force"
            )
        say(f"continuing from {path}" + (f" with changed settings: {'; '.join(changed)}" if changed else ""))
        tensors = {f"adapter/{name}": tensor for name, tensor in saved.adapter.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in saved.optimizer.items()}
        return tensors | {"step": torch.tensor(saved.state["step"])}

    tensors = ranks.broadcast_tensors(ranks.on_main(read))
    step = int(tensors.pop("step"))
    if step:
        load_adapters(adapters, part(tensors, "adapter/"))
        load_optimizer(optimizer, adapters, part(tensors, "optimizer/"))
    if ranks.is_main:
        (config.run_dir / "config.yaml").write_text(to_yaml(config))
    return step


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def load_adapters(adapters: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copies a checkpoint's adapters (peft's names) into this rank's; others' in `saved` are passed over.

    Raises:
        ValueError: one of this rank's is missing or has another shape.
    """
    for name, parameter in adapters.items():
        tensor = saved.get(to_peft_name(name))
        if tensor is None or tensor.shape != parameter.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise ValueError(f"the checkpoint does not fit: {to_peft_name(name)} {found}, expected {tuple(parameter.shape)}")
        parameter.copy_(tensor)


def save(
    config: Config, step: int, eval_loss: float, settings: dict[str, Any], adapters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer, ranks: Ranks, log: RunLog,
) -> None:
    """Writes one checkpoint on rank 0, to which other stages send what they hold; all ranks call it."""
    tensors = {f"adapter/{to_peft_name(name)}": parameter.detach() for name, parameter in adapters.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(optimizer, adapters).items()}
    tensors = ranks.gather_stages(tensors)
    if not ranks.is_main:
        return
    log.sync()
    path = checkpoint.save(
        config.run_dir,
        checkpoint.Saved(
            state={"step": step, "eval_loss": eval_loss, "settings": settings},
            adapter={name: tensor.cpu() for name, tensor in part(tensors, "adapter/").items()},
            adapter_config=peft_config(config.lora, config.model.path),
            optimizer={name: tensor.cpu() for name, tensor in part(tensors, "optimizer/").items()},
        ),
        config.checkpoint.keep,
    )
    log.say(f"saved {path}")
