"""One rank's training step without weights and without its device: the real build, the real loop and the real schedule
on fake tensors, which have shapes and no values. Takes seconds and some 100 MiB, whatever the model's size."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Iterator, NamedTuple
from unittest.mock import patch

import torch

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
from loop.plan.fakes import RehearsedRanks, Steps, fake, nothing_sent, pretended_group
from loop.plan.stand_in import Representatives
from loop.state import State
from model.build import build_empty
from model.moe import routing

CPU = torch.device("cpu")
NEVER = MOST_STEPS


class RankPlan(NamedTuple):
    """What one rank will take."""

    peak: Peak
    worst: Peak  # if all tokens go to the same experts


def rehearse(
    config: Config, model: Path, place: Place, device: str, batches: list[StepBatch], worst_routing: bool = False,
    all_layers: bool = False, card: int | None = None,
) -> RankPlan:
    """The highest peak of some steps of one rank.

    Args:
        model: a directory with config.json, or a file like it.
        device: whose code path is taken: cuda | cpu.
        batches: the steps. Optimizer states are there from the start, unless the first of these steps is the run's first.
        worst_routing: whether to rehearse the worst routing too; else `worst` is `peak`.
        card: its generation, see `without_values`.
        all_layers: compute every layer of every microbatch, for tests; else of layers that are alike only one.
    """
    ledger = Ledger(round_to=CUDA_BLOCK if device == "cuda" else 1)
    memory = Memory(CPU, ledger)
    ranks = RehearsedRanks(place.rank, place.world_size, place.num_stages, place.split)
    spans: dict[bool, list[tuple[int, int]]] = {False: [], True: []}  # first and last event of each step, by `is_worst`
    with ExitStack() as stack:
        for context in (pretended_group(ranks), nothing_sent(), without_values(device, card), ledger):
            stack.enter_context(context)
        state = build_fake(config, model, ranks, memory, ledger)
        representatives = Representatives(state.stage, memory, ledger)
        if not all_layers:
            setattr(state.stage, "run_layer", representatives)

        def steps() -> Iterator[StepBatch]:
            if batches[0].step > 1:
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
        fit(endless, state, rows, rows, *passes(state.stage, ranks, config.pipeline.schedule, log, memory),
            ranks, log, memory)
    even, worst = ([Peak.of(ledger, *span) for span in of_routing] for of_routing in spans.values())
    highest = max(even, key=lambda peak: peak.num_bytes)
    return RankPlan(highest, max(worst, key=lambda peak: peak.num_bytes, default=highest))


def build_fake(config: Config, model: Path, place: Place, memory: Memory, ledger: Ledger) -> State:
    """The stage and optimizer as a run builds them, with storage for every weight; the ledger knows each by its module."""
    with memory.during("build"):
        stage, weights = build_empty(
            model, config.model.base, config.lora, seed=0, device=CPU, recompute=config.train.recompute,
            keep_layers=config.train.keep_layers, first=place.first, stop=place.stop,
        )
    with memory.during("load"):
        put_nothing(weights)
    ledger.watch(stage.model)
    for name, module in stage.model.named_modules():
        for tensor in own_tensors(module):
            ledger.allocation_of(tensor).module = name
    adapters = stage.adapters()
    ledger.tag("adapters", adapters.values())
    optimizer = make_optimizer(config.train.optimizer, adapters.values(), config.train.weight_decay)
    memory.attach(stage.model, adapters.values(), optimizer)
    return State(stage, adapters, optimizer, step=1)  # at step 0 the loop would evaluate first
