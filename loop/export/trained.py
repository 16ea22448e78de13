"""The checkpoint that is exported, and what it was trained with.
Costs the tokenizer, and a hash of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.chat import ChatFormat
from loop import checkpoint
from loop.config import Config, load_config
from loop.run import load_tokenizer
from model.weights.fetch import model_directory
from model.weights.identity import quick_identity


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, and the model and tokenizer that the run began with."""

    path: Path
    config: Config
    model_dir: Path
    chat: ChatFormat

    @property
    def adapter(self) -> Path:
        return self.path / checkpoint.ADAPTER


def find_trained(source: Path, which: str, overrides: list[str]) -> Trained:
    """Finds a checkpoint that verifies, and the base model that it was trained on.

    Args:
        source: the directory of a run or of one of its checkpoints.
        which: of a run's checkpoints: best, newest, or the number of a step.
        overrides: settings that are others here, such as model.path=DIR.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or the base model is another one now.
    """
    if (source / checkpoint.MANIFEST).is_file():
        source, which = source.resolve().parent, source.resolve().name.removeprefix("step-")
    config = load_config(source / "config.yaml", overrides)
    path = checkpoint.find_checkpoint(source, which)
    model_dir = model_directory(config.model.path)
    known, found = checkpoint.read_json(path / checkpoint.STATE)["settings"].get("base model"), quick_identity(model_dir)
    if known not in (None, found):
        raise ValueError(f"{config.model.path}: another model than the one that {path} was trained on ({found}, expected "
                         f"{known}). Name that one with --set model.path=DIR")
    return Trained(path, config, model_dir, ChatFormat(load_tokenizer(model_dir), config.data.think))
