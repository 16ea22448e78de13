"""How much memory a run will take, before it takes it: on each rank, for what, at which moment and on which line.
Needs neither the weights nor a GPU; takes seconds a rank.

python -m loop.plan --config configs/4b.yaml [key=value ...]
python -m loop.plan --config configs/35b.yaml --split 40 pipeline.schedule=1f1b --card 32
python -m loop.plan --config configs/35b.yaml --split none --card 24       # one device
python -m loop.plan --config configs/35b.yaml --fit --card 32              # what fits best
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from data.batches import Batches
from data.tokenized import TokenizedRows, load_rows
from loop.config import Config, add_config_arguments, load_config
from loop.errors import ROOT, run_command
from loop.forecast import forecast, full_step, trimmed
from loop.ledger import CATEGORIES
from loop.memory import GIB
from loop.peak import Peak
from loop.rehearsal import Share, rehearse
from loop.run import load_tokenizer
from loop.split import Load, balance, check_split, sublayer_costs
from model.build import skeleton
from model.fetch import from_cache

SHAPES = ROOT / "configs/models"  # config.json of the models that the configurations name
CARD_GIB = 32.0
RESERVE_GIB = 1.0  # of a card: CUDA's own context, NCCL's buffers, and what lies free between tensors
NUM_LINES = 8


@dataclass(frozen=True)
class Planned:
    """One rank of a plan."""

    share: Share
    peak: Peak
    worst: Peak  # if all tokens go to the same experts


@dataclass(frozen=True)
class Workload:
    """What a plan is made for."""

    config: Config
    model: Path  # config.json, or its directory
    device: str
    num_ranks: int
    split: tuple[int, ...]  # none for a model that is not split
    rows: TokenizedRows | None  # where they are at hand
    row_tokens: int  # of a row, where they are not
    supervised: float  # share of the tokens, likewise

    @property
    def num_stages(self) -> int:
        return len(self.split) + 1

    @property
    def num_replicas(self) -> int:
        return self.num_ranks // self.num_stages

    def share(self, rank: int) -> Share:
        bounds = [0, *self.split, None]
        stage = rank % self.num_stages
        return Share(self.device, rank, self.num_replicas, self.num_stages, bounds[stage] or 0, bounds[stage + 1])

    def num_microbatches(self) -> int:
        """Of a replica, on average."""
        if self.rows is None:
            return len(full_step(self.config, self.num_replicas, self.row_tokens, self.supervised).microbatches)
        tokens = float(self.rows.lengths_E.double().mean()) * self.config.train.rows_per_step / self.num_replicas
        return max(-(-int(tokens) // self.config.train.microbatch_tokens), 1)

    def plan(self, rank: int, worst_routing: bool = True) -> Planned:
        """Rehearses the largest step of the rows, or a full one."""
        share, train = self.share(rank), self.config.train
        if self.rows is None:
            step = full_step(self.config, self.num_replicas, self.row_tokens, self.supervised)
            peaks = rehearse(self.config, self.model, share, [trimmed(step, share)], worst_routing)
        else:
            replica = rank // self.num_stages
            batches = Batches(self.rows, train.rows_per_step, train.microbatch_tokens, replica, self.num_replicas)
            peaks = forecast(self.config, self.model, share, batches, worst_routing=worst_routing)
        return Planned(share, *peaks)


def main() -> None:
    args = parse()
    workload = read_workload(args)
    if args.fit:
        from loop.search import search

        print(search(workload, args.card))
        return
    # replicas are alike
    plans = [workload.plan(rank) for rank in range(workload.num_stages)]
    if args.json:
        print(json.dumps({"ranks": [record(rank, plans[rank % len(plans)], args.card) for rank in range(workload.num_ranks)]}))
    else:
        print(report(workload, plans, args.card))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loop.plan", description="How much memory a run will take on each rank, and for what.")
    parser.add_argument("--split", metavar="CUTS", help="as for pipeline_train.py: 40 | 30,60 | auto; none: not split")
    parser.add_argument("--ranks", type=int, help="processes; by default one a stage, else one a visible GPU, or 2 without any")
    parser.add_argument("--card", type=float, metavar="GIB", default=None, help=f"memory of a GPU, by default {CARD_GIB:g}")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, but cpu where the weights are and no GPU is")
    parser.add_argument("--row-tokens", type=int, default=1730, help="length of a row where the data are not at hand")
    parser.add_argument("--supervised", type=float, default=0.35, help="share of its tokens that is supervised, likewise")
    parser.add_argument("--fit", action="store_true", help="search the settings that use a card best")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    add_config_arguments(parser)
    args = parser.parse_intermixed_args()
    for name in ("row_tokens", "ranks", "card", "supervised"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    if args.supervised > 1:
        parser.error(f"--supervised {args.supervised}: expected a share, at most 1")
    return args


def read_workload(args: argparse.Namespace) -> Workload:
    """Raises:
        ValueError: a configuration, model, split or number of ranks that does not fit.
    """
    config = load_config(args.config, args.overrides)
    if args.split not in (None, "none"):
        try:
            config = replace(config, pipeline=replace(config.pipeline, split=args.split))
        except ValueError:
            raise ValueError(f"--split {args.split}: expected sublayer numbers such as 40 or 30,60, or auto, or none") from None
    model, is_here = find_model(config.model.path)
    device = args.device or ("cuda" if args.card or torch.cuda.is_available() or not is_here else "cpu")
    args.card = args.card or CARD_GIB
    rows = read_rows(config, model) if is_here or model.is_dir() else None
    is_split = args.split != "none" and (args.split is not None or "pipeline" in OmegaConf.load(args.config))
    workload = Workload(config, model, device, args.ranks or 1, (), rows, args.row_tokens, args.supervised)
    if not is_split:
        visible = 1 if args.split == "none" else torch.cuda.device_count() or 2
        workload = replace(workload, num_ranks=args.ranks or visible)
        check(workload)
        return workload
    return split_up(workload, args.ranks)


def split_up(workload: Workload, num_ranks: int | None) -> Workload:
    """The same over as many ranks as the split makes stages, or a multiple of them."""
    config = workload.config
    skeleton_model = skeleton(workload.model, config.model.base)
    num_stages = config.pipeline.num_stages(otherwise=num_ranks or 2)
    if config.pipeline.split == "auto":
        costs = sublayer_costs(skeleton_model, load_of(workload, num_stages))
        split = balance(costs, num_stages)
    else:
        split = config.pipeline.split
    check_split(split, 2 * skeleton_model.config.num_hidden_layers)
    num_ranks = num_ranks or num_stages
    if num_ranks % num_stages:
        raise ValueError(f"--ranks {num_ranks}: expected a multiple of {num_stages}, the number of stages")
    workload = replace(workload, num_ranks=num_ranks, split=tuple(split))
    check(workload)
    return workload


def check(workload: Workload) -> None:
    """Raises:
        ValueError: ranks without rows.
    """
    rows = workload.config.train.rows_per_step
    if rows < workload.num_replicas:
        raise ValueError(f"--ranks {workload.num_ranks}: train.rows_per_step={rows} leaves some of the "
                         f"{workload.num_replicas} replicas without a row")


def load_of(workload: Workload, num_stages: int) -> Load:
    """What `split.balance` weighs."""
    config = workload.config
    if workload.rows is not None:
        return Load.of(config.model.base, config.lora, config.train, workload.rows, config.pipeline.schedule, num_stages, 1)
    step_tokens = config.train.rows_per_step * workload.row_tokens
    kept = step_tokens if config.pipeline.schedule == "gpipe" else min(step_tokens, num_stages * config.train.microbatch_tokens)
    return Load(config.model.base, config.lora, config.train, workload.row_tokens / 2, workload.supervised, kept)


def find_model(path: str) -> tuple[Path, bool]:
    """Where the model's shapes are, and whether its weights are there too.

    Raises:
        ValueError: nowhere.
    """
    directory = Path(path).expanduser()
    if directory.is_dir() or directory.suffix == ".json":
        return directory, bool(list(directory.glob("*.safetensors")))
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        for weights in (True, False):
            cached = from_cache(path, weights)
            if cached is not None and (cached / "config.json").is_file():
                return cached, weights
    built_in = SHAPES / f"{directory.name}.json"
    if built_in.is_file() and path.count("/") <= 1 and not path.startswith(("/", ".", "~")):
        return built_in, False
    known = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
    raise ValueError(f"model.path: {path}: no such directory, and not in the cache. Give the directory of a config.json, or "
                     f"one of those whose shapes are built in: {known}")


def read_rows(config: Config, model: Path) -> TokenizedRows | None:
    """The training rows, if they are at hand, as the run would see them."""
    if not Path(config.data.train).is_file() or not (model / "tokenizer.json").is_file():
        return None
    with tempfile.TemporaryDirectory() as scratch:
        cache = config.run_dir / "data"
        return load_rows("train", load_tokenizer(model), config.data, cache if cache.is_dir() else Path(scratch))


def rows_bound(workload: Workload) -> int:
    """The fewest tokens that a microbatch must hold: the longest row's."""
    if workload.rows is not None:
        return int(workload.rows.lengths_E.max())
    return min(workload.row_tokens, workload.config.data.max_tokens)


# What is printed


def record(rank: int, plan: Planned, card_gib: float) -> dict[str, Any]:
    """One rank for --json; everything in GiB."""
    peak, share = plan.peak, plan.share
    held = {f"{name}_gib": num_bytes / GIB for name, num_bytes in peak.held.items()}
    return {
        "rank": rank, "stage": share.rank % share.num_stages, "peak_gib": peak.num_bytes / GIB, **held,
        "at_most": {f"{name}_gib": num_bytes / GIB for name, num_bytes in peak.most.items()},
        "moment": peak.moment, "module": peak.module, "line": peak.line,
        "worst_routing_gib": plan.worst.num_bytes / GIB, "card_gib": card_gib, "fits": spare_gib(plan.peak, card_gib) >= 0,
    }


def report(workload: Workload, plans: list[Planned], card_gib: float) -> str:
    """A column a rank: at the peak, and in brackets what each category takes at its own worst moment."""
    rows: list[tuple[str, list[str]]] = [("GiB", [title(plan, workload) for plan in plans])]
    for name in CATEGORIES:
        rows.append((name, [f"{p.peak.held[name] / GIB:.2f} ({p.peak.most[name] / GIB:.2f})" for p in plans]))
    rows.append(("peak", [f"{plan.peak.num_bytes / GIB:.2f}       " for plan in plans]))
    if any(plan.worst.num_bytes != plan.peak.num_bytes for plan in plans):
        rows.append(("worst routing", [f"{plan.worst.num_bytes / GIB:.2f}       " for plan in plans]))
    width = max(len(cell) for _, cells in rows for cell in cells) + 2
    lines = [describe(workload), "", "held at the peak (in brackets: the most of that kind at any moment of the step)"]
    lines += [f"{name:<14}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows]
    for plan in plans:
        lines += ["", *details(plan, workload, card_gib)]
    return "\n".join(lines)


def title(plan: Planned, workload: Workload) -> str:
    ranks = [str(rank) for rank in range(plan.share.rank, workload.num_ranks, workload.num_stages)]
    return f"rank {', '.join(ranks)}" if len(ranks) < 4 else f"rank {ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"


def describe(workload: Workload) -> str:
    """What is planned, in a line or two."""
    config, train = workload.config, workload.config.train
    how = f"{workload.num_ranks} rank(s)"
    if workload.num_stages > 1:
        cuts = ", ".join(map(str, workload.split))
        how += f", {workload.num_stages} stages cut at {cuts}, {config.pipeline.schedule}"
    rows = f"the largest step of the rows in {config.data.train}" if workload.rows else (
        f"no rows at hand: full microbatches of rows of {workload.row_tokens:,} tokens, "
        f"{100 * workload.supervised:.0f} % supervised")
    path = Path(config.model.path)
    name = path.parent.name if path.suffix == ".json" else path.name
    recompute = "recomputing" if train.recompute else "without recomputation"
    if train.recompute and train.keep_layers:
        recompute += f" but for the last {train.keep_layers} layers of a stage"
    return (f"{name}, {config.model.base}, LoRA {config.lora.rank}, {recompute}, {train.optimizer}, {how} "
            f"on {workload.device}\n"
            f"{train.rows_per_step} rows a step, microbatches of at most {train.microbatch_tokens:,} tokens; {rows}")


def details(plan: Planned, workload: Workload, card_gib: float) -> list[str]:
    """The moment of the peak, what holds the most then, and whether it fits."""
    peak = plan.peak
    lines = [f"{title(plan, workload)}: most in the {peak.moment}, {peak.module or 'no module'}, {peak.line}"]
    if workload.device == "cuda":
        spare = spare_gib(peak, card_gib)
        verdict = f"fits, {spare:.1f} GiB to spare" if spare >= 0 else (
            f"DOES NOT FIT, {-spare:.1f} GiB too much; --fit looks for what does")
        if spare >= 0 > spare_gib(plan.worst, card_gib):
            verdict += "; but not if all tokens go to the same experts"
        lines.append(f"  a card of {card_gib:g} GiB, of which {RESERVE_GIB:g} is left to CUDA: {verdict}")
    else:
        lines.append("  tensors alone: Python, torch and what the system's allocator keeps come on top, 0.5 GiB and more")
    for line in peak.largest[:NUM_LINES]:
        where = line.line.partition(" < ")[0]
        lines.append(f"  {line.num_bytes / GIB:7.3f} GiB in {line.count:>4}  {line.category:<13} {line.module or '-'}  {where}")
    return lines


def spare_gib(peak: Peak, card_gib: float) -> float:
    return card_gib - RESERVE_GIB - peak.num_bytes / GIB


if __name__ == "__main__":
    run_command(main)
