"""How long a step takes: the work of its pieces at a device's rates, the pipeline's idle time, and what ranks send each other.
Counting the pieces takes seconds; after that another cut or number of kept layers costs nothing."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

from data.batches import Batches
from data.packing import pack_step
from loop.memory.counter import PURPOSES
from loop.plan.pieces import Layer, Operations, Pieces
from loop.plan.workload import Workload
from loop.rates import Rates
from model.build import text_config

MAX_STEPS_LOOKED_AT = 1000
GRADIENT_BYTES = 4
COMPUTED = ("communication", "pipeline idle time")  # and not counted


@dataclass(frozen=True)
class Shape:
    """A step as one replica sees it on average."""

    lengths: tuple[int, ...]  # of the segments of a microbatch
    supervised: int  # positions of a microbatch
    num_microbatches: float
    num_tokens: float  # of a step of all replicas, without padding
    steps_per_epoch: int | None  # None where the rows are not at hand

    @classmethod
    def of(cls, workload: Workload) -> Shape:
        """Of rows at hand the microbatch that is nearest to the mean of all steps, else equal rows packed as a run packs."""
        train, rows, lengths = workload.config.train, workload.rows, workload.lengths
        if rows is None:
            packing = pack_step([[lengths.longest]] * train.rows_per_step, workload.num_replicas, train.microbatch_tokens)
            num_rows = len(packing.microbatches[0][0])
            padding = packing.length - num_rows * lengths.longest
            own = (lengths.longest,) * num_rows + (padding,) * (padding > 0)
            return cls(own, max(int(lengths.supervised * num_rows * lengths.longest), 1), len(packing.microbatches[0]),
                       train.rows_per_step * lengths.longest, None)
        batches = Batches(rows, train.rows_per_step, train.microbatch_tokens, 0, workload.num_replicas)
        total = min(train.total_steps(batches.steps_per_epoch), MAX_STEPS_LOOKED_AT)
        shapes = [own for _, own, _ in batches.shapes(0, total, train.seed)]
        every = [microbatch for own in shapes for microbatch in own]
        mean_tokens, mean_pairs = fmean(map(sum, every)), fmean(sum(n * n for n in own) for own in every)
        nearest = min(every, key=lambda own: abs(sum(own) / mean_tokens - 1) + abs(sum(n * n for n in own) / mean_pairs - 1))
        num_tokens = float(rows.lengths_E.sum()) / batches.steps_per_epoch
        num = fmean(map(len, shapes)) * mean_tokens / sum(nearest)
        return cls(nearest, max(int(lengths.supervised * num_tokens / workload.num_replicas / num), 1), num, num_tokens,
                   batches.steps_per_epoch)


@dataclass(frozen=True)
class StepTime:
    """How long an optimizer step takes. `by_purpose` are the seconds of the slowest stage; with idle time they are all."""

    seconds: float
    by_purpose: dict[str, float]
    shape: Shape
    on_cpu: bool

    @property
    def tokens_per_s(self) -> float:
        return self.shape.num_tokens / self.seconds

    @property
    def epoch_hours(self) -> float | None:
        return self.shape.steps_per_epoch and self.shape.steps_per_epoch * self.seconds / 3600

    def record(self) -> dict[str, Any]:
        """For --json."""
        return {"step_s": self.seconds, "tokens_per_s": self.tokens_per_s, "epoch_hours": self.epoch_hours,
                "on_cpu": self.on_cpu, "share": {name: took / self.seconds for name, took in self.by_purpose.items()}}

    def __str__(self) -> str:
        epoch = f", an epoch of {self.shape.steps_per_epoch} in {self.epoch_hours:.2f} h" if self.epoch_hours else ""
        return f"{self.seconds:.3g} s a step, {self.tokens_per_s:,.0f} tokens/s{epoch}: {self.shares()}"

    def shares(self) -> str:
        """What the time goes to, in percent."""
        return ", ".join(f"{name} {took / self.seconds:.0%}" for name, took in sorted(
            self.by_purpose.items(), key=lambda item: -item[1]) if took >= 0.005 * self.seconds)


class Forecast:
    """The time of a workload's steps at some rates, for any cuts and number of kept layers."""

    def __init__(self, workload: Workload, rates: Rates) -> None:
        self.workload, self.rates, self.shape = workload, rates, Shape.of(workload)
        self.model = text_config(workload.model)
        self.pieces = Pieces(workload.config, workload.model, workload.device, rates.generation, self.shape.lengths,
                             self.shape.supervised)

    @cache
    def took(self, piece: str, layer: Layer | None = None) -> Tally[str]:
        """Seconds of one piece by purpose."""
        operations: Operations = {"embedding": self.pieces.embedding, "loss": self.pieces.loss}[piece]() if layer is None else (
            self.pieces.layer(layer) if piece == "layer" else self.pieces.update(layer)[0])
        return Tally(self.rates.total(operations))

    def stage(self, first: int, stop: int, keep: int) -> tuple[Tally[str], Tally[str], int]:
        """Seconds of a microbatch and of the update in a stage, and the number of its trained parameters."""
        microbatch, update, num_parameters = Tally[str](), Tally[str](), 0
        for layer, num in Tally(self.pieces.layers(first, stop, keep)).items():
            microbatch.update(times(self.took("layer", layer), num))
            update.update(times(self.took("update", layer), num))
            num_parameters += num * self.pieces.update(layer)[1]
        if first == 0:
            microbatch.update(self.took("embedding"))
        if stop == 2 * self.model.num_hidden_layers:
            microbatch.update(self.took("loss"))
        return microbatch, update, num_parameters

    def step(self, split: tuple[int, ...], keep: int) -> StepTime:
        """A step in which stage s begins with sublayer split[s - 1] and the last `keep` layers of each are not recomputed."""
        bounds = (0, *split, 2 * self.model.num_hidden_layers)
        stages = [self.stage(first, stop, keep) for first, stop in zip(bounds, bounds[1:])]
        microbatch, update, num_parameters = max(stages, key=lambda stage: stage[0].total())
        replicas, num = self.workload.num_replicas, self.shape.num_microbatches
        # each stage waits until the first microbatch has come through those before, and the last through those behind it
        idle = sum(stage[0].total() for stage in stages) - microbatch.total()
        message = sum(self.shape.lengths) * self.model.hidden_size * self.model.dtype.itemsize
        sent = 2 * num * message * (len(stages) > 1) + 2 * (replicas - 1) / replicas * num_parameters * GRADIENT_BYTES
        seconds = times(microbatch, num) + update
        seconds.update({"communication": sent / self.rates.link, "pipeline idle time": idle})
        by_purpose = {name: seconds[name] for name in (*PURPOSES, *COMPUTED) if seconds[name]}
        return StepTime(sum(by_purpose.values()), by_purpose, self.shape, self.rates.waits)


def times(seconds: Tally[str], number: float) -> Any:
    return Tally({name: number * took for name, took in seconds.items()})
