"""What a run saves and restores: its step, its adapters, its optimizer, and the settings that decide its results.
Costs one copy of adapters and optimizer states in CPU memory, from when they are saved until they are written, and while
they are restored."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data.chat import ChatFormat
from data.files import write_text, write_whole
from loop import checkpoint
from loop.config import Config, to_yaml
from loop.distributed.groups import Ranks
from loop.errors import UNFINISHED
from loop.identity import WEIGHTS, WEIGHTS_FILE, Course, changed_tensors, changes
from loop.optim import load_optimizer, named_states
from model.config import base_name
from model.lora import peft_config, to_peft_name
from model.stages import Stage


class Writer:
    """Writes one checkpoint after the other in a thread, while the loop goes on."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.written: Future[str] = Future()  # what is said of the last checkpoint
        self.written.set_result("")

    def write(self, run_dir: Path, saved: checkpoint.Saved, keep: int, say: Callable[[str], None]) -> None:
        """Begins to write a checkpoint when the one before is written; says so when it is committed."""
        def commit() -> str:
            said = f"saved {checkpoint.save(run_dir, saved, keep)}"
            say(said)
            return said

        self.wait()
        self.written = self.thread.submit(commit)
        UNFINISHED[:] = [self.written]  # however this process ends

    def wait(self) -> str:
        """Waits until the last checkpoint is committed, and returns what was said.

        Raises:
            ValueError: the checkpoint could not be written.
        """
        return self.written.result()

    def check(self) -> None:
        """Raises what `wait` would raise, without waiting."""
        if self.written.done():
            self.wait()


@dataclass
class State:
    """This rank's stage of the model, and everything that training changes."""

    stage: Stage
    adapters: dict[str, nn.Parameter]  # by global name
    optimizer: torch.optim.Optimizer
    settings: Course = field(default_factory=dict)  # on rank 0
    checksums: dict[str, int] = field(default_factory=dict)  # of the base model's tensors
    newest: Path | None = None  # the checkpoint to continue from, on rank 0
    chat: ChatFormat | None = None  # on rank 0, where the whole model is there and `eval.samples` asks for answers
    files: dict[str, bytes] = field(default_factory=dict)  # tokenizer, template and the like, by file name; on rank 0
    step: int = 0  # optimizer steps done
    evaluated: bool = True  # whether the evaluation after this step was made, if one is due; not so after a stop by a signal
    saved_at: float = field(default_factory=time.monotonic)  # when the last checkpoint was copied
    writer: Writer = field(default_factory=Writer)  # used on rank 0


def newest_checkpoint(config: Config, settings: Course, say: Callable[[str], None]) -> Path | None:
    """The checkpoint from which this run continues, if there is one; on rank 0.

    Raises:
        ValueError: it was written under another `course` (`resume: auto`).
    """
    path = checkpoint.newest(config.run_dir, say)
    if path is not None:
        refuse_changes(config, path, changes(checkpoint.read_json(path / checkpoint.STATE)["settings"], settings))
    return path


def refuse_changes(config: Config, path: Path, changed: str) -> None:
    if changed and config.resume != "force":
        raise ValueError(
            f"{path} was trained with other settings: {changed}. Put them back, choose another run=NAME, "
            "start anew with resume=never, or continue all the same with resume=force"
        )


def resume(config: Config, state: State, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Restores step, adapters and optimizer on every rank from `state.newest`, if there is one.

    Raises:
        ValueError: the base model's weights are others than those that the checkpoint was trained on (`resume: auto`).
    """

    def read() -> checkpoint.Saved | None:
        if state.newest is None:
            return None
        saved = checkpoint.load(state.newest)
        changed = changes(saved.state["settings"], state.settings)
        if saved.state["settings"].get(WEIGHTS) not in (None, state.settings[WEIGHTS]):
            changed += f" ({changed_tensors(config.run_dir, state.checksums)}; download {config.model.path} again?)"
        refuse_changes(config, state.newest, changed)
        say(f"continuing from {state.newest}" + (f" with changed settings: {changed}" if changed else ""))
        return saved

    saved = ranks.on_main(read)
    found = [saved.state["step"], saved.state["eval_loss"] is not None] if saved else [0, False]
    state.step, state.evaluated = ranks.broadcast(torch.tensor(found, device=ranks.device)).tolist()
    if state.step:
        load_adapters(state.adapters, ranks.broadcast_tensors(saved.adapter if saved else None))
        load_optimizer(state.optimizer, state.adapters, ranks.broadcast_tensors(saved.optimizer if saved else None))
    elif config.model.adapter:
        load_adapters(state.adapters, ranks.broadcast_tensors(ranks.on_main(lambda: first_adapter(config, state, say))))
    if ranks.is_main:
        write_text(config.run_dir / "config.yaml", to_yaml(config))
        write_text(config.run_dir / WEIGHTS_FILE, json.dumps(state.checksums))
        write_once(config.run_dir, state.files, say)


def first_adapter(config: Config, state: State, say: Callable[[str], None]) -> dict[str, Tensor]:
    """The tensors of `model.adapter`, with which a run begins.

    Raises:
        ValueError: there is no adapter, or it is one of another rank, scale or set of linears.
    """
    directory = Path(config.model.adapter or "").expanduser()
    if not (directory / checkpoint.ADAPTER).is_file():
        raise ValueError(f"model.adapter: {directory}: no {checkpoint.ADAPTER} there. Expected the directory of an adapter, "
                         "such as a run's checkpoint")
    found = checkpoint.read_json(directory / checkpoint.ADAPTER_CONFIG)
    for key, value in peft_config(config.lora, "", state.stage.model.config.model_type).items():
        was = sorted(found[key]) if isinstance(found.get(key), list) else found.get(key)
        if key in ("r", "lora_alpha", "target_modules", "target_parameters") and was != (
                sorted(value) if isinstance(value, list) else value):
            raise ValueError(f"model.adapter: {directory}: its {key} is {was}, and this run's is {value}, by the section lora:")
    say(f"the adapters begin as those of {directory}")
    return load_file(directory / checkpoint.ADAPTER)


def write_once(run_dir: Path, files: dict[str, bytes], say: Callable[[str], None]) -> None:
    """Writes files of which a run has one copy; says which of them were others, as after the model's publisher changed one."""
    for name, content in files.items():
        path = run_dir / name
        known = path.read_bytes() if path.exists() else None
        if known not in (None, content):
            say(f"warning: {path} is not what this run's model and settings make of it, and is written anew")
        if known != content:
            write_whole(path, lambda file: file.write_bytes(content))


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
            raise ValueError(f"the adapter does not fit: {to_peft_name(name)} {found}, expected {tuple(parameter.shape)}")
        parameter.copy_(tensor)


def save(config: Config, state: State, eval_loss: float | None, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Copies what a checkpoint holds to rank 0, whose `state.writer` writes it. All ranks must call, since the other stages
    send their tensors to it.

    Args:
        eval_loss: None where this step was not evaluated.

    Raises:
        ValueError: the checkpoint before could not be written.
    """
    with ranks.signals.saving(state.step):
        adapter = ranks.gather_stages({to_peft_name(name): tensor.detach() for name, tensor in state.adapters.items()})
        optimizer = ranks.gather_stages(named_states(state.optimizer, state.adapters))
        state.saved_at = time.monotonic()
        if ranks.is_main:
            described = {"step": state.step, "eval_loss": eval_loss, "settings": state.settings}
            adapter_config = peft_config(config.lora, base_name(config.model.path), state.stage.model.config.model_type)
            saved = checkpoint.Saved(described, adapter, adapter_config, optimizer, state.files)
            state.writer.write(config.run_dir, saved, config.checkpoint.keep, say)


def save_on_signals(
    config: Config, state: State, ranks: Ranks, sync: Callable[[], None], say: Callable[[str], None]
) -> None:
    """From here on a signal has the last finished step saved before the run ends; `sync` is called before."""
    aside = ranks.aside()

    def save_step(step: int, is_begun: bool) -> str:
        if is_begun:
            state.writer.wait()
            return f"step {step} was saved already"
        assert step == state.step
        sync()
        save(config, state, None, aside, say)
        return state.writer.wait()

    ranks.signals.turns.begun = ranks.signals.turns.ended = 2 * state.step + 1  # that step is saved
    ranks.signals.save = save_step
