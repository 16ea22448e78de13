"""Reads after an out-of-memory error where a rank was: phase, module, line, bytes asked for, and what held the rest.
Costs nothing before the error; afterwards one pass over the error's frames and the model's tensors."""

from __future__ import annotations

import gc
import re
import traceback
from dataclasses import dataclass

import torch

from data.batches import Microbatch, StepBatch
from loop.memory.ledger import LASTING, describe_frame, whose
from loop.memory.peak import Peak
from loop.memory.phases import Memory
from model.matmul import Part

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}
SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
SAID = {  # by torch's allocators for CUDA and CPU, and by numpy
    "asked": rf"(?:tried|Tried|Unable) to allocate {SIZE}",
    "card": rf"total capacity of {SIZE}",
    "free": rf"of which {SIZE} is free",
    "allocated": rf"{SIZE} is allocated by PyTorch",
    "reserved beyond that": rf"{SIZE} is reserved by PyTorch but unallocated",
}
WHILE = {"build": "building the model", "load": "loading the weights", "eval": "in the evaluation"}


@dataclass(frozen=True)
class Failure:
    """The moment at which one rank's memory ran out."""

    rank: int
    phase: str
    microbatch: int | None
    batch: StepBatch | None
    module: str
    line: str  # the innermost of this project
    said: dict[str, int]  # bytes that the error's message names, by the keys of SAID
    held: dict[str, int]  # bytes by category

    @property
    def evaluating(self) -> bool:
        return self.phase == "eval"

    @property
    def moment(self) -> str:
        """Such as "in the backward of microbatch 3 of step 12"."""
        if self.batch is None:
            return WHILE.get(self.phase, "between phases")
        phase = f"the {self.phase}" if self.phase and not self.evaluating else ""
        number = f"microbatch {self.microbatch}" if self.microbatch is not None else ""
        whole = "the evaluation" if self.evaluating else f"step {self.batch.step}"
        return "in " + " of ".join(filter(None, (phase, number, whole)))

    @property
    def rows(self) -> Microbatch | None:
        """The microbatch in work."""
        return None if self.batch is None or self.microbatch is None else self.batch.microbatches[self.microbatch]


def read_failure(error: BaseException, memory: Memory, rank: int) -> Failure:
    """Takes the phase from `memory`, the module and the line from the frames of the error, and sizes from the message."""
    module = line = ""
    names = {id(module): name for name, module in memory.model.named_modules() if name}
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):  # innermost first
        if not line and whose(frame.f_code) == "project":
            line = describe_frame((frame.f_code, number))
        values = list(frame.f_locals.values())
        for value in frame.f_locals.values():  # the context of a backward function keeps the modules of its forward
            values += vars(value).values() if isinstance(value, torch.autograd.function.FunctionCtx) else ()
        for value in list(values):
            values += [part.base for part in value if isinstance(part, Part)] if isinstance(value, tuple) else ()
        # where a frame has both a layer and one of the layer's modules, the longer name is the more exact
        module = module or max((names[id(value)] for value in values if id(value) in names), key=len, default="")
    said = sizes_in(str(error))
    return Failure(rank, memory.phase, memory.microbatch, memory.batch, module, line, said,
                   held_now(memory, said.get("allocated")))


def sizes_in(text: str) -> dict[str, int]:
    """The bytes that an allocator's message names, by the keys of SAID."""
    found = {name: re.search(pattern, text) for name, pattern in SAID.items()}
    return {name: int(float(match[1].rstrip(".")) * UNITS[match[2]]) for name, match in found.items() if match}


def held_now(memory: Memory, allocated: int | None) -> dict[str, int]:
    """Bytes by category. A ledger tells what was held at its peak. Without one the LASTING categories are measured now;
    on CUDA the difference to `allocated` is "the rest"."""
    if memory.ledger is not None:
        memory.ledger.tag("gradients", memory.tensors("gradients"))
        return Peak.of(memory.ledger, 0, memory.ledger.clock).held
    held = {}
    for category in LASTING:
        storages = [t.untyped_storage() for t in memory.tensors(category) if t.device.type == memory.device.type]
        held[category] = sum({storage._cdata: storage.nbytes() for storage in storages}.values())  # a shared one counts once
    if memory.device.type == "cuda":
        # the message's number is from before the failed function freed its own tensors
        total = torch.cuda.memory_allocated(memory.device) if allocated is None else allocated
        held["the rest"] = max(total - sum(held.values()), 0)
    return held


def free_step(error: BaseException, memory: Memory) -> None:
    """Frees the variables in the frames of the error and of its causes, the gradients, and CUDA's cache."""
    errors, waiting = list[BaseException](), [error]
    while waiting:  # causes may form a circle: torch's schedules wrap an error that loop/pipeline/gpipe.py unwraps
        current = waiting.pop()
        if any(current is known for known in errors):
            continue
        errors.append(current)
        waiting += [other for other in (current.__cause__, current.__context__) if other is not None]
        traceback.clear_frames(current.__traceback__)
        for frame, _ in traceback.walk_tb(current.__traceback__):
            frame.f_locals  # `read_failure` made Python copy the variables; this second read empties the copy
    for parameter in memory.adapters:
        parameter.grad = None
    gc.collect()
    if memory.device.type == "cuda":
        torch.cuda.empty_cache()
