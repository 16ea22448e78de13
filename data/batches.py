"""Iterates over optimizer steps: packs each step's rows into this rank's microbatches; resumable by step number.
Holds one step's tokens beside the flat arrays of all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from data.packing import Packing, pack_step
from data.tokenized import TokenizedRows

# T tokens of the stream, N supervised positions, R segments (the rows, and the padding as the last one)


@dataclass(frozen=True)
class Microbatch:
    """A packed stream of whole rows, padded at the end. Rows never see each other.

    `lengths` are the segments' lengths as plain numbers, so that cutting the stream never waits for the device.
    """

    ids_T: Tensor  # int64
    positions_T: Tensor  # int64, from 0 in each segment
    cu_seqlens_R1: Tensor  # int32: segment r is [cu_seqlens_R1[r], cu_seqlens_R1[r + 1])
    lengths: tuple[int, ...]
    predict_N: Tensor  # int64: positions whose next token is supervised
    labels_N: Tensor  # int64: those next tokens
    sources_N: Tensor  # int64: source of each supervised token, on the CPU
    lines: tuple[int, ...]  # the rows' lines in the data file
    num_tokens: int  # without padding

    def to(self, device: torch.device) -> Microbatch:
        if device.type == "cpu":
            return self
        moved = {name: getattr(self, name).to(device, non_blocking=True)
                 for name in ("ids_T", "positions_T", "cu_seqlens_R1", "predict_N", "labels_N")}
        return Microbatch(**{**self.__dict__, **moved})


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step as one data-parallel replica sees it; the totals are over all replicas."""

    step: int  # from 1
    epoch: int  # from 0
    microbatches: list[Microbatch]
    length: int  # T of every microbatch
    slots: range  # this replica's microbatches, numbered through all replicas
    lines_by_slot: list[list[int]]  # lines of the rows of each microbatch, of all replicas
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int


class Batches:
    """Deals the rows of each optimizer step to the replicas; a step has the same rows for any number of replicas.

    Args:
        rows: all rows of the split.
        rows_per_step: rows of one optimizer step, over all replicas.
        microbatch_tokens: the most tokens of one forward and backward pass.
        replica, num_replicas: this rank's data-parallel share.

    Raises:
        ValueError: a row is longer than microbatch_tokens.
    """

    def __init__(
        self, rows: TokenizedRows, rows_per_step: int, microbatch_tokens: int, replica: int = 0, num_replicas: int = 1
    ) -> None:
        self.rows, self.rows_per_step, self.microbatch_tokens = rows, rows_per_step, microbatch_tokens
        self.replica, self.num_replicas = replica, num_replicas
        self.lengths = rows.lengths_E.tolist()
        longest = max(range(len(rows)), key=self.lengths.__getitem__)
        if self.lengths[longest] > microbatch_tokens:
            raise ValueError(
                f"{rows.path}:{int(rows.lines_E[longest])}: {self.lengths[longest]:,} tokens do not fit into "
                f"train.microbatch_tokens={microbatch_tokens}. Raise it, or lower data.max_tokens with data.overlong=drop"
            )
        # row r has the examples from first_example[r] to first_example[r + 1]
        lines = rows.lines_E.numpy()
        self.first_example = np.flatnonzero(np.diff(lines, prepend=-1, append=-1))
        self.num_rows = len(self.first_example) - 1
        self.steps_per_epoch = -(-self.num_rows // rows_per_step)
        self.order_of: tuple[int, int] | None = None  # the seed and epoch of `self.order`

    def train_steps(self, done: int, total: int, seed: int) -> Iterator[StepBatch]:
        """Steps `done + 1` to `total`, each epoch in its own shuffled order; a resumed run needs only `done`."""
        for step in range(done + 1, total + 1):
            yield self.pack(step, (step - 1) // self.steps_per_epoch, self.rows_of(step, seed))

    def rows_of(self, step: int, seed: int) -> np.ndarray:
        """The numbers of the rows of optimizer step `step`."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self.order_of != (seed, epoch):
            self.order, self.order_of = np.random.default_rng([seed, epoch]).permutation(self.num_rows), (seed, epoch)
        return self.order[position * self.rows_per_step : (position + 1) * self.rows_per_step]

    def shapes(self, done: int, total: int, seed: int) -> Iterator[tuple[int, list[tuple[int, ...]], int]]:
        """For steps `done + 1` to `total`, without their tokens: the step, the segments' lengths in each of this
        replica's microbatches, and the largest number of supervised positions in one microbatch."""
        supervised_N = np.concatenate([[0], self.rows.supervised_N.numpy().cumsum(dtype=np.int64)])
        supervised_E = np.diff(supervised_N[self.rows.starts_E1.numpy()])
        for step in range(done + 1, total + 1):
            examples, packing = self.packing(self.rows_of(step, seed))
            own = packing.microbatches[self.replica]
            most = max((sum(int(supervised_E[examples[i]]) for i in members) for members in own), default=0)
            lengths = [[self.lengths[examples[i]] for i in members] for members in own]
            yield step, [filled_up(rows, packing.length) for rows in lengths], most

    def eval_steps(self, max_rows: int | None) -> Iterator[StepBatch]:
        """All rows once, or the first `max_rows`, in file order."""
        num_rows = min(self.num_rows, max_rows or self.num_rows)
        for index, start in enumerate(range(0, num_rows, self.rows_per_step), start=1):
            yield self.pack(index, 0, np.arange(start, min(start + self.rows_per_step, num_rows)))

    def pack(self, step: int, epoch: int, chosen: np.ndarray) -> StepBatch:
        """The optimizer step of these rows, as this replica computes it."""
        examples, packing = self.packing(chosen)
        slots = slots_of(packing, self.replica)
        members = [[examples[i] for i in members] for replica in packing.microbatches for members in replica]
        return StepBatch(
            step=step,
            epoch=epoch,
            microbatches=[self.microbatch(members[slot], packing.length) for slot in slots],
            length=packing.length,
            slots=slots,
            lines_by_slot=[sorted({int(self.rows.lines_E[e]) for e in slot}) for slot in members],
            num_rows=len(chosen),
            num_tokens=sum(self.lengths[e] for e in examples),
            num_supervised_tokens=sum(int(self.rows.example(e)[1].sum()) for e in examples),
        )

    def packing(self, chosen: np.ndarray) -> tuple[list[int], Packing]:
        """The examples of these rows, and which microbatch of which replica each goes to."""
        groups = [range(self.first_example[row], self.first_example[row + 1]) for row in chosen]
        examples = [example for group in groups for example in group]
        lengths = [[self.lengths[e] for e in group] for group in groups]
        return examples, pack_step(lengths, self.num_replicas, self.microbatch_tokens)

    def microbatch(self, examples: list[int], length: int) -> Microbatch:
        """Lays examples end to end and pads the stream to `length`."""
        lengths = [self.lengths[e] for e in examples]
        num_tokens = sum(lengths)
        ids_T = torch.zeros(length, dtype=torch.int64)
        predict, labels, sources = [], [], []
        start = 0
        for e in examples:
            ids, supervised = self.rows.example(e)
            ids_T[start : start + len(ids)] = ids
            targets = supervised.nonzero()[:, 0]
            predict.append(start + targets - 1)  # the prompt comes first, so no target is at 0
            labels.append(ids[targets].long())
            sources.append(torch.full_like(targets, int(self.rows.sources_E[e])))
            start += len(ids)
        segments = filled_up(lengths, length)
        return Microbatch(
            ids_T=ids_T,
            positions_T=torch.cat([torch.arange(n) for n in segments]),
            cu_seqlens_R1=torch.tensor([0, *np.cumsum(segments)], dtype=torch.int32),
            lengths=segments,
            predict_N=torch.cat(predict),
            labels_N=torch.cat(labels),
            sources_N=torch.cat(sources),
            lines=tuple(int(self.rows.lines_E[e]) for e in examples),
            num_tokens=num_tokens,
        )


def filled_up(lengths: list[int], length: int) -> tuple[int, ...]:
    """Lengths of the segments of a stream of `length`: these rows, and the padding if there is any."""
    missing = length - sum(lengths)
    return (*lengths, missing) if missing else tuple(lengths)


def slots_of(packing: Packing, replica: int) -> range:
    """The numbers of a replica's microbatches, counted through all replicas."""
    counts = [len(microbatches) for microbatches in packing.microbatches]
    return range(sum(counts[:replica]), sum(counts[: replica + 1]))
