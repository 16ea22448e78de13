"""How much memory a run will take on each rank: picks the steps that may take the most, and rehearses them.
Takes seconds a rank, and what a rehearsal takes."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from data.batches import Batches, Microbatch, StepBatch
from loop.config import Config
from loop.memory import GIB, sizes
from loop.peak import NOTHING, Peak
from loop.ranks import Ranks
from loop.rehearsal import Share, rehearse
from model.build import text_config
from model.delta_rule import padded_positions

MAX_STEPS_LOOKED_AT = 1000


def forecast(
    config: Config, model: Path, share: Share, batches: Batches, done: int = 0, worst_routing: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Peak, Peak]:
    """The highest peak of steps `done + 1` to the end of a run, and the same if all tokens go to the same experts.

    Args:
        model: as for `rehearse`, as is `group`.
        batches: this rank's rows.
    """
    steps = largest_steps(config, model, share, batches, done)
    largest = [batch for step in steps for batch in batches.train_steps(step - 1, step, config.train.seed)]
    return rehearse(config, model, share, [trimmed(batch, share) for batch in largest], worst_routing=worst_routing,
                    first_step=steps[0] == 1, group=group)


def foresee(
    config: Config, model_dir: Path, ranks: Ranks, batches: Batches, first: int = 0, stop: int | None = None
) -> tuple[Peak, list[float]]:
    """The forecast of a run that begins: this rank's, and the GiB of all ranks in order.

    A forecast that fails does not stop the run: it leaves 0 GiB, and says why. Wrong settings do.
    """
    share = Share(ranks.device.type, ranks.rank, ranks.num_replicas, ranks.num_stages, first, stop)
    try:
        peak, _ = forecast(config, model_dir, share, batches, group=ranks.replica_group)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError, AttributeError, LookupError) as error:
        peak = NOTHING
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        print(f"{ranks.name}: memory could not be planned ({reason}). Training goes on without a plan; "
              "TRACEBACK=1 shows where it failed", file=sys.stderr, flush=True)
    return peak, gathered(peak.num_bytes, ranks)


def gathered(num_bytes: int, ranks: Ranks) -> list[float]:
    """A number of every rank, as GiB, on all of them."""
    bytes_R = torch.zeros(ranks.world_size, dtype=torch.float64, device=ranks.device)
    bytes_R[ranks.rank] = num_bytes
    return (ranks.all_reduce(bytes_R) / GIB).tolist()


def largest_steps(config: Config, model: Path, share: Share, batches: Batches, done: int) -> list[int]:
    """The numbers of the steps that may take the most; step 1, which meets no optimizer states, never alone, unless it
    is the only one."""
    total = min(config.train.total_steps(batches.steps_per_epoch), done + MAX_STEPS_LOOKED_AT)
    shapes = list(batches.shapes(done, total, config.train.seed))
    # on one device no microbatch waits for another, and attention does not pad
    kinds = [0] + [1] * (share.num_stages > 1) + [2] * ("linear_attention" in getattr(text_config(model), "layer_types", []))
    chosen = set()
    for kind in kinds:
        by_size = sorted(shapes, key=lambda shape: sizes(*shape[1:])[kind], reverse=True)
        chosen.add(by_size[0][0])
        if by_size[0][0] == 1:
            chosen.update(step for step, *_ in by_size[1:2])
    return sorted(chosen)


def trimmed(batch: StepBatch, share: Share) -> StepBatch:
    """On one device: of many microbatches three, the last two those that pad each other most and supervise most."""
    if share.num_stages > 1 or len(batch.microbatches) <= 3:
        return batch
    most_padded = max(batch.microbatches, key=lambda m: padded_positions(m.lengths))
    most_supervised = max(batch.microbatches, key=lambda m: len(m.predict_N))
    return replace(batch, microbatches=[batch.microbatches[0], most_padded, most_supervised], slots=range(3))


def full_step(config: Config, num_replicas: int, row_tokens: int, supervised: float) -> StepBatch:
    """A step whose microbatches are as full as rows of one length can make them, where there are no rows to look at.

    Args:
        row_tokens: length of a row, if data.max_tokens allows it.
        supervised: share of its tokens.

    Raises:
        ValueError: a row does not fit into a microbatch.
    """
    limit, row_tokens = config.train.microbatch_tokens, min(row_tokens, config.data.max_tokens)
    if row_tokens > limit:
        raise ValueError(
            f"train.microbatch_tokens is {limit:,}, expected at least the {row_tokens:,} tokens of a row (--row-tokens)")
    num_rows = -(-config.train.rows_per_step // num_replicas)
    length = -(-min(limit, num_rows * row_tokens) // 128) * 128
    num = max(-(-num_rows * row_tokens // length), 1)
    lengths = [row_tokens] * (length // row_tokens) + [length % row_tokens] * (length % row_tokens > 0)
    ids_T, predict_N = torch.zeros(length, dtype=torch.int64), torch.zeros(int(length * supervised), dtype=torch.int64)
    microbatch = Microbatch(
        ids_T=ids_T, positions_T=ids_T, cu_seqlens_R1=torch.zeros(len(lengths) + 1, dtype=torch.int32), lengths=tuple(lengths),
        predict_N=predict_N, labels_N=predict_N, sources_N=predict_N, lines=(), num_tokens=length)
    return StepBatch(
        step=1, epoch=0, microbatches=[microbatch] * num, length=length, slots=range(num), lines_by_slot=[[]] * num,
        num_rows=config.train.rows_per_step, num_tokens=length * num, num_supervised_tokens=len(predict_N) * num)


def sentence(peak: Peak, all_gib: list[float]) -> str:
    """What a run says of its plan before it loads anything."""
    if not all(all_gib):
        return "no plan of memory"
    held = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in peak.held.items() if num_bytes >= GIB / 200)
    return f"planned peak of tensors: {per_rank(all_gib)} GiB; on rank 0 in the {peak.moment}: {held}"


def comparison(planned_gib: list[float], measured_gib: list[float]) -> str:
    """The same when it has ended, against what it took."""
    if not all(planned_gib):
        return f"peak of tensors: not planned, measured {per_rank(measured_gib)} GiB"
    if not all(measured_gib):
        return f"planned peak of tensors: {per_rank(planned_gib)} GiB; no step was measured"
    off = [100 * (measured / planned - 1) for planned, measured in zip(planned_gib, measured_gib)]
    return (f"peak of tensors: planned {per_rank(planned_gib)} GiB, measured {per_rank(measured_gib)} GiB "
            f"({', '.join(f'{percent:+.1f} %' for percent in off)})")


def per_rank(all_gib: list[float]) -> str:
    return ", ".join(f"{gib:.3g}" if gib < 1 else f"{gib:.2f}" for gib in all_gib)
