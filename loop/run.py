"""What both entry points do around the loop: the run's directory, its data, resuming and saving."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from data.tokenized import TokenizedRows, load_rows
from loop import checkpoint
from loop.config import Config, to_yaml
from loop.optim import load_optimizer, optimizer_tensors
from loop.ranks import Ranks
from model.lora import peft_config, to_peft_name

# settings that may change in the middle of a run without changing what it computes (beyond rounding)
FREE = ("train.microbatch_tokens", "train.recompute", "train.deterministic", "train.router_stats", "data.train", "data.eval")


def prepare_directory(config: Config, say: Callable[[str], None]) -> None:
    """Makes the run's directory; under `resume: never` an earlier run of that name is moved aside, never deleted."""
    run_dir = config.run_dir
    if config.resume == "never" and run_dir.exists():
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
            number += 1
        run_dir.rename(aside)
        say(f"resume=never: the earlier run is now {aside}")
    run_dir.mkdir(parents=True, exist_ok=True)


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
        return [load_rows(path, tokenizer, config.data, cache) for path in (config.data.train, config.data.eval)]

    prepared = ranks.on_main(prepare)
    sent = [rows.to_tensors() for rows in prepared] if prepared else [None, None]
    train, held_out = (TokenizedRows.from_tensors(ranks.broadcast_tensors(tensors)) for tensors in sent)
    return train, held_out


def course(config: Config, rows: TokenizedRows) -> dict[str, Any]:
    """All that decides the run's course: a resumed run must agree in it."""
    digest = hashlib.sha256(rows.ids_N.numpy().tobytes())
    digest.update(rows.supervised_N.numpy().tobytes())
    settings = {"data": digest.hexdigest()[:16]}
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
    optimizer: torch.optim.Optimizer,
) -> Path:
    """Writes one checkpoint (rank 0)."""
    return checkpoint.save(
        config.run_dir,
        checkpoint.Saved(
            state={"step": step, "eval_loss": eval_loss, "settings": settings},
            adapter={to_peft_name(name): parameter.detach().cpu() for name, parameter in adapters.items()},
            adapter_config=peft_config(config.lora, config.model.path),
            optimizer={name: tensor.cpu() for name, tensor in optimizer_tensors(optimizer, adapters).items()},
        ),
        config.checkpoint.keep,
    )
