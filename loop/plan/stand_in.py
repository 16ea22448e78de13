"""Rehearses one of several decoder layers that are alike; the others take and keep as much memory as that one does.
Saves most of a rehearsal's time. `rehearse(all_layers=True)` is the plain reference."""

from __future__ import annotations

from typing import Any, Callable, ContextManager

import torch
from torch import Tensor

from data.batches import StepBatch
from loop.memory.ledger import Allocation, Frame, Ledger
from loop.memory.phases import Memory
from model.delta_rule import padded_positions
from model.matmul import JointMatmul
from model.stages import Stage, decoder_layer

Frames = tuple[Frame, ...]
Kept = list[tuple[int, str, Frames]]  # bytes; module, as its name goes on after the layer's; lines


class Representatives:
    """Runs one decoder layer of each kind; the others, which `StandIn` replaces, allocate and keep as much memory.

    Which layers are run: the last one of each kind, where the backward pass begins and the most is kept. The first one
    too, in two cases. If activations are kept, the first layer shows how many bytes the later ones keep. If gradients
    are larger than a layer's output, or the last layer's gradient is a message, which outlives that layer, the peak of the
    first backward pass may be at its end, in the first layer.
    Which microbatches are run: the last one and the one whose rows are padded most; in a pipeline, or where activations
    are kept, the first two as well.
    """

    def __init__(self, stage: Stage, memory: Memory, ledger: Ledger) -> None:
        self.stage, self.memory, self.ledger = stage, memory, ledger
        self.plain = stage.run_layer
        self.run_microbatches: set[int] = set()
        numbers = range(stage.first // 2, (stage.stop + 1) // 2)
        # then a microbatch leaves nothing but gradients to the next one
        self.is_alone = stage.is_first and stage.is_last and len(stage.recomputed) == len(numbers)
        self.kind = {number: kind_of_layer(stage, number) for number in numbers}
        self.first = {kind: number for number, kind in reversed(self.kind.items())}
        self.last = {kind: number for number, kind in self.kind.items()}
        # what a layer keeps beside its input and output, by the layer's kind and the lengths of the rows
        self.kept: dict[tuple[Any, tuple[int, ...]], Kept] = {}

    def begin(self, batch: StepBatch) -> None:
        """Chooses the microbatches of the next step that are run."""
        num = len(batch.microbatches)
        padded = max(range(num), key=lambda m: padded_positions(batch.microbatches[m].lengths), default=0)
        self.run_microbatches = {padded, num - 1} if self.is_alone else {0, 1, padded, num - 1}

    def __call__(self, number: int, x_1TD: Tensor, rotary: Any, segments: Any) -> Tensor:
        kind, keeps, layer = self.kind[number], number not in self.stage.recomputed, f"model.layers.{number}"
        trained = {name: p for name, p in self.stage.model.model.layers[number].named_parameters() if p.requires_grad}
        has_large_gradients = 4 * sum(p.numel() for p in trained.values()) > x_1TD.numel() * x_1TD.element_size()
        in_first = self.memory.microbatch == 0 and (has_large_gradients or not self.stage.is_last)
        shows_more = in_first or keeps and (kind, segments.lengths) not in self.kept
        if self.memory.microbatch in self.run_microbatches and (
                self.last[kind] == number or self.first[kind] == number and shows_more):
            start = len(self.ledger.allocations)
            y_1TD = self.plain(number, x_1TD, rotary, segments)
            made = self.ledger.allocations[start:] if keeps else []
            self.kept[kind, segments.lengths] = kept_of(made, self.ledger.allocation_of(y_1TD), layer)
            return y_1TD
        # in a microbatch that is not run: as much as this kind keeps of the rows of which it keeps most
        known = [kept for (of_kind, _), kept in self.kept.items() if of_kind == kind]
        most: Kept = max(known, key=lambda kept: sum(num_bytes for num_bytes, *_ in kept), default=[])

        def made_by(module: str, frames: Frames) -> ContextManager[None]:
            return self.ledger.pretending(layer + module, frames)

        return StandIn.apply(x_1TD, next(iter(trained.values()), None), self.kept.get((kind, segments.lengths), most), trained,
                             made_by)


def kept_of(made: list[Allocation], output: Allocation, layer: str) -> Kept:
    """What is still held of the allocations that a layer made, but for its output."""
    return [(a.num_bytes, a.module.removeprefix(layer) if a.module.startswith(layer) else "", a.frames)
            for a in made if a.died is None and a is not output]


def kind_of_layer(stage: Stage, number: int) -> Any:
    """Layers that are alike have this in common, and no others."""
    layer = stage.model.model.layers[number]
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    halves = 2 * number >= stage.first, 2 * number + 1 < stage.stop, number in stage.recomputed
    no_gradient = number == 0 and number not in stage.recomputed  # its input needs no gradient, so that it keeps less
    return halves, no_gradient, tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)


class StandIn(torch.autograd.Function):
    """Takes and keeps the memory of a decoder layer, without what the layer needs only while it computes.

    `parameter` is one of those that are trained: with it as an input, the output needs a gradient even where x_1TD needs none.
    `made_by` gives allocations the place in the layer and the lines that make them in the layer itself.
    """

    @staticmethod
    def forward(ctx: Any, x_1TD: Tensor, parameter: Tensor | None, kept: Kept, trained: dict[str, Tensor],
                made_by: Callable[[str, Frames], ContextManager[None]]) -> Tensor:
        held = []
        for num_bytes, module, frames in kept:
            with made_by(module, frames):
                held.append(torch.empty(num_bytes, dtype=torch.uint8))
        ctx.save_for_backward(x_1TD, *held)
        ctx.trained, ctx.made_by = trained, made_by
        with made_by("", first_line(decoder_layer)):
            return torch.empty_like(x_1TD)

    @staticmethod
    def backward(ctx: Any, dy_1TD: Tensor) -> tuple[Tensor | None, ...]:
        line = first_line(JointMatmul.backward)
        for name, parameter in ctx.trained.items():
            if parameter.grad is None:
                with ctx.made_by(f".{name}", line):
                    parameter.grad = torch.zeros_like(parameter)
        with ctx.made_by("", line):
            dx_1TD = torch.empty_like(dy_1TD) if ctx.needs_input_grad[0] else None
        return dx_1TD, None, None, None, None


def first_line(function: Any) -> Frames:
    return ((function.__code__, function.__code__.co_firstlineno),)
