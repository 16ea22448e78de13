"""What a plan is made for: a configuration, the shapes of its model, ranks, and rows where these are at hand.
Costs the time to tokenize the rows, unless the run has tokenized them before."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.tokenized import TokenizedRows, load_rows
from loop.config import Config
from loop.distributed.groups import Place
from loop.pipeline.split import RowLengths
from loop.plan.forecast import full_step, largest_steps, trimmed
from loop.plan.rehearsal import RankPlan, Rehearsal
from loop.run import load_tokenizer

RESERVE_GIB = 1.0  # of a card: CUDA's own context, NCCL's buffers, and what lies free between tensors


@dataclass(frozen=True)
class Workload:
    """What a plan is made for.

    Raises:
        ValueError: ranks that do not make whole replicas, or replicas without rows.
    """

    config: Config
    model: Path  # config.json, or its directory
    device: str
    num_ranks: int
    num_stages: int
    rows: TokenizedRows | None  # None where they are not at hand
    lengths: RowLengths  # of these rows, or assumed
    split: tuple[int, ...] = ()  # as many cuts as make the stages, once they are chosen
    why_split: str = ""  # where they were chosen automatically
    generation: int | None = None  # of the card, as in model/devices.py
    done: int = 0  # steps that are over
    built: dict[Any, Rehearsal] = field(default_factory=dict, compare=False, repr=False)  # by what a rank's build depends on

    def __post_init__(self) -> None:
        rows = self.config.train.rows_per_step
        if self.num_ranks % self.num_stages:
            raise ValueError(f"--ranks {self.num_ranks}: expected a multiple of {self.num_stages}, the number of stages")
        if rows < self.num_replicas:
            raise ValueError(f"--ranks {self.num_ranks}: train.rows_per_step={rows} leaves some of the {self.num_replicas} "
                             "replicas without a row")

    @property
    def num_replicas(self) -> int:
        return self.num_ranks // self.num_stages

    def with_train(self, **settings: Any) -> Workload:
        """The same workload under other settings of `train`."""
        return replace(self, config=replace(self.config, train=replace(self.config.train, **settings)))

    def with_pipeline(self, **settings: Any) -> Workload:
        """The same workload under other settings of `pipeline`."""
        split = tuple(settings.get("split", self.split))
        return replace(self, split=split,
                       config=replace(self.config, pipeline=replace(self.config.pipeline, **settings)))

    def rehearsal(self, place: Place) -> Rehearsal:
        """This rank as it was built for other settings of `train` and `pipeline`, or is now."""
        config = self.config
        key = (repr(place), repr((config.model, config.lora)), config.train.optimizer, config.train.weight_decay)
        if key not in self.built:
            self.built[key] = Rehearsal(config, self.model, place, self.device, self.generation)
        return self.built[key]

    def rank_plan(self, rank: int, worst_routing: bool = True) -> RankPlan:
        """Rehearses the steps of the rows that may take the most, or a full step where the rows are not at hand."""
        place = Place(rank, self.num_ranks, self.num_stages, self.split)
        if self.rows is None:
            steps = [full_step(self.config, self.num_replicas, self.lengths)]
        else:
            steps = largest_steps(self.config, self.model, place, self.rows, self.done)
        steps = [trimmed(step, place, self.config.pipeline.schedule) for step in steps]
        return self.rehearsal(place).plan(self.config, steps, worst_routing)


def read_rows(config: Config, model: Path) -> TokenizedRows | None:
    """The training rows as the run would see them; None if the data or the tokenizer are not at hand."""
    if not Path(config.data.train).is_file() or not (model / "tokenizer.json").is_file():
        return None
    with tempfile.TemporaryDirectory() as scratch:
        cache = config.run_dir / "data"
        return load_rows("train", load_tokenizer(model), config.data, cache if cache.is_dir() else Path(scratch))
