"""How much memory and time a run will take, before it takes them: on each rank, for what, at which moment and on which line.
Needs neither the weights nor a GPU; takes seconds a rank.

python -m loop.plan --config configs/4b.yaml [key=value ...]
python -m loop.plan --config configs/35b.yaml --split 40 pipeline.schedule=1f1b --card rtx5090
python -m loop.plan --config configs/35b.yaml --split none --card 24       # one device, by its memory in GiB
python -m loop.plan --config configs/35b.yaml --fit --card rtx5090         # what fits and takes the least time
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf

from loop.config import Config, load_config, overridden
from loop.config.command_line import add_config_arguments
from loop.distributed.launch import die_with_parent
from loop.distributed.preflight import check_split
from loop.errors import run_command
from loop.memory.ledger import CATEGORIES
from loop.memory.peak import by_kind
from loop.memory.phases import GIB
from loop.pipeline.split import RowLengths, balance, reason, sublayer_costs
from loop.plan.advice import advice, start_command
from loop.plan.search import Search
from loop.plan.seconds import Forecast, Shape
from loop.plan.workload import RESERVE_GIB, RankPlan, Workload, read_rows
from loop.rates import CARDS, Rates, is_for_gpus, measure
from loop.run import find_model
from model.build import text_config
from model.devices import OFF, ON

CARD_GIB, DEFAULT = 32.0, "rtx5090"
NUM_LINES = 8
MUCH_LESS = 0.9  # of what one schedule holds: if another holds no more, the plan says so


def main() -> None:
    args, out = parse(), sys.stdout
    if args.beside is not None:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != args.beside:  # the run is gone already
            sys.exit(1)
        torch.set_num_threads(1)  # leaves the cores to the run
    OFF.update(filter(None, args.without.split(",")))
    with redirect_stdout(sys.stderr):  # for what the rehearsed training code prints
        config = load_config(args.config, args.overrides)
        if config.train.compile != "auto":
            (ON if config.train.compile else OFF).add("compiled")
        workload = read_workload(args, config)
        rates = rates_for(args, workload)
        workload = replace(workload, generation=rates.generation if rates else None)
        card_gib = float(args.card) if is_number(args.card) else rates and rates.memory_gib or CARD_GIB
        if args.fit:
            print(fitted(workload, args, card_gib, rates or CARDS[DEFAULT]), file=out, flush=True)
        else:
            print(planned(workload, args, card_gib, rates), file=out, flush=True)
        for setting in args.tries:
            print(tried(args, config, setting, workload), file=out, flush=True)


def rates_for(args: argparse.Namespace, workload: Workload) -> Rates | None:
    """Of the card that is named; else as `loop.check` measured them; of this CPU, measured now; None where none of these is."""
    path, on_cpu = workload.config.run_dir / "check.json", workload.device == "cpu"
    measured = json.loads(path.read_text(encoding="utf-8")).get("rates") if path.is_file() else None
    checked = Rates(**measured) if measured and measured["waits"] == on_cpu else None
    if found := checked if args.beside and checked else named(args.card) or checked:
        return found
    if args.rank is not None or not on_cpu or is_for_gpus(text_config(workload.model)):
        return None
    threads = args.threads or max(torch.get_num_threads() // workload.num_ranks, 1)
    return measure(workload.config, workload.model, torch.device("cpu"), Shape.of(workload).lengths, threads)


def named(card: str | None) -> Rates | None:
    """The card of this name, such as "rtx5090" or "NVIDIA GeForce RTX 5090"."""
    letters = "".join(filter(str.isalnum, (card or "").lower()))
    return next((rates for name, rates in CARDS.items() if name in letters), None)


def is_number(text: str | None) -> bool:
    return bool(re.fullmatch(r"[\d.]+(e\d+)?|inf|nan|-.*", text or ""))


def fitted(workload: Workload, args: argparse.Namespace, card_gib: float, rates: Rates) -> str:
    """The settings that fit a card and take the least time."""
    search = Search(workload, card_gib, rates)
    try:
        found, current = search.fastest(), search.fit(workload)
        bought = search.bought(found[0])
    finally:
        search.progress.end()
    if args.json:
        records = [{"settings": " ".join(fit.overrides), "peak_gib": fit.peak_gib, **fit.time.record()}
                   for fit in [*found, current]]
        return json.dumps({"fit": records[:-1], "current": records[-1]})
    return advice(search, found, current, bought, partial(start_command, args.config, args.overrides, workload))


def planned(workload: Workload, args: argparse.Namespace, card_gib: float, rates: Rates | None) -> str:
    """The plan of all ranks, or of the one that is asked for."""
    wanted = range(workload.num_ranks) if args.rank is None else [args.rank]
    if wanted[0] not in range(workload.num_ranks):
        raise ValueError(f"--rank {args.rank}: expected one of {workload.num_ranks} ranks, counted from 0")
    by_stage = {rank % workload.num_stages: rank for rank in reversed(wanted)}  # replicas are alike
    plans = {stage: workload.rank_plan(rank, args.beside is None) for stage, rank in sorted(by_stage.items())}
    time = None
    if args.rank is None and (rates or workload.device == "cuda" and not args.beside):
        keep = workload.config.train.keep_layers
        time = Forecast(workload, rates or replace(CARDS[DEFAULT], generation=None)).step(workload.split, keep)
    if args.json:
        return json.dumps({"ranks": [record(rank, rank % workload.num_stages, plans, card_gib) for rank in wanted],
                           "time": time and time.record()})
    took = [f"{time}\n(by the rates of {rates.name if rates else DEFAULT})"] if time else []
    return report(workload, plans, card_gib, "\n".join([*took, *less_held(workload, plans)]))


def less_held(workload: Workload, plans: dict[int, RankPlan]) -> list[str]:
    """What the stages would hold under 1F1B, in a line, where that is much less than they hold under GPipe."""
    is_gpipe = workload.split and workload.config.pipeline.schedule == "gpipe"
    if not is_gpipe or Shape.of(workload).num_microbatches <= workload.num_stages:
        return []
    other = workload.with_pipeline(schedule="1f1b")
    peaks = [(plans[stage].peak.num_bytes, other.rank_plan(stage, worst_routing=False).peak.num_bytes) for stage in plans]
    if max(less for _, less in peaks) > MUCH_LESS * max(held for held, _ in peaks):
        return []
    each = {f"{less / GIB:.1f} GiB" for _, less in peaks}
    on = f"{each.pop()} on each" if len(each) == 1 else ", ".join(f"{less / GIB:.1f}" for _, less in peaks) + " GiB by stage"
    return [f"with pipeline.schedule=1f1b: {on}, and as fast"]


def tried(args: argparse.Namespace, config: Config, setting: str, first: Workload) -> str:
    """The peak under another setting than the first workload's, on the fullest rank."""
    try:
        workload = read_workload(args, overridden(config, [setting]))
        workload = replace(workload, generation=first.generation, built=first.built)
        ranks = range(workload.num_stages) if args.rank is None else [args.rank]
        peak_gib = max(workload.rank_plan(rank, worst_routing=False).peak.num_bytes for rank in ranks) / GIB
    except Exception as error:  # a setting that cannot be planned is no reason not to try the next one
        failed = f"{type(error).__name__}: {error}"
        return json.dumps({"setting": setting, "error": failed}) if args.json else f"{setting}: not planned, {failed}"
    return json.dumps({"setting": setting, "peak_gib": peak_gib}) if args.json else f"{setting:<30}  {peak_gib:.2f} GiB at most"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loop.plan", description="How much memory each rank of a run will take.")
    parser.add_argument("--split", metavar="CUTS", help="as for pipeline_train.py: 40 | 30,60 | auto; none: not split")
    parser.add_argument("--ranks", type=int, help="processes; by default one a stage, else one a visible GPU, or 2 without any")
    parser.add_argument("--card", metavar="NAME|GIB", help=f"{' | '.join(CARDS)}, or the memory of a GPU, by default "
                        f"{CARD_GIB:g}; a card of which the memory alone is given is as fast as an {DEFAULT}")
    parser.add_argument("--threads", type=int, help="of each rank on a CPU, by default all shared evenly")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, but cpu where the weights are and no GPU is")
    parser.add_argument("--row-tokens", type=int, default=1730, help="length of a row where the data are not at hand")
    parser.add_argument("--supervised", type=float, default=0.35, help="share of its tokens that is supervised, likewise")
    parser.add_argument("--fit", action="store_true", help="search the settings that use a card best")
    parser.add_argument("--try", action="append", default=[], metavar="KEY=VALUE", dest="tries",
                        help="also plan with this setting changed; may be given several times")
    parser.add_argument("--rank", type=int, help="plan this rank alone")
    parser.add_argument("--done", type=int, default=0, metavar="STEPS", help="plan what comes after these steps")
    parser.add_argument("--without", default="", metavar="PATHS", help="fast paths that the run does not take: delta_rule,nf4")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, a line each plan")
    parser.add_argument("--beside", type=int, metavar="PID",
                        help="take one thread, leave out the worst case of routing, and end with this process")
    add_config_arguments(parser)
    args = parser.parse_intermixed_args()
    if args.card and not (args.beside or named(args.card) or is_number(args.card)):
        parser.error(f"--card {args.card}: expected {', '.join(CARDS)}, or a number of GiB")
    for name in ("row_tokens", "ranks", "card", "supervised", "threads"):
        value = getattr(args, name)
        if value is not None and not (name == "card" and not is_number(value)) and not 0 < float(value) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    if args.supervised > 1:
        parser.error(f"--supervised {args.supervised}: expected a share, at most 1")
    if args.split not in (None, "none"):
        args.overrides.append(f"pipeline.split={args.split}")
    return args


def read_workload(args: argparse.Namespace, config: Config) -> Workload:
    """What to plan, by the command line and the configuration; a `ValueError` where these do not fit together."""
    model, is_here = find_model(config.model.path)
    device = args.device or ("cuda" if args.card or torch.cuda.is_available() or not is_here else "cpu")
    rows = read_rows(config, model)
    row_tokens = min(args.row_tokens, config.data.max_tokens)
    lengths = RowLengths.of(rows) if rows else RowLengths(row_tokens, row_tokens, row_tokens / 2, args.supervised)
    if args.split == "none" or (args.split is None and "pipeline" not in OmegaConf.load(args.config)):
        visible = 1 if args.split else torch.cuda.device_count() or 2
        return Workload(config, model, device, args.ranks or visible, 1, rows, lengths, done=args.done)
    num_stages = config.pipeline.num_stages(otherwise=args.ranks or 2)
    workload = Workload(config, model, device, args.ranks or num_stages, num_stages, rows, lengths, done=args.done)
    costs = sublayer_costs(model, config, lengths)
    split = balance(costs, num_stages) if config.pipeline.split == "auto" else config.pipeline.split
    check_split(split, len(costs))
    why = reason(costs, split) if config.pipeline.split == "auto" and split else ""
    return replace(workload, split=tuple(split), why_split=why)


def record(rank: int, stage: int, plans: dict[int, RankPlan], card_gib: float) -> dict[str, Any]:
    """One rank for --json; everything in GiB."""
    peak, worst = plans[stage]
    return {
        "rank": rank, "stage": stage, "peak_gib": peak.num_bytes / GIB,
        "held_gib": {name: num_bytes / GIB for name, num_bytes in peak.held.items()},
        "kinds_gib": {kind["name"]: kind["num_bytes"] / GIB for kind in by_kind(peak.largest)},
        "at_most_gib": {name: num_bytes / GIB for name, num_bytes in peak.most.items()},
        "moment": peak.moment, "module": peak.module, "line": peak.line, "worst_routing_gib": worst.num_bytes / GIB,
        "card_gib": card_gib, "fits": peak.num_bytes / GIB <= card_gib - RESERVE_GIB,
    }


def report(workload: Workload, by_stage: dict[int, RankPlan], card_gib: float, time: str) -> str:
    """What is planned; a table with a column for each rank; where each rank is fullest, and whether it fits; the time."""
    config, lengths = workload.config, workload.lengths
    names = ("model.path", "model.base", "lora.rank", "train.recompute", "train.keep_layers", "train.optimizer",
             "train.rows_per_step", "train.microbatch_tokens", *(["pipeline.schedule"] if workload.split else []))
    settings = " ".join(f"{name}={OmegaConf.select(OmegaConf.structured(config), name)}" for name in names)
    stages = f", {workload.num_stages} stages cut at {', '.join(map(str, workload.split))}" if workload.split else ""
    rows = f"the largest step of the rows in {config.data.train}" if workload.rows else (
        f"no rows at hand: full microbatches of rows of {lengths.longest:,} tokens, {lengths.supervised:.0%} supervised")
    titles = ["rank " + ", ".join(map(str, range(stage, workload.num_ranks, workload.num_stages))) for stage in by_stage]
    plans, blank = list(by_stage.values()), " " * 7
    cells = {"GiB": titles, **{name: [f"{peak.held[name] / GIB:.2f} ({peak.most[name] / GIB:.2f})" for peak, _ in plans]
                               for name in CATEGORIES}}
    cells["peak"] = [f"{peak.num_bytes / GIB:.2f}{blank}" for peak, _ in plans]
    if any(worst.num_bytes != peak.num_bytes for peak, worst in plans):
        cells["worst routing"] = [f"{worst.num_bytes / GIB:.2f}{blank}" for _, worst in plans]
    width = max(len(cell) for row in cells.values() for cell in row) + 2
    lines = [settings, f"{workload.num_ranks} rank(s) on {workload.device}{stages}; {rows}",
             *[workload.why_split] * bool(workload.why_split), "",
             "held at the peak (in brackets: the most of that kind at any moment of the step)"]
    lines += [f"{name:<14}" + "".join(f"{cell:>{width}}" for cell in row) for name, row in cells.items()]
    for title, plan in zip(titles, plans):
        lines += ["", f"{title}: {details(plan, workload.device, card_gib)}"]
    return "\n".join([*lines, *["", time] * bool(time)])


def details(plan: RankPlan, device: str, card_gib: float) -> str:
    """The moment of the peak, whether it fits a card, and the lines of the source that hold most then."""
    peak = plan.peak
    lines = [f"most in the {peak.moment}, {peak.module or 'no module'}, {peak.line}"]
    if device == "cuda":
        spare, spare_at_worst = (card_gib - RESERVE_GIB - p.num_bytes / GIB for p in (peak, plan.worst))
        verdict = f"fits, {spare:.1f} GiB to spare" if spare >= 0 else (
            f"DOES NOT FIT, {-spare:.1f} GiB too much; --fit looks for what does")
        if spare >= 0 > spare_at_worst:
            verdict += "; but not if all tokens go to the same experts"
        lines.append(f"  a card of {card_gib:g} GiB, of which {RESERVE_GIB:g} is left to CUDA: {verdict}")
    else:
        lines.append("  tensors alone: Python, torch and what the system's allocator keeps come on top, 0.5 GiB and more")
    lines += [f"  {line.num_bytes / GIB:7.3f} GiB in {line.count:>4}  {line.category:<13} {line.module or '-'}  "
              + line.line.partition(" < ")[0] for line in peak.largest[:NUM_LINES]]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
