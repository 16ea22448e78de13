"""Tells a user whose memory ran out which rows asked for how much, what held the rest, and which settings would help.
Costs nothing before the error; then frees the step, and plans in another process for at most two minutes."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

from data.batches import Batches
from data.packing import rounded_up
from loop.config import Config
from loop.distributed.groups import Ranks
from loop.errors import OutOfMemory, is_out_of_memory
from loop.identity import FREE
from loop.memory.failure import SAID, UNITS, Failure, free_step, read_failure
from loop.memory.ledger import LASTING
from loop.memory.phases import GIB, Memory
from loop.memory.trace import write_page, write_snapshot
from loop.planned import Plan, Record, answers, start_process

LIMIT_S = 120  # for planning all settings
NOTHING_HELPS = ("no setting is left that saves memory: drop the longest rows (data.max_tokens with data.overlong=drop), lower "
                 "lora.rank, or split the model over more devices (pipeline_train.py)")


@contextmanager
def reporting(
    config: Config, batches: Batches, held_out: Batches, ranks: Ranks, memory: Memory, plan: Plan
) -> Iterator[None]:
    """Turns an allocator's error into a message for the user, and writes a report and a trace into the run's directory.

    Args:
        batches, held_out: this rank's training rows, and those of the evaluation.

    Raises:
        OutOfMemory: in place of the allocator's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        ranks.watch.done()
        failure = read_failure(error, memory, ranks.rank)
        files = config.run_dir / f"out-of-memory-rank-{ranks.rank}"
        written = if_possible(files.with_suffix(".pickle"), write_snapshot)
        free_step(error, memory)
        report = report_of(failure, plan.of_rank(ranks.rank))
        write_report(files, report, written)  # a first version, in case the process is killed while it plans
        ledger = memory.ledger
        if ledger is not None and ledger.with_sites:  # the step of `train.memory_trace`
            title = f"{config.run_dir.name}: out of memory"
            written += if_possible(files.with_suffix(".html"), lambda path: write_page(ledger, path, title))
        limit_s = min(LIMIT_S, config.distributed.timeout_s / 4) if ranks.world_size > 1 else LIMIT_S  # other ranks wait
        print(f"{ranks.name} is out of memory {failure.moment}. Planning what would help, at most {limit_s:.0f} s",
              file=sys.stderr, flush=True)
        changes = possible_changes(config, ranks, failure, longest=max(*batches.lengths, *held_out.lengths))
        planned, advice = advise(config, ranks, changes, limit_s)
        report = report_of(failure, planned) | {"advice": advice}
        message = message_of(report, failure, config, ranks, advice)
        written = write_report(files, report | {"message": message}, written) + written
        message += f"\n  rows and numbers: {', '.join(written)}" if written else ""
        raise OutOfMemory(message) from error


def advise(config: Config, ranks: Ranks, changes: list[str], limit_s: float) -> tuple[Record | None, list[Record]]:
    """This rank's plan, and for each change the planned peak, the lowest first; None, if there was no time to plan, comes
    last. `same_result` says whether training computes the same under the change."""
    planned: Record | None = None
    peaks_gib: dict[str, float] = {}
    tries = [argument for change in changes for argument in ("--try", change)]
    try:
        for answer in answers(start_process(config, ranks, "--rank", str(ranks.rank), *tries), limit_s):
            if "ranks" in answer:
                planned = answer["ranks"][0]
            elif "peak_gib" in answer:
                peaks_gib[answer["setting"]] = answer["peak_gib"]
    except OSError as error:  # the user must still be told what ran out of memory
        print(f"nothing was planned: {error.strerror}", file=sys.stderr, flush=True)
    same = ("pipeline.", *(f"{key}=" for key in FREE))
    found: list[Record] = [{"setting": change, "same_result": change.startswith(same), "peak_gib": peaks_gib.get(change)}
                           for change in changes]
    return planned, sorted(found, key=lambda a: (a["peak_gib"] is None, a["peak_gib"] or 0.0))


def possible_changes(config: Config, ranks: Ranks, failure: Failure, longest: int) -> list[str]:
    """The settings that may be changed and bear on what failed; those that tend to save most come first.

    Args:
        longest: tokens of the longest row, which a microbatch must hold.
    """
    train = config.train
    now = train.microbatch_tokens if failure.batch is None else min(failure.batch.length, train.microbatch_tokens)
    half = rounded_up(max(now // 2, longest))
    loads = failure.phase in ("build", "load")
    computes = not loads and not failure.evaluating  # an evaluation keeps no activations
    possible = {
        "train.recompute=true": computes and not train.recompute,
        "train.keep_layers=0": computes and train.recompute and train.keep_layers > 0,
        f"train.microbatch_tokens={half}": not loads and half < now,
        "pipeline.schedule=1f1b": computes and ranks.num_stages > 1 and config.pipeline.schedule == "gpipe",
        "model.base=nf4": config.model.base != "nf4",
        "train.optimizer=adamw8bit": not loads and train.optimizer == "adamw",
    }
    return [change for change, helps in possible.items() if helps]


def report_of(failure: Failure, planned: Record | None) -> dict[str, Any]:
    """All that is known, as out-of-memory-rank-R.json holds it."""
    rows, plan_gib = failure.rows, {}
    if planned is not None:
        plan_gib = {name: planned["held_gib"].get(name, 0.0) for name in failure.held}
        if "the rest" in failure.held:
            plan_gib["the rest"] = planned["peak_gib"] - sum(planned["held_gib"].get(name, 0.0) for name in LASTING)
    return {
        "rank": failure.rank, "step": None if failure.batch is None or failure.evaluating else failure.batch.step,
        "phase": failure.phase, "microbatch": failure.microbatch, "evaluating": failure.evaluating,
        "module": failure.module, "line": failure.line, "asked_bytes": failure.said.get("asked"),
        "allocator_bytes": failure.said, "held_bytes": failure.held, "planned_gib": plan_gib,
        "planned_peak_gib": planned and planned["peak_gib"], "planned_moment": planned and planned["moment"],
        "rows": None if rows is None else {
            "tokens": len(rows.ids_T), "supervised": len(rows.predict_N), "lines": rows.lines,
            "lengths": rows.lengths[: len(rows.lines)]},
        "advice": [], "message": "",
    }


def message_of(report: dict[str, Any], failure: Failure, config: Config, ranks: Ranks, advice: list[Record]) -> str:
    """The message, a few lines."""
    said = {name: in_units(failure.said[name]) for name in SAID if name in failure.said}
    asked = f" asked for {said.pop('asked')}" if "asked" in said else ""
    module = f" in {failure.module}" if failure.module else ""
    lines = [f"out of memory on {ranks.name}, {failure.moment}: {failure.line or 'torch'}{asked}{module}"]
    rows, plan_gib, peak_gib = report["rows"], report["planned_gib"], report["planned_peak_gib"]
    if rows is not None:
        numbers = sorted(set(rows["lines"]))
        more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
        lines.append(
            f"microbatch: {rows['tokens']:,} tokens, {len(rows['lengths']):,} rows, the longest of "
            f"{max(rows['lengths'], default=0):,}, {rows['supervised']:,} supervised positions; lines "
            f"{', '.join(map(str, numbers[:8]))}{more} of {config.data.file('eval' if failure.evaluating else 'train')}")
    if said:
        lines.append("the allocator says: " + ", ".join(f"{name} {value}" for name, value in said.items()))
    held = [f"{name} {short_gib(value / GIB)}" + (f" ({short_gib(plan_gib[name])})" if plan_gib else "")
            for name, value in sorted(failure.held.items(), key=lambda item: -item[1]) if value or plan_gib.get(name)]
    lines.append(f"GiB held, {'and planned at the peak' if plan_gib else 'without a plan'}: {', '.join(held)}")
    helpful = [a for a in advice if a["peak_gib"] is None or a["peak_gib"] < 0.99 * (peak_gib or 0.0)]
    now = f", by the planned peak, which is {short_gib(peak_gib)} GiB now" if peak_gib else ""
    lines.append(f"what would help{now}:" if helpful else NOTHING_HELPS)
    for a in helpful:
        peak = "not planned" if a["peak_gib"] is None else f"{short_gib(a['peak_gib'])} GiB"
        another = "" if a["same_result"] else ", but computes another result: a new run=NAME"
        lines.append(f"  {a['setting']:<30}  {peak}{another}")
    return "\n  ".join(lines)


def short_gib(number: float) -> str:
    return f"{number:.3g}" if number < 1 else f"{number:.2f}"


def in_units(num_bytes: int) -> str:
    unit = next(unit for unit in UNITS if num_bytes >= UNITS[unit] or unit == "bytes")
    return f"{num_bytes / UNITS[unit]:.4g} {unit}"


def write_report(files: Path, report: dict[str, Any], written: list[str]) -> list[str]:
    report = report | {"files": written, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    return if_possible(files.with_suffix(".json"), lambda path: path.write_text(json.dumps(report) + "\n", encoding="utf-8"))


def if_possible(path: Path, write_to: Callable[[Path], object]) -> list[str]:
    """Has `write_to` write a file; returns the path if the file was written, else nothing. A full disk is only reported."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return [str(path)] if write_to(path) is not False else []
    except OSError as error:
        print(f"{path} was not written: {error.strerror}", file=sys.stderr, flush=True)
        return []
