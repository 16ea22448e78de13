"""forward_backward over the stages of a pipeline, on torch.distributed.pipelining; its twin for evaluation.
GPipe keeps the boundaries of all M microbatches, 1F1B of as many as there are stages.

    stage 0   F0 F1 F2 F3 .  .  B0 B1 B2 B3      gpipe: all forward, then all backward
    stage 1   .  F0 F1 F2 F3 B0 B1 B2 B3 .

    stage 0   F0 F1 .  B0 F2 B1 F3 B2 .  B3      1f1b: backward as soon as it can be
    stage 1   .  F0 B0 F1 B1 F2 B2 F3 B3 .

Either idles S - 1 of M + S - 1 turns (Huang et al. 2019, arXiv:1811.06965; Narayanan et al. 2019, PipeDream).
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B, ScheduleLoopedBFS

from data.batches import StepBatch
from loop.memory import Memory, peak_gib
from loop.ranks import Ranks
from loop.timeline import Timeline, busy_and_idle, write
from model.mixers import Segments
from model.stages import Stage

# T tokens of the packed stream, D hidden size, N supervised positions, M microbatches, S stages


class Pipeline:
    """This rank's part of a pipeline.

    Hidden states and their gradients travel, nothing else: every rank iterates the same batches, so that a
    microbatch's number stands for its tokens, segments and labels.

    Args:
        stages: what this rank holds: one stage. In a world of one: all of them, in order, to try a split on one device
            (`forward_backward` alone: torch's schedules for that know no evaluation).
        schedule: gpipe | 1f1b.
        memory: is told which phase of which microbatch is computed.
    """

    def __init__(self, stages: list[Stage], ranks: Ranks, schedule: str, memory: Memory) -> None:
        self.parts = [Part(stage, ranks.device, memory) for stage in stages]
        self.ranks, self.schedule, self.memory = ranks, schedule, memory
        self.num_stages = ranks.num_stages * len(stages)
        self.timeline = Timeline(ranks.device)
        self.kept: tuple[Any, Any] = (None, None)  # what the newest schedule was made for, and the schedule
        self.batch: StepBatch | None = None  # of the last training step

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """As accumulate.forward_backward. Losses [M] on the last stage; on the others zeros, so that ranks can add."""
        self.batch = batch
        losses = self.run(batch, train=True)
        return torch.stack(losses) if losses else torch.zeros(len(batch.microbatches), device=self.ranks.device)

    @torch.no_grad()
    def forward_only(self, batch: StepBatch) -> list[Tensor]:
        """As accumulate.forward_only on the last stage; nothing on the others."""
        assert len(self.parts) == 1
        for part in self.parts:
            part.eval()
        losses = self.run(batch, train=False)
        for part in self.parts:
            part.train()
        return losses

    def run(self, batch: StepBatch, train: bool) -> list[Tensor]:
        """All microbatches through all stages; losses by microbatch where the last stage is, else none."""
        self.timeline.restart()
        if not batch.microbatches:  # none of this step's fell to this replica
            return []
        for part in self.parts:
            part.batch, part.losses = batch, {}
        number_M = torch.arange(len(batch.microbatches))  # what torch splits: as first input, and as target; never read
        schedule = self.schedule_for(batch.length, len(batch.microbatches), train)
        with self.ranks.watch.ends_when_peers_are_gone(), self.memory.during("communicate"):
            try:
                inputs = (number_M,) if self.parts[0].stage.is_first else ()
                schedule.step(*inputs, target=number_M if train else None, return_outputs=False)
            except RuntimeError as error:
                self.kept = (None, None)  # with the activations that it holds
                if error.__cause__ is not None:  # what a stage raised, such as out-of-memory
                    raise error.__cause__ from None
                raise
            self.wait_for_device()
        return [loss for _, loss in sorted(self.parts[-1].losses.items())]

    def schedule_for(self, length: int, num_microbatches: int, train: bool) -> Any:
        """A schedule for this shape; its stages' buffers fix T and M. Only the newest is kept."""
        key = (length, num_microbatches, train)
        if self.kept[0] != key:
            self.kept = (None, None)  # frees its buffers before the next one's are there
            self.kept = (key, self.make_schedule(length, num_microbatches, train))
        return self.kept[1]

    def make_schedule(self, length: int, num_microbatches: int, train: bool) -> Any:
        stages: list[Any] = [
            WatchedStage(part, self.ranks.stage + i * self.ranks.num_stages, self.num_stages, length, self)
            for i, part in enumerate(self.parts)
        ]
        one_by_one = self.schedule == "1f1b" and train
        # the loss is already normalized; fewer microbatches than stages leave nothing for 1F1B to gain
        settings: dict[str, Any] = {"loss_fn": (lambda loss, _: loss) if train else None, "scale_grads": False}
        if len(stages) > 1:
            return (ScheduleInterleaved1F1B if one_by_one else ScheduleLoopedBFS)(stages, num_microbatches, **settings)
        one_by_one = one_by_one and num_microbatches >= self.num_stages
        return (Schedule1F1B if one_by_one else ScheduleGPipe)(stages[0], num_microbatches, **settings)

    def wait_for_device(self) -> None:
        """Once a step, as its losses are read next anyway: what a GPU waits for is seen here, not when it is issued."""
        if self.ranks.device.type == "cuda":
            self.ranks.watch.begin(self.describe_device)
        self.ranks.wait_for_device()
        self.ranks.watch.done()

    def describe_device(self) -> str:
        mark = self.timeline.not_begun()
        if mark is None:
            return f"its own GPU, step {self.step}"
        return self.describe(mark.stage, mark.microbatch, "gradient" if mark.is_backward else "output", sends=False)

    def describe(self, stage: int, microbatch: int, what: str, sends: bool) -> str:
        """What `stage` waits for: that its neighbour sends it, or takes, a microbatch's output or gradient."""
        peer = stage + (1 if (what == "gradient") != sends else -1)
        rank = self.ranks.replica * self.ranks.num_stages + peer % self.ranks.num_stages
        verb = "take" if sends else "send"
        return f"stage {peer} (rank {rank}) to {verb} the {what} of microbatch {microbatch} in step {self.step}"

    @property
    def step(self) -> int:
        batch = self.parts[0].batch
        return batch.step if batch else 0

    def timings(self, run_dir: Path) -> dict[str, Any]:
        """Each stage's busy and idle seconds in the last training step, and its peak memory so far, in the first replica;
        all ranks ask together.

        The whole timeline goes to timeline.json, for `python -m loop.timeline`.
        """
        if self.batch is None or not self.batch.microbatches:
            return {}
        times_SM22 = self.timeline.seconds(self.num_stages, len(self.batch.microbatches))
        times_SM22 = self.ranks.sum_stages(times_SM22.to(self.ranks.device)).cpu()
        if self.ranks.is_main:
            write(run_dir / "timeline.json", self.batch.step, self.schedule, times_SM22)
        busy_s, idle_s = busy_and_idle(times_SM22)
        peak_S = torch.zeros(self.num_stages, dtype=torch.float64, device=self.ranks.device)
        peak_S[self.ranks.stage :: self.ranks.num_stages] = peak_gib(self.ranks.device)
        return {"stage_busy_s": busy_s, "stage_idle_s": idle_s, "stage_peak_gib": self.ranks.sum_stages(peak_S).tolist()}


class Part(nn.Module):
    """A stage that computes the microbatch of which it is told the number."""

    def __init__(self, stage: Stage, device: torch.device, memory: Memory) -> None:
        super().__init__()
        self.stage, self.device, self.memory = stage, device, memory
        self.batch: StepBatch | None = None
        self.number = 0
        self.losses: dict[int, Tensor] = {}

    def forward(self, x_1TD: Tensor) -> Tensor:
        """Hidden states [1, T, D] from the stage before (the first stage needs none); on to the next, or the loss []."""
        assert self.batch is not None
        microbatch = self.batch.microbatches[self.number].to(self.device)
        segments = Segments(microbatch.cu_seqlens_R1, microbatch.lengths)
        x = microbatch.ids_T[None] if self.stage.is_first else x_1TD
        with self.memory.during("forward", self.number):
            y_1TD = self.stage(x, microbatch.positions_T, segments)
        if not self.stage.is_last:
            # a first stage without adapters: its gradient goes nowhere, and is sent all the same
            return y_1TD if y_1TD.requires_grad or not self.training else y_1TD.requires_grad_()
        with self.memory.during("loss", self.number):
            losses_N = self.stage.losses(y_1TD, microbatch.predict_N, microbatch.labels_N)
            loss = losses_N.sum() / self.batch.num_supervised_tokens
        self.losses[self.number] = loss.detach() if self.training else losses_N
        return loss


class WatchedStage(PipelineStage):
    """torch's stage with its shapes given, none inferred; notes what it waits for and when it computes.

    torch's own makes buffers for what all M microbatches will receive before the first one, and keeps them, and the
    gradients of what was received, until the next step. Here a buffer is made when its message is due, and goes with
    the activations of its microbatch: at 17 microbatches of the 35B that is 0.5 to 1 GiB a stage.
    """

    def __init__(self, part: Part, number: int, num_stages: int, length: int, pipeline: Pipeline) -> None:
        config = part.stage.model.config  # its dtype: the model's own is that of whatever parameter comes first
        size, dtype = config.hidden_size, config.dtype
        hidden_1TD = torch.empty(1, length, size, dtype=dtype, device="meta", requires_grad=part.training)
        loss = torch.empty((), device="meta", requires_grad=part.training)
        super().__init__(
            part, number, num_stages, pipeline.ranks.device, group=pipeline.ranks.replica_group,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if part.stage.is_first else hidden_1TD,
            output_args=loss if part.stage.is_last else hidden_1TD,
        )
        self.part, self.pipeline = part, pipeline

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self.without_memory():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self.without_memory():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def without_memory(self) -> Iterator[None]:
        """Buffers that torch makes inside take none."""
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.pipeline.ranks.watch.done()
        self.part.number = fwd_chunk_id
        with self.pipeline.timeline.computing(self.stage_index, fwd_chunk_id, is_backward=False):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        move_buffers(self.args_recv_info[fwd_chunk_id], torch.device("meta"))  # whoever needs the input has it
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        if self.has_backward:
            self.pipeline.ranks.watch.done()
            with (self.pipeline.timeline.computing(self.stage_index, bwd_chunk_id, is_backward=True),
                  self.pipeline.memory.during("backward", bwd_chunk_id)):
                super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
            move_buffers(self.grad_recv_info[bwd_chunk_id], torch.device("meta"))

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        move_buffers(self.args_recv_info[fwd_chunk_id], self.device)
        return self.noted(super().get_fwd_recv_ops(fwd_chunk_id), fwd_chunk_id, "output", sends=False)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        return self.noted(super().get_fwd_send_ops(fwd_chunk_id), fwd_chunk_id, "output", sends=True)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        if self.has_backward and not self.is_last:
            move_buffers(self.grad_recv_info[bwd_chunk_id], self.device)
        return self.noted(super().get_bwd_recv_ops(bwd_chunk_id), bwd_chunk_id, "gradient", sends=False)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        return self.noted(super().get_bwd_send_ops(bwd_chunk_id), bwd_chunk_id, "gradient", sends=True)

    def noted(self, ops: list[Any], microbatch: int, what: str, sends: bool) -> list[Any]:
        if ops:
            self.pipeline.ranks.watch.begin(partial(self.pipeline.describe, self.stage_index, microbatch, what, sends))
        return ops


def move_buffers(recv_infos: Any, device: torch.device) -> None:
    """Puts empty buffers on `device` in the place of the ones that messages are received into."""
    for info in recv_infos:
        buffer = getattr(info, "buffer", None)  # a first stage receives nothing
        if buffer is not None and buffer.device != device:
            info.buffer = torch.empty_like(buffer, device=device).requires_grad_(buffer.requires_grad)
