"""The settings of the rows: which are trained on, which are held out, and what happens to those that do not fit.
Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Which rows are trained on, and what happens to those that do not fit."""

    train: str  # JSONL file of training rows
    eval: str  # JSONL file of held-out rows; or how many training rows to hold out: a share, 0.1, or a number, 500
    sources: tuple[str, ...] | None  # rows with another metadata.source are dropped; null: all are trained on
    think: Literal["strip", "keep"] = "strip"  # <think> blocks of answers: removed, or supervised with the answer
    max_tokens: int = 8192  # longest example, prompt and answer together
    overlong: Literal["error", "drop", "truncate"] = "error"  # what happens to rows longer than max_tokens
    bad_rows: Literal["error", "skip"] = "error"  # what happens to rows that cannot be read

    def __post_init__(self) -> None:
        if not 2 <= self.max_tokens <= 2**24:  # positions are 32-bit numbers
            raise ValueError(f"data.max_tokens is {self.max_tokens}, expected at least 2 and at most {2**24:,}")
        if self.sources is not None and not self.sources:
            raise ValueError("data.sources is empty: name at least one metadata.source, such as [textbook], or null for all")
        number = self.held_out
        if number is not None and not (0 < number < 1 or 1 <= number <= 2**31 and number.is_integer()):
            raise ValueError(f"data.eval is {self.eval}, expected a file of held-out rows, or how many of the training rows to "
                             "hold out: a share, such as 0.1, or a number, such as 500")

    @property
    def held_out(self) -> float | None:
        """The share (below 1) or number of training rows that are held out; None where these are in a file of their own."""
        try:
            number = float(self.eval)
        except ValueError:
            return None
        return number if math.isfinite(number) else None

    def file(self, split: str) -> str:
        """The file that holds the rows of a split, `train` or `eval`; others too, where rows of `train` are held out."""
        return self.train if split == "train" or self.held_out is not None else self.eval

    def refuses(self, is_overlong: bool) -> bool:
        """Whether a run refuses a row that is too long, or one that cannot be read."""
        return "error" == (self.overlong if is_overlong else self.bad_rows)

    def takes(self, source: str) -> bool:
        return self.sources is None or source in self.sources
