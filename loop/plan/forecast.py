"""Picks the steps of a run that may take the most memory on a rank, or makes one up where there are no rows.
Packs the row lengths of up to 1,000 steps, which takes a few seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from data.batches import Batches, Microbatch, StepBatch
from data.packing import rounded_up
from data.tokenized import TokenizedRows
from loop.config import Config
from loop.distributed.groups import Place
from loop.memory.phases import StepSize
from loop.pipeline.split import RowLengths
from model.build import text_config
from model.delta_rule import padded_positions

MAX_STEPS_LOOKED_AT = 1000


def largest_steps(config: Config, model: Path, place: Place, rows: TokenizedRows, done: int = 0) -> list[StepBatch]:
    """The steps after step `done` that may take the most memory: the largest in each order of size that counts for this model
    and rank.

    Step 1 runs before there are optimizer states. Where step 1 is the largest, the second largest step comes along.
    """
    train = config.train
    batches = Batches(rows, train.rows_per_step, train.microbatch_tokens, place.replica, place.num_replicas)
    total = train.total_steps(batches.steps_per_epoch)
    done = done if done < total else 0  # nothing but an evaluation is left
    total = min(total, done + MAX_STEPS_LOOKED_AT)
    sizes = {step: StepSize.of(lengths, supervised) for step, lengths, supervised in batches.shapes(done, total, train.seed)}
    orders = ["one_microbatch"]
    if place.num_stages > 1:  # on one device no microbatch waits for another
        orders.append("all_microbatches")
    if "linear_attention" in getattr(text_config(model), "layer_types", []):  # attention does not pad
        orders.append("padded")
    chosen: set[int] = set()
    for order in orders:
        largest_first = sorted(sizes, key=lambda step: getattr(sizes[step], order), reverse=True)
        chosen.update(largest_first[: 2 if largest_first[0] == 1 else 1])
    return [batch for step in sorted(chosen) for batch in batches.train_steps(step - 1, step, train.seed)]


def trimmed(batch: StepBatch, place: Place, schedule: str) -> StepBatch:
    """Microbatches that take as much memory as the whole step.

    On one device these are three: the first one, which leaves gradients, the one whose rows are padded most, and the one with
    the most supervised positions. Under 1F1B, where all are alike: twice as many as a stage ever holds. Else all.
    """
    num = 2 * place.num_stages + 1
    if place.num_stages > 1 and schedule == "1f1b" and all(m is batch.microbatches[0] for m in batch.microbatches):
        return replace(batch, microbatches=batch.microbatches[:num], slots=batch.slots[:num])
    if place.num_stages > 1 or len(batch.microbatches) <= 3:
        return batch
    most_padded = max(batch.microbatches, key=lambda m: padded_positions(m.lengths))
    most_supervised = max(batch.microbatches, key=lambda m: len(m.predict_N))
    return replace(batch, microbatches=[batch.microbatches[0], most_padded, most_supervised], slots=range(3))


def full_step(config: Config, num_replicas: int, rows: RowLengths) -> StepBatch:
    """A step whose microbatches are as full as rows of length `rows.longest` can make them; not the run's first step.

    Raises:
        ValueError: a row does not fit into a microbatch.
    """
    limit, row_tokens = config.train.microbatch_tokens, rows.longest
    if row_tokens > limit:
        raise ValueError(
            f"train.microbatch_tokens is {limit:,}, expected at least the {row_tokens:,} tokens of a row (--row-tokens)")
    num_rows = -(-config.train.rows_per_step // num_replicas)
    length = rounded_up(min(limit, num_rows * row_tokens))
    num = max(-(-num_rows * row_tokens // length), 1)
    lengths = [row_tokens] * (length // row_tokens) + [length % row_tokens] * (length % row_tokens > 0)
    ids_T, predict_N = torch.zeros(length, dtype=torch.int64), torch.zeros(int(length * rows.supervised), dtype=torch.int64)
    microbatch = Microbatch(
        ids_T=ids_T, positions_T=ids_T, cu_seqlens_R1=torch.zeros(len(lengths) + 1, dtype=torch.int32), lengths=tuple(lengths),
        predict_N=predict_N, labels_N=predict_N, sources_N=predict_N, lines=(), num_tokens=length)
    return StepBatch(
        step=2, epoch=0, microbatches=[microbatch] * num, length=length, slots=range(num), lines_by_slot=[[]] * num,
        num_rows=config.train.rows_per_step, num_tokens=length * num, num_supervised_tokens=len(predict_N) * num)
