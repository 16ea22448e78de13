"""Rehearses one of several decoder layers that are alike; the others take and keep as much memory as that one does.
Saves most of a rehearsal's time. `rehearse(all_layers=True)` is the plain reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.batches import StepBatch
from loop.memory.ledger import Ledger
from loop.memory.phases import Memory
from model.delta_rule import padded_positions
from model.matmul import JointMatmul
from model.stages import Stage, decoder_layer


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
        # bytes that a layer keeps beside its input and output, by the layer's kind and the lengths of the rows
        self.kept: dict[tuple[Any, tuple[int, ...]], int] = {}

    def begin(self, batch: StepBatch) -> None:
        """Chooses the microbatches of the next step that are run."""
        num = len(batch.microbatches)
        padded = max(range(num), key=lambda m: padded_positions(batch.microbatches[m].lengths), default=0)
        self.run_microbatches = {padded, num - 1} if self.is_alone else {0, 1, padded, num - 1}

    def __call__(self, number: int, x_1TD: Tensor, rotary: Any, segments: Any) -> Tensor:
        kind, keeps = self.kind[number], number not in self.stage.recomputed
        parameters = [p for p in self.stage.model.model.layers[number].parameters() if p.requires_grad]
        has_large_gradients = 4 * sum(p.numel() for p in parameters) > x_1TD.numel() * x_1TD.element_size()
        in_first = self.memory.microbatch == 0 and (has_large_gradients or not self.stage.is_last)
        shows_more = in_first or keeps and (kind, segments.lengths) not in self.kept
        if self.memory.microbatch in self.run_microbatches and (
                self.last[kind] == number or self.first[kind] == number and shows_more):
            before = self.ledger.current
            y_1TD = self.plain(number, x_1TD, rotary, segments)
            output_bytes = self.ledger.allocation_of(y_1TD).num_bytes
            self.kept[kind, segments.lengths] = self.ledger.current - before - output_bytes if keeps else 0
            return y_1TD
        # in a microbatch that is not run: as much as this kind keeps of the rows of which it keeps most
        known = [num_bytes for (of_kind, _), num_bytes in self.kept.items() if of_kind == kind]
        kept = self.kept.get((kind, segments.lengths), max(known, default=0))
        named = partial(self.ledger.pretending, f"model.layers.{number}")
        with named(decoder_layer):
            return StandIn.apply(x_1TD, parameters[0] if parameters else None, kept, parameters, named)


def kind_of_layer(stage: Stage, number: int) -> Any:
    """Layers that are alike have this in common, and no others."""
    layer = stage.model.model.layers[number]
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    halves = 2 * number >= stage.first, 2 * number + 1 < stage.stop, number in stage.recomputed
    no_gradient = number == 0 and number not in stage.recomputed  # its input needs no gradient, so that it keeps less
    return halves, no_gradient, tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)


class StandIn(torch.autograd.Function):
    """Takes and keeps the memory of a decoder layer, without what the layer needs only while it computes.

    `trained` is one of the parameters: with it as an input, the output needs a gradient even where x_1TD needs none.
    """

    @staticmethod
    def forward(ctx: Any, x_1TD: Tensor, trained: Tensor | None, kept_bytes: int, parameters: Any, named: Any) -> Tensor:
        ctx.save_for_backward(x_1TD, torch.empty(kept_bytes, dtype=torch.uint8))
        ctx.parameters, ctx.named = parameters, named
        return torch.empty_like(x_1TD)

    @staticmethod
    def backward(ctx: Any, dy_1TD: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.named(JointMatmul.backward):
            for parameter in ctx.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            dx_1TD = torch.empty_like(dy_1TD) if ctx.needs_input_grad[0] else None
        return dx_1TD, None, None, None, None
