"""What `--fit` prints: the current settings and the fastest ones as a table, and one recommendation as a command to copy.
Costs nothing."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Callable, Sequence

from loop.memory.phases import GIB
from loop.plan.search import Fit, Search, names_of
from loop.plan.workload import RESERVE_GIB, Workload

LEAST_GAIN = 0.01  # of a step's time: settings that are not faster by so much are not recommended
LAUNCHED = {"configs/4b.yaml": "train.py", "configs/35b.yaml": "pipeline_train.py"}  # by launch.sh, under the file's name


def advice(search: Search, found: list[Fit], current: Fit, bought: list[tuple[str, Fit]],
           command: Callable[[list[str]], str]) -> str:
    """A table with the current settings first, then one recommendation, as a command to copy."""
    best, num_ranks = found[0], search.workload.num_ranks
    why_split = [search.workload.why_split] * bool(search.workload.why_split)
    lines = [*why_split, f"What fits {num_ranks} x {search.rates.name} of {search.card_gib:g} GiB, {RESERVE_GIB:g} of which is "
             "left to CUDA, and takes the least time; all planned.", *table(search, [("current settings", current)] + [
                 (f"{number}. fastest", fit) for number, fit in enumerate(found, 1)])]
    gained = current.time.seconds / best.time.seconds
    if current.peak_gib <= search.limit / GIB and gained < 1 + LEAST_GAIN:
        lines += ["", "The current settings fit and are as fast as any:"]
        lines += [f"  {command([])}"]
    else:
        than = f"{gained:.2f} times as fast as" if current.peak_gib <= search.limit / GIB else "since these fit, unlike"
        lines += ["", f"Recommended, {than} the current settings:", f"  {command(best.overrides)}",
                  f"Its time goes to {best.time.shares()}."]
    if bought:
        lines += ["", f"The fastest leaves {search.card_gib - best.peak_gib:.0f} GiB of a card unused. What these could buy, "
                  "each alone:", *table(search, bought)]
        lines += [f"  {what}: {' '.join(fit.overrides)}" for what, fit in bought]
    progress, num_built = search.progress, len(search.workload.built)
    lines += ["", f"(planned in {progress.seconds:.0f} s: {progress.num_rehearsals} rehearsals of a step, for which "
              f"{num_built} stage(s) were built; one serves all settings that leave weights and adapters as they are)"]
    return "\n".join(lines)


def table(search: Search, rows: Sequence[tuple[str, Fit]]) -> list[str]:
    """A title over each column, in two lines."""
    split = bool(search.workload.split)
    titles = [("", ""), ("tokens of a", "microbatch"), ("layers not", "recomputed"),
              *[("cut at", "sublayer"), ("", "schedule")] * split,
              ("GiB, the", "fullest card"), ("seconds", "a step"), ("tokens", "a second")]
    each = " a stage" * split
    most = {fit.split: search.num_kept_at_most(fit.split) for _, fit in rows}
    cells = [[what, f"{fit.tokens:,}", f"{min(fit.kept, most[fit.split])} of {most[fit.split]}{each}",
              *[",".join(map(str, fit.split)), fit.schedule] * split, f"{fit.peak_gib:.1f}" + " (too much)" * (
                  fit.peak_gib > search.limit / GIB), f"{fit.time.seconds:.3g}", f"{fit.time.tokens_per_s:,.0f}"]
             for what, fit in rows]
    lines = [[title[0] for title in titles], [title[1] for title in titles], *cells]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
            for line in lines]


def start_command(config_file: str, given: list[str], workload: Workload, overrides: list[str]) -> str:
    """Starts a run with these settings, and with those that the plan was given.

    Args:
        given, overrides: key=value; of two with one key the second counts.
    """
    settings = dict(zip(names_of([*given, *overrides]), [*given, *overrides]))
    script = "pipeline_train.py" if workload.split else "train.py"
    if LAUNCHED.get(config_file.removeprefix("./")) == script:
        start = f"bash launch.sh {Path(config_file).stem}"
    else:
        ranks = f" --nproc-per-node {workload.num_ranks}" * (workload.num_replicas > 1)
        start = f"torchrun{ranks} {script} --config {config_file}"
    return " ".join([start, *map(shlex.quote, settings.values())])
