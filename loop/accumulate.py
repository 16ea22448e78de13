"""forward_backward on one device: a plain loop over the step's microbatches. Its twin for evaluation has no backward.
Gradients add up in the adapters' float32 `.grad`; activations of one microbatch live at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from data.batches import Microbatch, StepBatch
from loop.memory import Memory
from model.mixers import Segments
from model.stages import Stage


def forward_backward(stage: Stage, memory: Memory, batch: StepBatch) -> Tensor:
    """Adds the gradients of this rank's microbatches to the adapters.

    Returns:
        Loss [M] of each microbatch, already divided by the supervised tokens of the whole step over all ranks: the
        step's loss is their sum, and so are the gradients. On the device; reading it waits for the device.
    """
    losses = []
    for number, microbatch in enumerate(batch.microbatches):
        with memory.during("forward", number):
            on_device, x_1TD = hidden_states(stage, microbatch)
        with memory.during("loss", number):
            loss = stage.losses(x_1TD, on_device.predict_N, on_device.labels_N).sum() / batch.num_supervised_tokens
            del x_1TD  # what the backward pass needs of it is kept there
        with memory.during("backward", number):
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses) if losses else torch.zeros(0, device=next(stage.parameters()).device)


@torch.no_grad()
def forward_only(stage: Stage, batch: StepBatch) -> list[Tensor]:
    """Loss of every supervised position, [N] a microbatch."""
    stage.eval()
    losses = []
    for microbatch in batch.microbatches:
        on_device, x_1TD = hidden_states(stage, microbatch)
        losses.append(stage.losses(x_1TD, on_device.predict_N, on_device.labels_N))
    stage.train()
    return losses


def hidden_states(stage: Stage, microbatch: Microbatch) -> tuple[Microbatch, Tensor]:
    """The microbatch on the stage's device, and what a stage that holds the whole model makes of it: [1, T, D]."""
    on_device = microbatch.to(next(stage.parameters()).device)
    segments = Segments(on_device.cu_seqlens_R1, on_device.lengths)
    return on_device, stage(on_device.ids_T[None], on_device.positions_T, segments)
