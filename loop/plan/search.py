"""Finds the settings that use a card best: the length of microbatches, how many layers need no recomputation, the cuts.
Builds each stage once and rehearses a few steps on it: 40 seconds of a core for the 4B, 135 for the 35B."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any, Iterator, NamedTuple, Sequence

from omegaconf import OmegaConf

from data.packing import rounded_up
from loop.config import Config, overridden
from loop.memory.phases import GIB
from loop.pipeline.split import RowLengths, balance, sublayer_costs
from loop.plan.seconds import Forecast, StepTime
from loop.plan.workload import RESERVE_GIB, Workload
from loop.rates import Rates

NUM_SHOWN = 3
LENGTHS = (0.5, 1, 2)  # tried lengths of a microbatch, relative to the configured microbatch_tokens
MUCH_LEFT = 0.25  # share of a card: if the fastest settings take no more, the search looks for what the rest could buy
COUNTED_ONCE = {"train.microbatch_tokens", "train.recompute", "train.keep_layers", "pipeline.split", "pipeline.schedule"}
MORE = 4  # times as many tokens, or as high a rank, as the rest of a card is tried with


class Fit(NamedTuple):
    """Settings with what they take."""

    overrides: list[str]  # what differs from the configuration, as on a command line
    tokens: int  # at most in a microbatch
    kept: int  # layers of each stage that are not recomputed
    split: tuple[int, ...]
    schedule: str
    peak_gib: float  # of the fullest rank
    time: StepTime


@dataclass
class Progress:
    """Says on stderr how far the search is and since when: in one line that is rewritten on a terminal, else in a line each."""

    total: int
    done: int = 0
    num_rehearsals: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        line = f"{self.done} of {self.total} settings planned, {self.seconds:.0f} s: {text}"
        start, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}{line[:110]}", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Search:
    """The settings that fit a card and take the least time, beside those that are configured.

    Args:
        workload: with the configured settings.
        card_gib: memory of a card.
        rates: of the same card.
    """

    def __init__(self, workload: Workload, card_gib: float, rates: Rates) -> None:
        self.workload, self.card_gib, self.rates = workload, card_gib, rates
        self.limit = (card_gib - RESERVE_GIB) * GIB
        self.num_sublayers = len(sublayer_costs(workload.model, workload.config, workload.lengths))
        self.taken: dict[Any, float] = {}  # bytes of the fullest rank
        self.forecasts: dict[int, Forecast] = {}  # by tokens of a microbatch
        self.progress = Progress(0)

    def fastest(self) -> list[Fit]:
        """The settings that fit and take the least time, the fastest first.

        Raises:
            ValueError: nothing fits.
        """
        found: list[Fit] = []
        for least_s, workload in sorted(self.candidates(), key=lambda candidate: candidate[0]):
            if len(found) >= NUM_SHOWN and least_s > found[NUM_SHOWN - 1].time.seconds:
                break  # slower than these, however many of its layers are kept
            keep = self.most_kept(workload)
            if keep is not None:
                found.append(self.fit(with_kept(workload, keep, self.num_layers)))
                found.sort(key=lambda fit: fit.time.seconds)
            self.progress.done += 1
        if not found:
            raise ValueError(
                f"nothing fits a card of {self.card_gib:g} GiB. Try model.base=nf4, a smaller lora.rank, more stages "
                "(--split), or shorter rows (data.max_tokens with data.overlong=drop)")
        return found[:NUM_SHOWN]

    @property
    def num_layers(self) -> int:
        return self.num_sublayers // 2

    def candidates(self) -> Iterator[tuple[float, Workload]]:
        """Lengths of microbatches and cuts, each with the seconds that a step would take if no layer were recomputed."""
        workload = self.workload.with_train(recompute=True, keep_layers=0)
        # 1F1B is idle as long as GPipe, and keeps less
        workload = workload.with_pipeline(schedule="1f1b") if workload.split else workload
        costs = sublayer_costs(workload.model, workload.config, workload.lengths)
        tokens, longest = workload.config.train.microbatch_tokens, workload.lengths.longest
        lengths = sorted({rounded_up(max(int(tokens * share), longest)) for share in LENGTHS})
        splits = sorted({workload.split, tuple(balance(costs, workload.num_stages))})
        self.progress.total = len(lengths) * len(splits)
        for length in lengths:
            self.progress.say(f"counting the work of microbatches of {length:,} tokens")
            longer = workload.with_train(microbatch_tokens=length)
            forecast = self.forecasts[length] = Forecast(longer, self.rates)
            for split in splits:
                least_s = forecast.step(split, self.num_kept_at_most(split)).seconds
                yield least_s, longer.with_pipeline(split=list(split)) if split else longer

    def num_kept_at_most(self, split: Sequence[int]) -> int:
        return min((stop + 1) // 2 - first // 2 for first, stop in zip((0, *split), (*split, self.num_sublayers)))

    def most_kept(self, workload: Workload) -> int | None:
        """How many decoder layers of each stage fit without recomputation; None where nothing fits. The number is guessed from
        rehearsals of no and of all layers, then rehearsed."""
        recomputing = self.fullest(workload)
        if recomputing > self.limit:
            return None
        keep = self.num_kept_at_most(workload.split)
        taken = self.fullest(with_kept(workload, keep, self.num_layers))
        while taken > self.limit:
            slope = (taken - recomputing) / keep
            keep = min(keep - 1, int((self.limit - recomputing) / slope))
            taken = self.fullest(with_kept(workload, keep, self.num_layers)) if keep else recomputing
        return keep

    def fullest(self, workload: Workload) -> float:
        """Bytes on the rank that takes most."""
        train, key = workload.config.train, (repr(workload.config), workload.split, workload.lengths)
        if key not in self.taken:
            kept = f"{train.keep_layers} layers kept" if train.recompute else "no layer recomputed"
            cut = f", cut at {','.join(map(str, workload.split))}" if workload.split else ""
            self.progress.say(f"rehearsing microbatches of {train.microbatch_tokens:,} tokens, {kept}{cut}")
            self.progress.num_rehearsals += workload.num_stages
            self.taken[key] = max(workload.rank_plan(rank, worst_routing=False).peak.num_bytes
                                  for rank in range(workload.num_stages))
        return self.taken[key]

    def fit(self, workload: Workload) -> Fit:
        """What the settings of a workload take, whether they fit or not."""
        config, train, split = workload.config, workload.config.train, workload.split
        overrides, taken = differences(self.workload.config, config), self.fullest(workload)
        is_alike = set(names_of(overrides)) <= COUNTED_ONCE and workload.lengths == self.workload.lengths
        forecast = is_alike and self.forecasts.get(train.microbatch_tokens) or Forecast(workload, self.rates)
        keep = train.keep_layers if train.recompute else self.num_layers
        return Fit(overrides, train.microbatch_tokens, keep, split, config.pipeline.schedule if split else "", taken / GIB,
                   forecast.step(split, keep))

    def bought(self, best: Fit) -> list[tuple[str, Fit]]:
        """What else fits, with the reason to want it, where the fastest settings leave most of the card unused."""
        if best.peak_gib > MUCH_LEFT * self.card_gib:
            return []
        config, lengths = overridden(self.workload.config, best.overrides), self.workload.lengths
        rows = RowLengths(MORE * lengths.longest, MORE * lengths.mean, MORE * lengths.context, lengths.supervised)
        longer = [f"train.microbatch_tokens={rounded_up(max(best.tokens, rows.longest))}",
                  f"data.max_tokens={max(rows.longest, config.data.max_tokens)}"]
        wishes: list[tuple[str, list[str], RowLengths]] = [
            (f"rows of up to {rows.longest:,} tokens", longer, rows),
            ("larger microbatches", [f"train.microbatch_tokens={MORE * best.tokens}"], lengths),
            (f"{MORE} times the rank", [f"lora.rank={MORE * config.lora.rank}", f"lora.alpha={MORE * config.lora.alpha:g}"],
             lengths)]
        if config.model.base in ("int8", "nf4"):
            wishes.append(("weights that are not rounded", ["model.base=bf16"], lengths))
        fits = []
        for what, changes, of_rows in wishes:
            known = self.workload.rows if of_rows is lengths else None
            wish = replace(self.workload, config=overridden(config, changes), split=best.split, lengths=of_rows, rows=known)
            if self.fullest(wish) <= self.limit:
                fits.append((what, self.fit(wish)))
        return fits


def with_kept(workload: Workload, keep: int, num_layers: int) -> Workload:
    """The workload with so many layers of each stage not recomputed."""
    return workload.with_train(recompute=False) if keep == num_layers else workload.with_train(keep_layers=keep)


def names_of(overrides: list[str]) -> list[str]:
    return [override.partition("=")[0] for override in overrides]


def differences(config: Config, other: Config) -> list[str]:
    """What makes `other` of `config`, as on a command line."""
    names = ("model.base", "lora.rank", "lora.alpha", "data.max_tokens", "train.microbatch_tokens", "train.recompute",
             "train.keep_layers", "pipeline.split", "pipeline.schedule")
    values = [[OmegaConf.select(OmegaConf.structured(one), name) for name in names] for one in (config, other)]
    return [f"{name}={str(new).lower().strip('[]').replace(' ', '')}" for name, old, new in zip(names, *values) if old != new]
