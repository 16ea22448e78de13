"""The user's settings for the model: which weights, and which linears are adapted.
Imports no torch, so that the settings are checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, and how they are stored during training."""

    path: str  # a directory, or a repository on the Hugging Face hub
    base: Literal["int8", "nf4", "bf16", "float32"]  # storage of the frozen linears; float32 also computes in float32


@dataclass(frozen=True)
class LoraConfig:
    """Which linears are adapted, and how strongly."""

    rank: int
    alpha: float  # the adapter's output is scaled by alpha / rank
    target: tuple[str, ...]  # last part of the adapted linears' names
    dropout: float = 0.0  # share of the adapter's inputs set to zero while training
    experts: bool = False  # also adapt every routed expert of a mixture-of-experts model, each with rank `rank`

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}, expected at least 1")
        if not self.target:
            raise ValueError("lora.target is empty: name at least one linear, such as [q_proj, v_proj]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}, expected 0 <= dropout < 1")
        if self.experts and self.dropout:
            raise ValueError(f"lora.dropout is {self.dropout}, expected 0 with lora.experts: peft knows no other either")
