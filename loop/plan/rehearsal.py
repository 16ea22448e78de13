"""One rank's training step without weights and without its device: the real build, the real loop and the real schedule
on fake tensors, which have shapes and no values. Takes seconds and some 100 MiB, whatever the model's size."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Iterator, NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data.batches import StepBatch
from loop.config import MOST_STEPS, Config
from loop.distributed.groups import Place
from loop.fit import fit
from loop.memory.ledger import Ledger
from loop.memory.peak import Peak
from loop.memory.phases import CUDA_BLOCK, Memory, own_tensors
from loop.memory.without_values import put_nothing, without_values
from loop.metrics import RunLog
from loop.optim import make_optimizer
from loop.pipeline.gpipe import passes
from loop.plan.fakes import RehearsedRanks, Steps, fake, nothing_sent, pretended_group, skeletons_kept
from loop.plan.stand_in import Representatives
from loop.state import State
from model.build import build_empty
from model.config import check_keep_layers
from model.moe import routing
from model.stages import Stage

CPU = torch.device("cpu")
NEVER = MOST_STEPS


class RankPlan(NamedTuple):
    """What one rank will take."""

    peak: Peak
    worst: Peak  # if all tokens go to the same experts


class Rehearsal:
    """One rank, built once, whose steps are rehearsed under several settings of `train` and `pipeline`. What does not depend on
    these stays: weights, adapters and, after the first step, optimizer states.

    Args:
        config: its settings of model, adapters and optimizer count.
        model: a directory with config.json, or a file like it.
        device: whose code path is taken: cuda | cpu.
        card: its generation, see `without_values`.
    """

    def __init__(self, config: Config, model: Path, place: Place, device: str, card: int | None = None) -> None:
        self.ledger = Ledger(round_to=CUDA_BLOCK if device == "cuda" else 1)
        self.ranks = RehearsedRanks(place.rank, place.world_size, place.num_stages, place.split)
        self.device, self.card, self.mode = device, card, FakeTensorMode(allow_non_fake_inputs=True)
        with skeletons_kept(model, config.model.base), without_values(device, card, self.mode), self.ledger:
            self.state = build_fake(config, model, self.ranks, Memory(CPU, self.ledger), self.ledger)

    def plan(
        self, config: Config, batches: list[StepBatch], worst_routing: bool = False, all_layers: bool = False
    ) -> RankPlan:
        """The highest peak of some steps.

        Args:
            batches: the steps. Optimizer states are there from the start, unless the first of these steps is the run's first.
            worst_routing: whether to rehearse the worst routing too; else `worst` is `peak`.
            all_layers: compute every layer of every microbatch, for tests; else of layers that are alike only one.
        """
        ledger, ranks, state = self.ledger, self.ranks, self.fresh_state(config, batches[0].step == 1)
        memory = Memory(CPU, ledger)
        memory.attach(state.stage.model, state.adapters.values(), state.optimizer)
        representatives = Representatives(state.stage, memory, ledger)
        if not all_layers:
            setattr(state.stage, "run_layer", representatives)
        spans: dict[bool, list[tuple[int, int]]] = {False: [], True: []}  # first and last event of each step, by `is_worst`

        def steps() -> Iterator[StepBatch]:
            if batches[0].step > 1 and not state.optimizer.state:
                yield replace(batches[0], microbatches=[], slots=range(0))  # makes the optimizer states
            for batch in batches:
                representatives.begin(batch)
                for is_worst in (False, True)[: 1 + worst_routing]:
                    start = ledger.clock
                    with patch.object(routing, "ASSUMED", [routing.worst_bounds if is_worst else routing.uniform_bounds]):
                        yield fake(batch)
                    spans[is_worst].append((start, ledger.clock))

        # no evaluation, checkpoint or end, so that only the given steps are computed
        train = replace(config.train, max_steps=NEVER, router_stats=False, memory_trace=None)
        endless = replace(config, train=train, eval=replace(config.eval, every=NEVER),
                          checkpoint=replace(config.checkpoint, every=NEVER, every_s=NEVER))
        log, rows = RunLog(Path(), "", CPU, enabled=False), Steps(steps)
        with pretended_group(ranks), nothing_sent(), without_values(self.device, self.card, self.mode), ledger:
            fit(endless, state, rows, rows, *passes(state.stage, ranks, config.pipeline.schedule, log, memory),
                ranks, log, memory)
        even, worst = ([Peak.of(ledger, *span) for span in of_routing] for of_routing in spans.values())
        highest = max(even, key=lambda peak: peak.num_bytes)
        return RankPlan(highest, max(worst, key=lambda peak: peak.num_bytes, default=highest))

    def fresh_state(self, config: Config, is_first: bool) -> State:
        """The state in front of a step under these settings; the ledger has forgotten what earlier steps made and freed."""
        built, train = self.state, config.train
        if is_first:
            built.optimizer.state.clear()
        gc.collect()  # an earlier step's pipeline is a cycle
        self.ledger.allocations = [a for a in self.ledger.allocations if a.died is None]
        self.ledger.forward_sites.clear()
        check_keep_layers(train.keep_layers, self.ranks.first, built.stage.stop)
        stage = Stage(built.stage.model, self.ranks.first, built.stage.stop, train.recompute, train.keep_layers).train()
        return State(stage, built.adapters, built.optimizer, step=1)  # at step 0 the loop would evaluate first


def rehearse(
    config: Config, model: Path, place: Place, device: str, batches: list[StepBatch], worst_routing: bool = False,
    all_layers: bool = False, card: int | None = None,
) -> RankPlan:
    """The highest peak of some steps of one rank, built for them alone: see `Rehearsal`."""
    return Rehearsal(config, model, place, device, card).plan(config, batches, worst_routing, all_layers)


def build_fake(config: Config, model: Path, place: Place, memory: Memory, ledger: Ledger) -> State:
    """The stage and optimizer as a run builds them, with storage for every weight; the ledger knows each by its module."""
    with memory.during("build"):
        stage, weights = build_empty(
            model, config.model.base, config.lora, seed=0, device=CPU, recompute=False, first=place.first, stop=place.stop)
    with memory.during("load"):
        put_nothing(weights)
    ledger.watch(stage.model)
    for name, module in stage.model.named_modules():
        for tensor in own_tensors(module):
            ledger.allocation_of(tensor).module = name
    adapters = stage.adapters()
    ledger.tag("adapters", adapters.values())
    optimizer = make_optimizer(config.train.optimizer, adapters.values(), config.train.weight_decay)
    return State(stage, adapters, optimizer)
