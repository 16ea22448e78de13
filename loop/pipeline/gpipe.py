"""forward_backward and forward_only over the stages of a pipeline, on torch.distributed.pipelining.
GPipe keeps the hidden states that enter a stage for all M microbatches, 1F1B for as many as there are stages.

    stage 0   F0 F1 F2 F3 .  .  B0 B1 B2 B3      gpipe: all forward, then all backward
    stage 1   .  F0 F1 F2 F3 B0 B1 B2 B3 .

    stage 0   F0 F1 .  B0 F2 B1 F3 B2 .  B3      1f1b: backward as soon as it can be
    stage 1   .  F0 B0 F1 B1 F2 B2 F3 B3 .

Under both, a stage is idle S - 1 of M + S - 1 turns (Huang et al. 2019, arXiv:1811.06965; Narayanan et al. 2019, PipeDream).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from data.batches import StepBatch
from loop import accumulate
from loop.distributed.groups import Ranks
from loop.memory.phases import Memory, peak_gib
from loop.metrics import RunLog
from loop.pipeline.timeline import Timeline, busy_and_idle, write
from model.mixers import Segments
from model.stages import Stage

META = torch.device("meta")
ForwardBackward = Callable[[StepBatch], Tensor]
ForwardOnly = Callable[[StepBatch], list[Tensor]]

# T tokens of the packed stream, D hidden size, N supervised positions, M microbatches, S stages


class Pipeline(nn.Module):
    """This rank's part of a pipeline. As a module it computes one microbatch, `number` of `batch`, on this rank's stage.

    Only hidden states and their gradients are sent. Every rank iterates the same batches, so that the number of a
    microbatch tells every stage which tokens, segments and labels belong to the hidden states.

    Args:
        schedule: gpipe | 1f1b.
        log: takes what each stage was busy with, at evaluations.
        memory: is told which phase of which microbatch is computed.
    """

    batch: StepBatch  # of the schedule that runs, or ran last

    def __init__(self, stage: Stage, ranks: Ranks, schedule: str, log: RunLog, memory: Memory) -> None:
        super().__init__()
        self.stage, self.ranks, self.schedule, self.log, self.memory = stage, ranks, schedule, log, memory
        self.on_gpu = ranks.device.type == "cuda"
        self.timeline = Timeline(ranks.device)
        self.number = 0
        self.losses: dict[int, Tensor] = {}  # of this batch, by microbatch, on the last stage
        self.kept: tuple[Any, Any] = (None, None)  # the newest schedule, after the shape that it was made for
        self.trained: StepBatch | None = None  # the last training step, until its timeline is written

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """As accumulate.forward_backward. Losses [M] on the last stage; on the others zeros, so that ranks can add."""
        self.trained = batch
        losses = self.run(batch, train=True)
        return torch.stack(losses) if losses else torch.zeros(len(batch.microbatches), device=self.ranks.device)

    @torch.no_grad()
    def forward_only(self, batch: StepBatch) -> list[Tensor]:
        """As accumulate.forward_only on the last stage; nothing on the others. The first call after a training step also
        records when each stage was busy in that step."""
        self.record_timeline()
        self.eval()
        losses = self.run(batch, train=False)
        self.train()
        return losses

    def run(self, batch: StepBatch, train: bool) -> list[Tensor]:
        """All microbatches through all stages; returns the losses by microbatch on the last stage, else none."""
        self.timeline.restart()
        if not batch.microbatches:  # this replica has no rows in this step
            return []
        self.batch, self.losses = batch, {}
        number_M = torch.arange(len(batch.microbatches))  # torch splits it, as first input and as target; nobody reads it
        schedule = self.schedule_for(batch.length, len(batch.microbatches), train)
        with self.ranks.watch.ends_when_peers_are_gone(), self.memory.during("communicate"):
            self.computes()
            if not self.on_gpu:  # before its first step torch's schedule lets all stages vote
                self.ranks.watch.begin(lambda: f"the other stages to begin step {batch.step}")
            try:
                inputs = (number_M,) if self.stage.is_first else ()
                schedule.step(*inputs, target=number_M if train else None, return_outputs=False)
            except RuntimeError as error:
                self.kept = (None, None)  # with the activations that it holds
                if error.__cause__ is not None:  # what a stage raised, such as out-of-memory
                    raise error.__cause__ from None
                raise
            self.computes()
            self.ranks.wait_for_device()  # costs nothing, since the losses are read next
            self.ranks.watch.done()
        losses, self.losses = self.losses, {}
        return [loss for _, loss in sorted(losses.items())]

    def schedule_for(self, length: int, num_microbatches: int, train: bool) -> Any:
        """A schedule for this shape, since its stage's buffers fix T and M. Only the newest schedule is kept."""
        shape = (length, num_microbatches, train)
        if self.kept[0] != shape:
            self.kept = (None, None)  # frees the buffers of the old schedule before the new one makes its own
            # with fewer microbatches than stages, 1F1B keeps as much as GPipe
            one_by_one = self.schedule == "1f1b" and train and num_microbatches >= self.ranks.num_stages
            self.kept = (shape, (Schedule1F1B if one_by_one else ScheduleGPipe)(
                WatchedStage(self, length), num_microbatches,
                loss_fn=(lambda loss, _: loss) if train else None, scale_grads=False,  # the loss is already normalized
            ))
        return self.kept[1]

    def forward(self, x_1TD: Tensor) -> Tensor:
        """Takes hidden states [1, T, D] of the stage before, on the first stage anything; returns hidden states [1, T, D],
        on the last stage the loss []."""
        microbatch = self.batch.microbatches[self.number].to(self.ranks.device)
        segments = Segments(microbatch.cu_seqlens_R1, microbatch.lengths)
        with self.memory.during("forward", self.number):
            y_1TD = self.stage(microbatch.ids_T[None] if self.stage.is_first else x_1TD, microbatch.positions_T, segments)
        if not self.stage.is_last:
            # the output of a first stage without adapters needs no gradient, but torch's schedule sends one to every stage
            return y_1TD if y_1TD.requires_grad or not self.training else y_1TD.requires_grad_()
        with self.memory.during("loss", self.number):
            losses_N = self.stage.losses(y_1TD, microbatch.predict_N, microbatch.labels_N)
            loss = losses_N.sum() / self.batch.num_supervised_tokens
        self.losses[self.number] = loss.detach() if self.training else losses_N
        return loss

    def computes(self) -> None:
        """Tells the watch that no message is awaited now. On a GPU one may still be: there messages are only queued, and this
        process goes on until it reads a number from the device, so that the watch stays armed and counts from now."""
        if self.on_gpu:
            self.ranks.watch.begin(self.device_waits_for, queued=True)
        else:
            self.ranks.watch.done()

    def device_waits_for(self) -> str:
        mark = self.timeline.not_begun()
        if mark is None:
            return f"its own GPU, step {self.batch.step}"
        return self.waits_for(mark.microbatch, "gradient" if mark.is_backward else "output", sends=False)

    def waits_for(self, microbatch: int, what: str, sends: bool) -> str:
        """Which neighbour this stage waits for: to take (`sends`) or to send the output or gradient of a microbatch."""
        ahead = 1 if (what == "gradient") != sends else -1
        peer = f"stage {self.ranks.stage + ahead} (rank {self.ranks.rank + ahead})"
        return f"{peer} to {'take' if sends else 'send'} the {what} of microbatch {microbatch} in step {self.batch.step}"

    def record_timeline(self) -> None:
        """Logs each stage's busy and idle seconds in the last training step and its peak memory so far, for the first
        replica, and writes timeline.json for `python -m loop.pipeline.timeline`. All ranks call this together."""
        batch, self.trained = self.trained, None
        if batch is None or not batch.microbatches:
            return
        num_stages = self.ranks.num_stages
        own_SM22 = self.timeline.seconds(self.ranks.stage, num_stages, len(batch.microbatches))
        times_SM22 = self.ranks.sum_stages(own_SM22.to(self.ranks.device)).cpu()
        peak_S = torch.zeros(num_stages, dtype=torch.float64, device=self.ranks.device)
        peak_S[self.ranks.stage] = peak_gib(self.ranks.device)
        peaks = self.ranks.sum_stages(peak_S).tolist()
        if self.log.enabled:
            write(self.log.run_dir / "timeline.json", batch.step, self.schedule, times_SM22)
            busy_s, idle_s = busy_and_idle(times_SM22)
            self.log.record({"step": batch.step, "stage_busy_s": busy_s, "stage_idle_s": idle_s, "stage_peak_gib": peaks})


def passes(stage: Stage, ranks: Ranks, schedule: str, log: RunLog, memory: Memory) -> tuple[ForwardBackward, ForwardOnly]:
    """forward_backward and forward_only of this rank: with the other stages, or alone where one stage is the whole model."""
    if ranks.num_stages == 1:
        return partial(accumulate.forward_backward, stage, memory), partial(accumulate.forward_only, stage, memory)
    pipeline = Pipeline(stage, ranks, schedule, log, memory)
    return pipeline.forward_backward, pipeline.forward_only


class WatchedStage(PipelineStage):
    """torch's stage for given shapes; tells the watch what it waits for and the timeline when it computes.

    torch's stage makes the buffers for all M microbatches before the first one. It keeps them, and the gradients of what
    was received, until the next step. Here a buffer is made just before its message is received, and is freed together
    with the activations of its microbatch. For the 35B with 17 microbatches, this saves 0.5 to 1 GiB a stage.
    """

    def __init__(self, pipeline: Pipeline, length: int) -> None:
        stage, ranks, config = pipeline.stage, pipeline.ranks, pipeline.stage.model.config
        size, dtype = config.hidden_size, config.dtype  # not model.dtype, which is the dtype of the first parameter
        hidden_1TD = torch.empty(1, length, size, dtype=dtype, device=META, requires_grad=pipeline.training)
        loss = torch.empty((), device=META, requires_grad=pipeline.training)
        super().__init__(
            pipeline, ranks.stage, ranks.num_stages, ranks.device, group=ranks.replica_group,
            input_args=torch.empty(1, dtype=torch.int64, device=META) if stage.is_first else hidden_1TD,
            output_args=loss if stage.is_last else hidden_1TD,
        )
        self.pipeline = pipeline

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self.without_memory(super()._prepare_forward_infra, *args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self.without_memory(super()._prepare_backward_infra, *args, **kwargs)

    def without_memory(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `prepare`; the buffers that torch makes in it are on the meta device."""
        device, self.device = self.device, META
        prepared = prepare(*args, **kwargs)
        self.device = device
        return prepared

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.pipeline.computes()
        self.pipeline.number = fwd_chunk_id
        with self.pipeline.timeline.computing(fwd_chunk_id, is_backward=False):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        move_buffers(self.args_recv_info[fwd_chunk_id], META)  # autograd holds the input, if the backward pass needs it
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        if self.has_backward:  # not in an evaluation, where torch's GPipe calls this all the same
            self.pipeline.computes()
            with (self.pipeline.timeline.computing(bwd_chunk_id, is_backward=True),
                  self.pipeline.memory.during("backward", bwd_chunk_id)):
                super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
            move_buffers(self.grad_recv_info[bwd_chunk_id], META)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        move_buffers(self.args_recv_info[fwd_chunk_id], self.device)
        return self.noted(super().get_fwd_recv_ops(fwd_chunk_id), fwd_chunk_id, "output", sends=False)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        return self.noted(super().get_fwd_send_ops(fwd_chunk_id), fwd_chunk_id, "output", sends=True)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        if self.has_backward:
            move_buffers(self.grad_recv_info[bwd_chunk_id], self.device)
        return self.noted(super().get_bwd_recv_ops(bwd_chunk_id), bwd_chunk_id, "gradient", sends=False)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        return self.noted(super().get_bwd_send_ops(bwd_chunk_id), bwd_chunk_id, "gradient", sends=True)

    def noted(self, ops: list[Any], microbatch: int, what: str, sends: bool) -> list[Any]:
        if ops and not self.pipeline.on_gpu:  # a GPU's messages are queued, and `computes` has armed the watch
            self.pipeline.ranks.watch.begin(partial(self.pipeline.waits_for, microbatch, what, sends))
        return ops


def move_buffers(recv_infos: Any, device: torch.device) -> None:
    """Replaces the buffers that messages are received into by empty buffers on `device`."""
    for info in recv_infos:
        buffer = getattr(info, "buffer", None)  # a first stage receives nothing
        if buffer is not None and buffer.device != device:
            info.buffer = torch.empty_like(buffer, device=device).requires_grad_(buffer.requires_grad)
