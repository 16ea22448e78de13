"""Replaces rows, messages and the other ranks while a step is rehearsed: by tensors with shapes and no values.
Costs some kilobytes a tensor, whatever its shape; and those of a model's modules, which are made once and copied."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterator
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.batches import Batches, Microbatch, StepBatch
from loop.distributed.groups import Ranks
from model import build


class Steps(Batches):
    """Gives the training loop the steps of a generator; has no rows."""

    def __init__(self, steps: Callable[[], Iterator[StepBatch]]) -> None:
        self.steps, self.steps_per_epoch = steps, 1

    def train_steps(self, done: int, total: int, seed: int) -> Iterator[StepBatch]:
        return self.steps()


class RehearsedRanks(Ranks):
    """This rank without the others: collectives return what they are given."""

    def all_reduce(self, tensor: Tensor, group: Any = None) -> Tensor:
        return tensor

    def concatenate_stages(self, values_P: Tensor) -> Tensor:
        return values_P


@contextmanager
def pretended_group(ranks: Ranks) -> Iterator[None]:
    """A process group without other processes, since torch's pipeline stages need a group."""
    dist.init_process_group("fake", rank=ranks.stage, world_size=ranks.num_stages, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class PendingMessage:
    """A message that is never sent. Keeps its tensor alive until `wait` is called, as messages of NCCL and gloo do."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def wait(self) -> None:
        self.tensor = None


@contextmanager
def nothing_sent() -> Iterator[None]:
    """While the context lasts, no message of a pipeline is sent: neither those of its schedule, nor the votes by which
    torch's stages agree, before the first schedule, to use the shapes that they are given."""
    with (patch.object(schedules, "_batch_p2p", lambda ops, desc=None: [PendingMessage(op.tensor) for op in ops]),
          patch.object(dist, "send", lambda *args, **kwargs: None),
          patch.object(dist, "recv", lambda tensor, *args, **kwargs: tensor.fill_(1))):  # 1 is a vote for these shapes
        yield


def fake(batch: StepBatch) -> StepBatch:
    """The same step with tensors that have no values; to be called inside FakeTensorMode."""
    def empty(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    return replace(batch, microbatches=[
        Microbatch(**{name: empty(value) for name, value in vars(m).items()}) for m in batch.microbatches])


@lru_cache(maxsize=1)
def kept_skeleton(model: Path, base: str) -> Any:
    return build.skeleton(model, base)


@contextmanager
def skeletons_kept(model: Path, base: str) -> Iterator[None]:
    """While the context lasts, this model's skeleton is a copy of one that is made once, since transformers takes a second to
    make it. To be entered outside FakeTensorMode."""
    kept = kept_skeleton(model, base)
    shared = [*kept.parameters(), *kept.buffers()]  # shapes, which a build replaces and never changes

    def copied(*_: Any) -> Any:
        return deepcopy(kept, {id(tensor): tensor for tensor in shared})

    with patch.object(build, "skeleton", copied):
        yield
