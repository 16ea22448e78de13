"""What a run saves and restores: its step, its adapters, its optimizer, and the settings that decide its results.
Costs one copy of adapters and optimizer states in CPU memory while they are saved or restored."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from torch import Tensor, nn

from data.files import write_text
from data.tokenized import TokenizedRows
from loop import checkpoint
from loop.config import Config, by_name, to_yaml
from loop.distributed.groups import Ranks
from loop.metrics import RunLog
from loop.optim import load_optimizer, named_states
from model.lora import peft_config, to_peft_name
from model.stages import Stage

DECISIVE = ("model.", "lora.", "data.", "train.", "eval.")  # sections whose settings decide a run's results
# settings of these sections that may change when a run is resumed: the results differ by rounding only, at dropout 0
FREE = ("train.microbatch_tokens", "train.recompute", "train.keep_layers", "train.deterministic", "train.router_stats",
        "train.plan", "train.fast_paths", "train.memory_trace", "data.train", "data.eval", "eval.every", "model.path")


@dataclass
class State:
    """This rank's stage of the model, and everything that training changes."""

    stage: Stage
    adapters: dict[str, nn.Parameter]  # by global name
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any]  # see `course`
    step: int = 0  # optimizer steps done
    evaluated: bool = True  # whether the evaluation after this step was made, if one is due; not so after a stop by a signal
    saved_at: float = field(default_factory=time.monotonic)  # when the last checkpoint was written


def course(config: Config, train_rows: TokenizedRows, eval_rows: TokenizedRows) -> dict[str, Any]:
    """The settings and rows that decide a run's results; a resumed run must have the same."""
    settings = {name: value for name, value in by_name(config).items() if name.startswith(DECISIVE) and name not in FREE}
    for name, rows in (("training rows", train_rows), ("held-out rows", eval_rows)):
        digest = hashlib.sha256(rows.ids_N.numpy().tobytes())
        digest.update(rows.supervised_N.numpy().tobytes())
        settings[name] = digest.hexdigest()[:16]
    decisive: dict[str, Any] = json.loads(json.dumps(settings))  # as a checkpoint has them: tuples become lists
    return decisive


def resume(config: Config, state: State, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Restores step, adapters and optimizer on every rank from the newest verified checkpoint, if there is one.

    Raises:
        ValueError: the checkpoint was written under another `course` (`resume: auto`).
    """

    def read() -> checkpoint.Saved | None:
        path = checkpoint.newest(config.run_dir, say)
        if path is None:
            return None
        saved = checkpoint.load(path)
        old, new = saved.state["settings"], state.settings
        changed = "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}"
                            for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))
        if changed and config.resume != "force":
            raise ValueError(
                f"{path} was trained with other settings: {changed}. Put them back, choose another run=NAME, "
                "start anew with resume=never, or continue all the same with resume=force"
            )
        say(f"continuing from {path}" + (f" with changed settings: {changed}" if changed else ""))
        return saved

    saved = ranks.on_main(read)
    found = [saved.state["step"], saved.state["eval_loss"] is not None] if saved else [0, False]
    state.step, state.evaluated = ranks.broadcast(torch.tensor(found, device=ranks.device)).tolist()
    if state.step:
        load_adapters(state.adapters, ranks.broadcast_tensors(saved.adapter if saved else None))
        load_optimizer(state.optimizer, state.adapters, ranks.broadcast_tensors(saved.optimizer if saved else None))
    if ranks.is_main:
        write_text(config.run_dir / "config.yaml", to_yaml(config))


@torch.no_grad()
def load_adapters(adapters: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copies a checkpoint's adapters, by their names in peft, into this rank's; ignores those of other stages.

    Raises:
        ValueError: an adapter of this rank is missing in `saved` or has another shape.
    """
    for name, parameter in adapters.items():
        tensor = saved.get(to_peft_name(name))
        if tensor is None or tensor.shape != parameter.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise ValueError(f"the checkpoint does not fit: {to_peft_name(name)} {found}, expected {tuple(parameter.shape)}")
        parameter.copy_(tensor)


def save(config: Config, state: State, eval_loss: float | None, ranks: Ranks, log: RunLog) -> str:
    """Writes one checkpoint on rank 0, and says where. All ranks must call, since the other stages send their tensors to it.

    Args:
        eval_loss: None where this step was not evaluated.
    """
    with ranks.signals.saving(state.step):
        log.sync()  # the checkpoint relies on the metrics up to its step
        adapter = ranks.gather_stages({to_peft_name(name): tensor.detach() for name, tensor in state.adapters.items()})
        optimizer = ranks.gather_stages(named_states(state.optimizer, state.adapters))
        state.saved_at, said = time.monotonic(), ""
        if ranks.is_main:
            described = {"step": state.step, "eval_loss": eval_loss, "settings": state.settings}
            saved = checkpoint.Saved(described, adapter, peft_config(config.lora, config.model.path), optimizer)
            said = f"saved {checkpoint.save(config.run_dir, saved, config.checkpoint.keep)}"
            log.say(said)
        return said


def save_on_signals(config: Config, state: State, ranks: Ranks, log: RunLog) -> None:
    """From here on a signal has the last finished step saved before the run ends."""
    aside = ranks.aside()

    def save_step(step: int) -> str:
        assert step == state.step
        return save(config, state, None, aside, log)

    ranks.signals.save = save_step
