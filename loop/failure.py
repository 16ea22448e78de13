"""A rank's moment without memory: where it was, what asked for how much, for which rows, and what held the rest.
All of it is read after the failure, off the frames that the error went through; nothing was noted for it before."""

from __future__ import annotations

import gc
import re
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import Any, Iterable

import torch
from torch import Tensor, nn

from data.batches import Microbatch, StepBatch
from loop.evaluate import evaluate
from loop.ledger import describe_frame, kind_of
from loop.memory import Memory, optimizer_tensors, weight_tensors
from loop.peak import Peak
from model.stages import Stage

WALKED = ("weights", "adapters", "gradients", "optimizer")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
SAID = {  # by torch's allocators for CUDA and CPU, and by numpy
    "asked": rf"(?:tried|Tried|Unable) to allocate {SIZE}",
    "card": rf"total capacity of {SIZE}",
    "free": rf"of which {SIZE} is free",
    "allocated": rf"{SIZE} is allocated by PyTorch",
    "reserved beyond that": rf"{SIZE} is reserved by PyTorch but unallocated",
}
WHILE = {"build": "building the model", "load": "loading the weights", "eval": "in the evaluation"}
OWNERS = ("self", "module", "layer", "base", "linear", "experts")  # what code of model/ calls a module it works for


@dataclass(frozen=True)
class Failure:
    """One rank's moment without memory."""

    rank: int
    phase: str
    microbatch: int | None
    batch: StepBatch | None
    evaluating: bool
    module: str
    line: str  # of this project, innermost
    said: dict[str, int]  # bytes that the error itself speaks of (see SAID)
    held: dict[str, int]  # bytes by category

    @property
    def moment(self) -> str:
        """Such as "in the backward of microbatch 3 of step 12"."""
        if self.batch is None:
            return WHILE.get(self.phase, "between phases")
        inside = self.phase if self.phase != "eval" else ""
        number = f"microbatch {self.microbatch}" if self.microbatch is not None else ""
        whole = "the evaluation" if self.evaluating else f"step {self.batch.step}"
        return f"in {'the ' if inside else ''}{' of '.join(filter(None, (inside, number, whole)))}"

    @property
    def rows(self) -> Microbatch | None:
        """The microbatch it happened in."""
        return None if self.batch is None or self.microbatch is None else self.batch.microbatches[self.microbatch]


def find(error: BaseException, memory: Memory, rank: int) -> Failure:
    """Reads it off the frames that the error went through; nothing was noted before."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)][::-1]  # innermost first
    stage = first_local(frames, "stage", Stage)
    model = memory.model if memory.adapters or stage is None else stage.model  # not attached yet while it loads
    batch = first_local(frames, "batch", StepBatch)
    microbatch = memory.microbatch
    if batch is not None and microbatch is None:
        current = first_local(frames, "microbatch", Microbatch)
        microbatch = next((number for number, m in enumerate(batch.microbatches) if m is current), None)
        if microbatch is None:  # of a pipeline that evaluates, where torch counts
            microbatch = first_local(frames, "fwd_chunk_id", int)
    line = next((describe_frame((frame.f_code, line)) for frame, line in frames if kind_of(frame.f_code) == "project"), "")
    said = what_it_said(str(error))
    return Failure(
        rank=rank, phase=memory.phase, microbatch=microbatch, batch=batch,
        evaluating=any(frame.f_code is evaluate.__code__ for frame, _ in frames),
        module=module_in(frames, model), line=line, said=said, held=held_now(memory, model, said.get("allocated")),
    )


def first_local(frames: list[tuple[FrameType, int]], name: str, kind: type) -> Any:
    """The innermost local variable of that name and type."""
    values = (frame.f_locals.get(name) for frame, _ in frames)
    return next((value for value in values if isinstance(value, kind)), None)


def module_in(frames: list[tuple[FrameType, int]], model: nn.Module) -> str:
    """The name of the innermost module at work, or whose backward function of this project was."""
    names = {id(module): name for name, module in model.named_modules()}
    for frame, _ in frames:
        local = frame.f_locals
        ctx = local.get("ctx")
        owners = [local.get(name) for name in OWNERS] + [getattr(ctx, name, None) for name in OWNERS[3:]]
        found = next((names[id(owner)] for owner in owners if names.get(id(owner))), "")
        if found:
            return found
    return ""


def what_it_said(text: str) -> dict[str, int]:
    """Bytes that an allocator's message names, as far as it does."""
    found = {name: re.search(pattern, text) for name, pattern in SAID.items()}
    return {name: int(float(match[1].rstrip(".")) * UNITS[match[2]]) for name, match in found.items() if match}


def held_now(memory: Memory, model: nn.Module, allocated: int | None) -> dict[str, int]:
    """Bytes by category: where a ledger was kept, when it was fullest; else by walking, and on CUDA the rest in one."""
    if memory.ledger is not None:
        memory.ledger.tag("gradients", [p.grad for p in memory.adapters if p.grad is not None])
        return Peak.of(memory.ledger, 0, memory.ledger.clock).held
    walked: tuple[list[Any], ...] = (
        weight_tensors(model), memory.adapters, [p.grad for p in memory.adapters],
        optimizer_tensors(memory.optimizer))
    held = {name: num_bytes(tensors, memory.device) for name, tensors in zip(WALKED, walked)}
    if memory.device.type == "cuda":
        # by now the failed function's own tensors may be gone: the error's number is from before
        total = torch.cuda.memory_allocated(memory.device) if allocated is None else allocated
        held["the rest"] = max(total - sum(held.values()), 0)
    return held


def num_bytes(tensors: Iterable[Tensor | None], device: torch.device) -> int:
    """Of the storages on a device, each once."""
    storages = [t.untyped_storage() for t in tensors if t is not None and t.device.type == device.type]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def let_go(error: BaseException, memory: Memory) -> None:
    """Frees the step: what the frames of the error hold, and of those that it came from, gradients, and the cache."""
    for part in related(error, []):
        traceback.clear_frames(part.__traceback__)
        for frame, _ in traceback.walk_tb(part.__traceback__):
            frame.f_locals  # reading it brought a copy about, which keeps the variables until it is read again
    for parameter in memory.adapters:
        parameter.grad = None
    gc.collect()
    if memory.device.type == "cuda":
        torch.cuda.empty_cache()


def related(error: BaseException | None, found: list[BaseException]) -> list[BaseException]:
    """An error and those it came from, which may be in a circle: torch's schedules wrap what loop/gpipe.py unwraps."""
    if error is not None and not any(error is known for known in found):
        found.append(error)
        related(error.__cause__, found)
        related(error.__context__, found)
    return found
