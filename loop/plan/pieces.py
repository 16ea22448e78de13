"""Counts the work of the pieces of a training step, each once: embedding, a decoder layer of each kind, loss and update.
Needs no weights; takes up to some seconds a piece and some MiB."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Iterator, Sequence
from unittest.mock import patch

import torch

from loop.config import Config
from loop.memory.counter import Counter, Operation
from loop.memory.without_values import put_nothing, without_values
from loop.optim import make_optimizer, sync_and_clip
from loop.plan.fakes import RehearsedRanks, skeletons_kept
from model.build import build_empty, text_config
from model.mixers import Segments
from model.moe import routing
from model.stages import Stage

CPU = torch.device("cpu")

Operations = Sequence[Operation]


@dataclass(frozen=True)
class Layer:
    """What the work of a decoder layer depends on."""

    number: int  # of a layer that is like it
    recomputed: bool
    mixer: bool = True  # whether it has this sublayer; a cut between stages separates the two
    feed_forward: bool = True


@dataclass(frozen=True, eq=False)  # told apart by identity, for what is cached
class Pieces:
    """The pieces of a step of one model.

    Args:
        model: a directory with config.json, or a file like it.
        device, card: whose code path is taken, see `without_values`.
        lengths: of the segments of a microbatch.
        supervised: positions of a microbatch.
    """

    config: Config
    model: Path
    device: str
    card: int | None
    lengths: tuple[int, ...]
    supervised: int

    def layers(self, first: int, stop: int, keep: int) -> Iterator[Layer]:
        """The decoder layers of a stage of these sublayers, each by one that is like it; the last `keep` are not recomputed."""
        shape = text_config(self.model)
        kinds = getattr(shape, "layer_types", None) or [""] * shape.num_hidden_layers
        numbers = range(first // 2, (stop + 1) // 2)
        for number in numbers:
            is_like = number and len(kinds) - 1 - kinds[::-1].index(kinds[number])  # the first one's input needs no gradient
            yield Layer(is_like, self.config.train.recompute and number < numbers.stop - keep,
                        2 * number >= first, 2 * number + 1 < stop)

    @cache
    def layer(self, layer: Layer) -> Operations:
        """Forward, recomputation and backward of one decoder layer in a microbatch that is not the step's first."""
        with self.built(2 * layer.number, 2 * layer.number + 2) as (whole, counter):
            stage = Stage(whole.model, 2 * layer.number + (not layer.mixer), 2 * layer.number + 1 + layer.feed_forward,
                          layer.recomputed)
            rotary, x_1TD = self.inputs(stage)
            x_1TD.requires_grad_(layer.number > 0)
            for parameter in stage.adapters().values():
                parameter.grad = torch.zeros_like(parameter)
            dy_1TD = torch.empty_like(x_1TD)
            counter.operations.clear()
            y_1TD = stage.run_layer(layer.number, x_1TD, rotary, self.segments())
            if y_1TD.requires_grad:  # the first layer may have no adapters
                y_1TD.backward(dy_1TD)
            return tuple(counter.operations)

    @cache
    def embedding(self) -> Operations:
        """In front of the first layer, with the rotary tables, which each stage computes."""
        with self.built(0, 1) as (stage, counter):
            ids_1T = torch.empty(1, sum(self.lengths), dtype=torch.int64)
            counter.operations.clear()
            stage.begin(ids_1T, ids_1T[0])
            return tuple(counter.operations)

    @cache
    def loss(self) -> Operations:
        """Behind the last layer, forward and backward."""
        last = 2 * text_config(self.model).num_hidden_layers
        with self.built(last - 1, last) as (stage, counter):
            x_1TD = self.inputs(stage)[1].requires_grad_()
            predict_N = torch.empty(self.supervised, dtype=torch.int64)
            counter.operations.clear()
            (stage.losses(x_1TD, predict_N, predict_N).sum() / 2).backward()
            return tuple(counter.operations)

    @cache
    def update(self, layer: Layer) -> tuple[Operations, int]:
        """Clipping and the optimizer's step for the adapters of one layer, and the number of their parameters."""
        with self.built(2 * layer.number + (not layer.mixer), 2 * layer.number + 1 + layer.feed_forward) as (stage, counter):
            parameters = list(stage.adapters().values())
            if not parameters:
                return (), 0
            optimizer = make_optimizer(self.config.train.optimizer, parameters, self.config.train.weight_decay)
            for _ in range(2):  # the first step makes the states
                counter.operations.clear()
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
                counter.only = "optimizer"
                sync_and_clip(parameters, 1.0, RehearsedRanks())
                optimizer.step()
            return tuple(counter.operations), sum(parameter.numel() for parameter in parameters)

    # How a piece is built

    @contextmanager
    def built(self, first: int, stop: int) -> Iterator[tuple[Stage, Counter]]:
        """These sublayers without values, and a counter that is on."""
        counter = Counter([self.config.lora.rank], self.lengths)
        with (skeletons_kept(self.model, self.config.model.base), patch.object(routing, "ASSUMED", [routing.uniform_bounds]),
              without_values(self.device, self.card), counter):
            stage, weights = build_empty(
                self.model, self.config.model.base, self.config.lora, seed=0, device=CPU, recompute=False,
                first=first, stop=stop)
            put_nothing(weights)
            yield stage, counter

    def inputs(self, stage: Stage) -> tuple[Any, torch.Tensor]:
        """Rotary tables, and hidden states [1, T, D]."""
        shape = stage.model.config
        x_1TD = torch.empty(1, sum(self.lengths), shape.hidden_size, dtype=shape.dtype)
        ids = torch.empty(1, sum(self.lengths), dtype=torch.int64)
        return stage.begin(ids if stage.is_first else x_1TD, ids[0])[1], x_1TD

    def segments(self) -> Segments:
        return Segments(torch.empty(len(self.lengths) + 1, dtype=torch.int32), self.lengths)
