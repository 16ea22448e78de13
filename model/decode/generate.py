"""Writes answers with the model as it trains: quantized base, adapters on or off, many rows at a time.
Costs the cache (cache.py), the logits of one position a row, and on a CPU what weights.py keeps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Callable, Sequence

import torch
from torch import Tensor

from model.decode.cache import Cache, Prefill, Step
from model.decode.sampling import Sampling, choose
from model.decode.weights import kept_for_decoding
from model.mixers import Memory, Segments
from model.stages import Stage

# B rows that are being written, T tokens of a packed stream, D hidden size, V vocabulary

PREFILL_TOKENS = 8192  # most tokens of prompts that are computed at once, unless one prompt alone is longer
STREAM_MULTIPLE = 16  # a stream of prompts is padded to it on a CPU: oneDNN compiles kernels for each new number of rows


@dataclass(frozen=True)
class Answer:
    """What the model wrote after one prompt."""

    ids: list[int]  # if `stopped`, the last one is the stop token
    log_probs: list[float]  # of each id, under the distribution it was chosen from (see `Sampling`)
    stopped: bool  # whether the stop token ended the answer, else the longest length did

    @property
    def text_ids(self) -> list[int]:
        """The ids without the stop token."""
        return self.ids[:-1] if self.stopped else self.ids


@dataclass
class Row:
    """One prompt, and what was written after it so far."""

    index: int  # among the prompts
    prompt: Sequence[int]
    numbers: list[float]  # for sampling, one for each token of the longest answer
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        """The positions in the cache: all but the last written one."""
        return len(self.prompt) + len(self.ids) - 1


def generate(
    stage: Stage, prompts: Sequence[Sequence[int]], *, stop_id: int, max_tokens: int, sampling: Sampling = Sampling(),
    batch_rows: int = 16, numbers: Sequence[int] | None = None, finished: Callable[[int, Answer], object] | None = None,
) -> list[Answer]:
    """The answer to each prompt.

    An answer depends on its own prompt, and if sampled on the seed and the row's number, but on no other row, except that a
    matmul may round differently for another number of rows.

    Args:
        stage: a stage that holds the whole model.
        prompts: token ids, at least one each.
        stop_id: the token that ends an answer.
        max_tokens: the longest answer, the stop token included.
        batch_rows: how many rows are written at a time; one that is finished makes room for one that waits.
        numbers: of the rows, for sampling; by default their places among the prompts.
        finished: called with a prompt's place and answer as soon as the answer is finished.

    Raises:
        ValueError: an empty prompt.
    """
    if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompt {empty[0]} holds no token, expected at least one")
    assert stage.is_first and stage.is_last, "a part of a model cannot write"
    was_training = stage.training
    stage.eval()
    try:
        with torch.no_grad(), kept_for_decoding(stage):
            names = range(len(prompts)) if numbers is None else numbers
            rows = [Row(i, prompt, sampling.numbers(names[i], max_tokens)) for i, prompt in enumerate(prompts)]
            return Decoder(stage, stop_id, max_tokens, sampling, batch_rows, finished).run(rows)
    finally:
        stage.train(was_training)


class Decoder:
    """The rows that are being written, each in a slot of the cache."""

    def __init__(
        self, stage: Stage, stop_id: int, max_tokens: int, sampling: Sampling, batch_rows: int,
        finished: Callable[[int, Answer], object] | None,
    ) -> None:
        self.stage, self.stop_id, self.max_tokens, self.sampling = stage, stop_id, max_tokens, sampling
        self.batch_rows, self.finished = batch_rows, finished
        self.device = stage.model.lm_head.weight.device
        self.slots: list[Row | None] = []
        self.answers: dict[int, Answer] = {}

    def run(self, rows: list[Row]) -> list[Answer]:
        # the longest prompts first: rows of similar length are in the cache together
        waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
        self.cache = Cache(min(self.batch_rows, len(rows)))
        if self.max_tokens == 0:
            for row in rows:
                self.finish(row, stopped=False)
            waiting.clear()
        while waiting or self.slots:
            entering = self.take(waiting)
            if entering:
                self.enter(entering)
            else:
                self.close_gaps()
                self.step([row for row in self.slots if row is not None])
            while self.slots and self.slots[-1] is None:
                self.slots.pop()
        return [self.answers[index] for index in range(len(rows))]

    def take(self, waiting: deque[Row]) -> list[Row]:
        """The waiting rows that enter now."""
        room = self.cache.num_slots - len(self.slots) + self.slots.count(None)
        entering: list[Row] = []
        num_tokens = 0
        while waiting and len(entering) < room and (
                not entering or num_tokens + len(waiting[0].prompt) <= PREFILL_TOKENS):
            entering.append(waiting.popleft())
            num_tokens += len(entering[-1].prompt)
        return entering

    def enter(self, rows: list[Row]) -> None:
        """Computes the prompts as one packed stream, and chooses the first token of each answer."""
        places = [slot for slot, row in enumerate(self.slots) if row is None]
        places = (places + list(range(len(self.slots), self.cache.num_slots)))[: len(rows)]
        self.slots += [None] * (max(places) + 1 - len(self.slots))
        for slot, row in zip(places, rows):
            self.slots[slot] = row
        lengths = [len(row.prompt) for row in rows]
        ids = [token for row in rows for token in row.prompt]
        positions = [position for length in lengths for position in range(length)]
        last_B = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        if self.device.type == "cpu" and (missing := -len(ids) % STREAM_MULTIPLE):
            lengths.append(missing)
            ids += [0] * missing
            positions += range(missing)
        self.cache.reserve(max(lengths))
        h_TD = self.hidden(ids, torch.tensor(positions, device=self.device), lengths, Prefill(self.cache, places))
        self.accept(rows, h_TD[last_B])

    def step(self, rows: list[Row]) -> None:
        """Computes the last token of each row, and chooses the next one."""
        lengths = [row.num_cached for row in rows]
        self.cache.reserve(max(lengths) + 1)
        lengths_B = torch.tensor(lengths, device=self.device)
        memory = Step(self.cache, lengths_B, max(lengths), self.stage.model.lm_head.weight.dtype)
        self.accept(rows, self.hidden([row.ids[-1] for row in rows], lengths_B, [1] * len(rows), memory))

    def hidden(self, ids: list[int], positions_T: Tensor, lengths: list[int], memory: Memory) -> Tensor:
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)
        ids_1T = torch.tensor([ids], device=self.device)
        h_1TD = self.stage(ids_1T, positions_T, Segments(bounds, tuple(lengths), memory))
        return h_1TD[0]

    def accept(self, rows: list[Row], h_BD: Tensor) -> None:
        """Chooses the next token of each row; the finished rows leave their slots."""
        model = self.stage.model
        logits_BV = model.lm_head(model.model.norm(h_BD))
        chosen = choose(logits_BV, self.sampling, [row.numbers[len(row.ids)] for row in rows])
        for row, token, log_prob in zip(rows, *chosen):
            row.ids.append(token)
            row.log_probs.append(log_prob)
            if token == self.stop_id or len(row.ids) == self.max_tokens:
                self.slots[self.slots.index(row)] = None
                self.finish(row, stopped=token == self.stop_id)

    def finish(self, row: Row, stopped: bool) -> None:
        self.answers[row.index] = answer = Answer(row.ids, row.log_probs, stopped)
        if self.finished is not None:
            self.finished(row.index, answer)

    def close_gaps(self) -> None:
        """Moves the last rows into slots that no waiting row took."""
        while None in self.slots:
            row = self.slots.pop()
            if row is not None:
                gap = self.slots.index(None)
                self.cache.move(len(self.slots), gap)
                self.slots[gap] = row
