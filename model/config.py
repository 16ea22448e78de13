"""The user's settings for the model: which weights, and which linears are adapted.
Imports no torch, so that the settings are checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Literal

MOST_RANK = 65_536  # the largest hidden size (see architectures.py): a larger rank could add nothing
ALL = "all-linear"  # the target that stands for every linear
MOST_ALPHA = 1_000_000  # the adapter's output, scaled by alpha / rank, must stay a float32


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, and how they are stored during training."""

    path: str  # a directory, or a repository on the Hugging Face hub
    base: Literal["int8", "nf4", "bf16", "float32"]  # storage of the frozen linears; float32 also computes in float32
    adapter: str | None = None  # directory of an adapter of this model to begin with, such as another run's checkpoint


@dataclass(frozen=True)
class LoraConfig:
    """Which linears are adapted, and how strongly."""

    rank: int  # of the two matrices that are trained beside each adapted linear
    alpha: float  # the adapter's output is scaled by alpha / rank
    target: tuple[str, ...]  # last part of the adapted linears' names; all-linear: every one that is quantized
    dropout: float = 0.0  # share of the adapter's inputs set to zero while training
    experts: bool = False  # also adapt every routed expert of a mixture-of-experts model, each with rank `rank`

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_RANK:
            raise ValueError(f"lora.rank is {self.rank}, expected at least 1 and at most {MOST_RANK:,}")
        if not 0 < self.alpha <= MOST_ALPHA:
            raise ValueError(f"lora.alpha is {self.alpha}, expected a finite number above 0 and at most {MOST_ALPHA:,}")
        if not self.target:
            raise ValueError("lora.target is empty: name at least one linear, such as [q_proj, v_proj]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}, expected 0 <= dropout < 1")
        if self.experts and self.dropout:
            raise ValueError(f"lora.dropout is {self.dropout}, expected 0 with lora.experts: peft knows no other either")

    def adapted(self, linears: Iterable[str]) -> list[str]:
        """The last parts of the adapted linears' names.

        Args:
            linears: of all linears of the model, see architectures.py.
        """
        return sorted(set(linears if ALL in self.target else self.target))


def local_directory(path: str) -> Path | None:
    """The directory that `model.path` names, or None where it is a name on the Hugging Face hub.

    Raises:
        ValueError: no such directory, and no name on the hub either.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(
            f"model.path: {path}: no such directory. Expected one, or a hub name such as Qwen/Qwen3-4B-Thinking-2507"
        )
    return None


def base_name(path: str) -> str:
    """How an adapter names its base model: an absolute path, since others read it elsewhere, or a name on the hub."""
    directory = Path(path).expanduser()
    return str(directory.absolute()) if directory.is_dir() else path


def check_targets(config: LoraConfig, names: Iterable[str], has_experts: bool = False) -> None:
    """Checks that the model has everything that is to be adapted; `names` are the names of all its linears.

    Raises:
        ValueError: no linear has the name of a target, or `lora.experts` is set for a model without routed experts.
    """
    if config.experts and not has_experts:
        raise ValueError("lora.experts is true, but the model has no routed experts")
    known = {name.rpartition(".")[2] for name in names}
    for target in config.target:
        if target not in (*known, ALL):
            there = ", ".join(sorted(known))
            raise ValueError(f"lora.target: no linear of the model is called {target!r}; there are {there}; or {ALL}")


def check_keep_layers(keep_layers: int, first: int, stop: int) -> None:
    """Raises:
        ValueError: the stage of sublayers `first` to `stop` has fewer layers than are to be kept.
    """
    num_layers = (stop + 1) // 2 - first // 2
    if keep_layers > num_layers:
        raise ValueError(f"train.keep_layers is {keep_layers}, but the stage has {num_layers} layers")
