"""What a user is told when memory runs out: who asked for how much, for which rows, what held the rest, what to change.
Runs after the failure, and lets go of the step before it rehearses other settings, which takes what rehearsals take."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterator

import torch

from data.batches import Batches, Microbatch
from loop.config import Config
from loop.errors import OutOfMemory, is_out_of_memory
from loop.failure import SAID, UNITS, WALKED, Failure, find, let_go
from loop.forecast import forecast
from loop.memory import GIB, Memory
from loop.peak import Peak
from loop.ranks import Ranks
from loop.rehearsal import Share
from loop.run import FREE
from loop.trace import write_page

LIMIT_S = 60  # after which no further setting is rehearsed


@dataclass(frozen=True)
class Advice:
    """A setting, and the planned peak under it."""

    setting: str  # as on the command line
    same_result: bool  # whether training computes the same under it
    peak_bytes: int | None = None  # None where it was not rehearsed


@contextmanager
def reporting(
    config: Config, model_dir: Path, ranks: Ranks, batches: Batches, held_out: Batches, plan: Peak, memory: Memory,
    first: int = 0, stop: int | None = None,
) -> Iterator[None]:
    """Turns an error of the allocator into one for the user, and writes all that is known into the run's directory.

    Args:
        batches, held_out: this rank's training rows, and those of the evaluation.
        plan: this rank's forecast.
        first, stop: this rank's sublayers.

    Raises:
        OutOfMemory: raised again as that.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        ranks.watch.done()
        failure = find(error, memory, ranks.rank)
        files = config.run_dir / f"out-of-memory-rank-{ranks.rank}"
        left = write_snapshot(files)
        let_go(error, memory)
        write(files.with_suffix(".json"), failure, plan, [], "", left)  # whatever comes, this is there
        print(f"{ranks.name} is out of memory {failure.moment}. Rehearsing what would help, at most {LIMIT_S} s",
              file=sys.stderr, flush=True)
        left += write_trace(files, memory)
        share = Share(ranks.device.type, ranks.rank, ranks.num_replicas, ranks.num_stages, first, stop)
        limit_s = min(LIMIT_S, config.distributed.timeout_s / 4) if ranks.world_size > 1 else LIMIT_S  # others wait for it
        changes = settings(config, share, failure, longest=max(*batches.lengths, *held_out.lengths))
        advice = advise(config, model_dir, share, batches, changes, ranks, limit_s)
        message = describe(failure, config, ranks, plan, advice)
        written = write(files.with_suffix(".json"), failure, plan, advice, message, left) + left
        message += f"\n  rows and numbers: {', '.join(written)}" if written else ""
        raise OutOfMemory(message) from error


# What would help


def advise(
    config: Config, model_dir: Path, share: Share, batches: Batches, changes: list[tuple[str, Any]], ranks: Ranks,
    limit_s: float,
) -> list[Advice]:
    """What each change makes of the planned peak, the lowest first. Settings that cannot be rehearsed come last."""
    deadline = time.monotonic() + limit_s
    found = []
    for key, value in changes:
        advice = Advice(f"{key}={str(value).lower()}", key in FREE or key.startswith("pipeline."))
        if time.monotonic() < deadline:
            section, name = key.split(".")
            changed = replace(config, **{section: replace(getattr(config, section), **{name: value})})
            try:
                peak = rehearsed(changed, model_dir, share, batches, ranks)
            except Exception as error:  # it is about to be told what happened, which counts more
                print(f"{advice.setting} was not rehearsed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            else:
                advice = replace(advice, peak_bytes=peak.num_bytes)
        found.append(advice)
    return sorted(found, key=lambda a: (a.peak_bytes is None, a.peak_bytes or 0))


def settings(config: Config, share: Share, failure: Failure, longest: int) -> list[tuple[str, Any]]:
    """What may be changed and bears on what failed, what tends to save most first.

    Args:
        longest: tokens of the longest row, which a microbatch must hold.
    """
    train = config.train
    now = train.microbatch_tokens if failure.batch is None else min(failure.batch.length, train.microbatch_tokens)
    half = rounded(max(now // 2, longest))
    loads = failure.phase in ("build", "load")
    computes = not loads and not failure.evaluating  # only a backward pass has activations kept for it
    possible = {
        ("train.recompute", True): computes and not train.recompute,
        ("train.keep_layers", 0): computes and train.recompute and train.keep_layers > 0,
        ("train.microbatch_tokens", half): not loads and half < now,
        ("pipeline.schedule", "1f1b"): computes and share.num_stages > 1 and config.pipeline.schedule == "gpipe",
        ("model.base", "nf4"): config.model.base != "nf4",
        ("train.optimizer", "adamw8bit"): not loads and train.optimizer == "adamw",
    }
    return [change for change, helps in possible.items() if helps]


def rounded(num_tokens: int) -> int:
    """Up to what streams are padded to."""
    return -(-num_tokens // 128) * 128


def rehearsed(config: Config, model_dir: Path, share: Share, batches: Batches, ranks: Ranks) -> Peak:
    train = config.train
    changed = Batches(batches.rows, train.rows_per_step, train.microbatch_tokens, batches.replica, batches.num_replicas)
    return forecast(config, model_dir, share, changed, group=ranks.replica_group)[0]


# What is said and written


def describe(failure: Failure, config: Config, ranks: Ranks, plan: Peak, advice: list[Advice]) -> str:
    """The message, a few lines."""
    asked = f" asked for {size(failure.said['asked'])}" if "asked" in failure.said else ""
    place = f" in {failure.module}" if failure.module else ""
    lines = [f"out of memory on {ranks.name}, {failure.moment}: {failure.line or 'torch'}{asked}{place}"]
    if failure.rows is not None:
        lines.append(shape(failure.rows, config.data.eval if failure.evaluating else config.data.train))
    card = [f"{name} {size(failure.said[name])}" for name in SAID if name in failure.said and name != "asked"]
    lines += ["the allocator says: " + ", ".join(card)] if card else []
    planned = planned_beside(failure.held, plan)
    held = sorted(failure.held.items(), key=lambda item: -item[1])
    lines.append("GiB held, and planned at the peak: " + ", ".join(
        f"{name} {gib(value)} ({gib(planned[name])})" for name, value in held if value or planned[name]))
    return "\n  ".join(lines + what_to_change(advice, plan, config))


def shape(rows: Microbatch, path: str) -> str:
    """Of a microbatch: how many tokens, and whose."""
    lengths, shown = rows.lengths[: len(rows.lines)], sorted(set(rows.lines))
    lines = ", ".join(map(str, shown[:8])) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
    return (f"microbatch: {len(rows.ids_T):,} tokens, {len(lengths):,} rows, the longest of {max(lengths, default=0):,}, "
            f"{len(rows.predict_N):,} supervised positions; lines {lines} of {path}")


def planned_beside(held: dict[str, int], plan: Peak) -> dict[str, int]:
    """The plan in the same categories."""
    planned = {name: plan.held.get(name, 0) for name in held}
    if "the rest" in held:
        planned["the rest"] = plan.num_bytes - sum(plan.held.get(name, 0) for name in WALKED)
    return planned


def what_to_change(advice: list[Advice], plan: Peak, config: Config) -> list[str]:
    helpful = [a for a in advice if a.peak_bytes is None or a.peak_bytes < 0.99 * plan.num_bytes]
    if not helpful:
        return ["no setting is left that saves memory: drop the longest rows (data.max_tokens with data.overlong=drop), lower "
                "lora.rank, or split the model over more devices (pipeline_train.py)"]
    lines = [f"what would help, by the planned peak, which is {gib(plan.num_bytes)} GiB now:"]
    for a in helpful:
        peak = "not rehearsed" if a.peak_bytes is None else f"{gib(a.peak_bytes)} GiB"
        lines.append(f"  {a.setting:<30}  {peak}" + ("" if a.same_result else ", but computes another result: a new run=NAME"))
    return lines


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g}" if num_bytes < GIB else f"{num_bytes / GIB:.2f}"


def size(num_bytes: int) -> str:
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "bytes") if num_bytes >= UNITS[unit] or unit == "bytes")
    return f"{num_bytes / UNITS[unit]:.4g} {unit}"


def write(
    path: Path, failure: Failure, plan: Peak, advice: list[Advice], message: str, files: list[str]
) -> list[str]:
    """All of it, for a machine."""
    rows = failure.rows
    record = {
        "rank": failure.rank, "step": None if failure.batch is None or failure.evaluating else failure.batch.step,
        "phase": failure.phase, "microbatch": failure.microbatch, "evaluating": failure.evaluating,
        "module": failure.module, "line": failure.line, "asked_bytes": failure.said.get("asked"),
        "allocator_bytes": failure.said, "held_bytes": failure.held,
        "planned_bytes": planned_beside(failure.held, plan), "planned_peak_bytes": plan.num_bytes,
        "planned_moment": plan.moment,
        "rows": None if rows is None else {
            "tokens": len(rows.ids_T), "supervised": len(rows.predict_N), "lines": rows.lines,
            "lengths": rows.lengths[: len(rows.lines)]},
        "advice": [vars(a) for a in advice], "message": message, "files": files, "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return attempt(path, lambda: path.write_text(json.dumps(record) + "\n", encoding="utf-8"))


def write_snapshot(files: Path) -> list[str]:
    """The CUDA allocator's history for https://pytorch.org/memory_viz, where it is being recorded."""
    if not torch.cuda.is_initialized() or not torch._C._cuda_isHistoryEnabled():
        return []
    path = files.with_suffix(".pickle")
    return attempt(path, lambda: torch.cuda.memory._dump_snapshot(str(path)))


def write_trace(files: Path, memory: Memory) -> list[str]:
    """The page of the step that failed, where it was being recorded in full (`train.memory_trace`)."""
    ledger, path = memory.ledger, files.with_suffix(".html")
    if ledger is None or not ledger.with_sites:
        return []
    return attempt(path, lambda: write_page(ledger, path, f"{path.parent.name}: the step that ran out of memory"))


def attempt(path: Path, action: Callable[[], object]) -> list[str]:
    """The path, if it could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        action()
    except OSError as error:
        print(f"{path} was not written: {error.strerror}", file=sys.stderr, flush=True)
        return []
    return [str(path)]
