"""Where memory is and was: named phases of every step, what tensors held at most, and what they held it for.
Asks the allocator's own counters, which no device waits for; on the CPU, the operating system's."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import contextmanager
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor, nn

from data.batches import StepBatch
from loop.ledger import Ledger
from loop.peak import Peak

GIB = 2**30
PHASES = ("build", "load", "communicate", "forward", "loss", "backward", "sync", "step", "eval")
STEP_PHASES = PHASES[2:-1]
PAGE = os.sysconf("SC_PAGE_SIZE")
HIGHEST: dict[torch.device, int] = {}  # bytes at most, before the allocator's own peak was last set back


def peak_gib(device: torch.device) -> float:
    """On CUDA the most that tensors ever held; on the CPU the process's peak resident size."""
    if device.type == "cuda":
        return max(HIGHEST.get(device, 0), torch.cuda.max_memory_allocated(device)) / GIB
    return peak_resident() / GIB


def peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """Bytes of this process in memory; where the system does not say, the most there ever were."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:
        return peak_resident()


class Memory:
    """What one rank's memory was in each phase: at its end, and at most. `step` measures what tensors hold.

    On CUDA the allocator counts that, always. On the CPU nothing does, so a ledger is kept in the steps that may take
    the most: in the first two, and in those larger than all before.

    Args:
        device: this rank's.
        ledger: one that is kept all the time, for a rehearsal.
    """

    def __init__(self, device: torch.device, ledger: Ledger | None = None) -> None:
        self.device, self.ledger = device, ledger
        self.phase = ""
        self.microbatch: int | None = None
        self.seen: dict[str, tuple[int, int]] = {}  # of this step, by phase: bytes at its end, bytes at most
        self.most_bytes = 0  # that tensors held in any step
        self.measured: Peak | None = None  # the same on the CPU, and what it was held for
        self.model: nn.Module = nn.Module()
        self.adapters: list[nn.Parameter] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.largest: list[tuple[int, ...]] = []
        self.num_steps = 0

    def attach(self, model: nn.Module, adapters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """What is known by name when memory is full."""
        self.model, self.adapters, self.optimizer = model, list(adapters), optimizer

    # Phases

    @contextmanager
    def during(self, phase: str, microbatch: int | None = None) -> Iterator[None]:
        """Names what happens inside. After an error the name stays, for the report."""
        outside = self.phase, self.microbatch
        self.enter(phase, microbatch)
        yield
        self.leave()
        self.enter(*outside)

    def enter(self, phase: str, microbatch: int | None) -> None:
        self.mark()
        self.phase, self.microbatch = phase, microbatch
        if self.ledger is not None:
            self.ledger.begin(phase, microbatch)

    def leave(self) -> None:
        if self.ledger is None:
            return
        if self.phase == "backward":
            self.ledger.tag("gradients", [p.grad for p in self.adapters if p.grad is not None])
        elif self.phase == "step":
            self.ledger.tag("optimizer", optimizer_tensors(self.optimizer))

    def mark(self) -> None:
        """Notes what the phase that ends here had."""
        if self.phase not in PHASES:
            return
        now, peak = self.read()
        if self.device.type == "cuda" and self.phase in STEP_PHASES:
            self.most_bytes = max(self.most_bytes, peak)
        self.seen[self.phase] = now, max(peak, self.seen.get(self.phase, (0, 0))[1])

    def read(self) -> tuple[int, int]:
        """Bytes now, and at most since the last call (on the CPU: since the start)."""
        if self.device.type != "cuda":
            return resident(), peak_resident()
        counts = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]
        HIGHEST[self.device] = max(HIGHEST.get(self.device, 0), counts["peak"])
        torch.cuda.reset_peak_memory_stats(self.device)
        return counts["current"], counts["peak"]

    # Steps

    @contextmanager
    def step(self, batch: StepBatch) -> Iterator[None]:
        """Measures one optimizer step."""
        self.num_steps += 1
        self.seen = {}
        if self.ledger is not None or self.device.type == "cuda" or not self.may_be_largest(batch):
            yield
            return
        self.ledger = self.begin_ledger()
        with self.ledger:
            yield
        peak = Peak.of(self.ledger, 0, self.ledger.clock)
        self.ledger = None
        if peak.num_bytes > self.most_bytes:
            self.measured, self.most_bytes = peak, peak.num_bytes

    def may_be_largest(self, batch: StepBatch) -> bool:
        most = max((len(m.predict_N) for m in batch.microbatches), default=0)
        now = sizes(batch.length, len(batch.microbatches), most)
        largest = self.num_steps <= 2 or any(size > before for size, before in zip(now, self.largest))
        self.largest = [max(pair) for pair in zip(now, self.largest or now)]
        return largest

    def begin_ledger(self, with_sites: bool = False) -> Ledger:
        """A ledger that knows what is there already."""
        ledger = Ledger(with_sites=with_sites)
        ledger.watch(self.model)
        ledger.hold("weights", weight_tensors(self.model))
        ledger.hold("adapters", self.adapters)
        ledger.hold("optimizer", optimizer_tensors(self.optimizer))
        return ledger


def sizes(length: int, num_microbatches: int, num_supervised: int) -> list[tuple[int, ...]]:
    """What decides the memory of a step, what counts most first: one microbatch, or all that a pipeline keeps."""
    return [(length, num_microbatches, num_supervised), (length * num_microbatches, length, num_supervised)]


def weight_tensors(model: nn.Module) -> list[Tensor]:
    """Everything a model holds but its adapters: parameters, buffers, and the states of 4-bit weights."""
    found: list[Tensor] = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    for module in model.modules():
        found += tensors_of(getattr(module, "state", None))
    return found


def tensors_of(state: Any) -> list[Tensor]:
    """Tensors of a bitsandbytes QuantState, and of the one that it may hold in turn."""
    held = vars(state).values() if state is not None else ()
    found = [value for value in held if isinstance(value, Tensor)]
    return found + (tensors_of(state.state2) if getattr(state, "state2", None) is not None else [])


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    states = optimizer.state.values() if optimizer is not None else ()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]
