"""Computes one step's microbatches one after another on one device, for training and for evaluation.
Costs the activations of one microbatch, and 4 bytes a trained parameter for its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from data.batches import Microbatch, StepBatch
from loop.memory.phases import Memory
from model.mixers import Segments
from model.stages import Stage


def forward_backward(stage: Stage, memory: Memory, batch: StepBatch) -> Tensor:
    """Adds the gradients of this rank's microbatches to the adapters.

    Returns:
        Loss [M] of each microbatch, on the device, divided by the supervised tokens of the whole step over all ranks.
        The sum over all microbatches of all ranks is the step's loss; gradients are divided and summed in the same way.
    """
    losses = []
    for number, microbatch in enumerate(batch.microbatches):
        with memory.during("forward", number):
            on_device, x_1TD = hidden_states(stage, microbatch)
        with memory.during("loss", number):
            loss = stage.losses(x_1TD, on_device.predict_N, on_device.labels_N).sum() / batch.num_supervised_tokens
            del x_1TD  # autograd keeps what the backward pass needs
        with memory.during("backward", number):
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses) if losses else torch.zeros(0, device=next(stage.parameters()).device)


@torch.no_grad()
def forward_only(stage: Stage, memory: Memory, batch: StepBatch) -> list[Tensor]:
    """Returns the loss of every supervised position, [N] for each microbatch."""
    stage.eval()
    losses = []
    for number, microbatch in enumerate(batch.microbatches):
        with memory.during("forward", number):
            on_device, x_1TD = hidden_states(stage, microbatch)
            losses.append(stage.losses(x_1TD, on_device.predict_N, on_device.labels_N))
    stage.train()
    return losses


def hidden_states(stage: Stage, microbatch: Microbatch) -> tuple[Microbatch, Tensor]:
    """Moves a microbatch to the device; returns the microbatch and its hidden states [1, T, D] after the last layer."""
    on_device = microbatch.to(next(stage.parameters()).device)
    segments = Segments(on_device.cu_seqlens_R1, on_device.lengths)
    return on_device, stage(on_device.ids_T[None], on_device.positions_T, segments)
