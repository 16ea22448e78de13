"""Where memory is and was: named phases of every step, what tensors held at most, and what they held it for.
Asks the allocator's own counters, which no device waits for; on the CPU, the operating system's (see `Memory.marks`)."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from data.batches import StepBatch
from loop.ledger import Ledger
from loop.ranks import Ranks
from loop.trace import recorded
from model.delta_rule import padded_positions

GIB = 2**30
CUDA_BLOCK = 512  # bytes that CUDA's allocator rounds up to
PHASES = ("build", "load", "communicate", "forward", "loss", "backward", "sync", "step", "eval")
STEP_PHASES = PHASES[2:-1]
NAMES = {"build": "built", "load": "loaded", "step": "update"}  # in memory.jsonl, where `step` is the number of one
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
        run_dir, rank, say: where the page of step `trace_step` goes, and who is told.
    """

    def __init__(
        self, device: torch.device, ledger: Ledger | None = None, run_dir: Path = Path(), rank: int = 0,
        trace_step: int | None = None, say: Callable[[str], None] = print,
    ) -> None:
        self.device, self.ledger = device, ledger
        self.run_dir, self.rank, self.trace_step, self.say = run_dir, rank, trace_step, say
        self.phase = ""
        self.microbatch: int | None = None
        self.seen: dict[str, tuple[int, int]] = {}  # since the last `marks`, by phase: bytes at its end, bytes at most
        self.most_bytes = 0  # that tensors held in any step
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
        if self.phase == "eval":  # what a pipeline computes for held-out rows is no phase of a step
            yield
            return
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
            now = resident()
            return now, max(now, peak_resident())  # Linux counts the two in ways that differ by some pages
        counts = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]
        HIGHEST[self.device] = max(HIGHEST.get(self.device, 0), counts["peak"])
        torch.cuda.reset_peak_memory_stats(self.device)
        return counts["current"], counts["peak"]

    def marks(self, ranks: Ranks) -> list[dict[str, dict[str, float]]]:
        """What each rank's memory was, by phase, since the last call: GiB at its end, and at most. All ranks ask together.

        Allocated memory on CUDA. On the CPU resident size, of which the system knows the peak since the process began.
        Takes one sum of 144 bytes a rank, which waits for the device; alone, a rank waits for nothing.
        """
        if self.ledger is not None:  # of a rehearsal, whose tensors have no memory
            return []
        bytes_RP2 = torch.zeros(ranks.world_size, len(PHASES), 2, dtype=torch.float64)
        bytes_RP2[ranks.rank] = torch.tensor([self.seen.get(phase, (-1, -1)) for phase in PHASES])  # -1: it did not occur
        self.seen = {}
        if ranks.world_size > 1:
            bytes_RP2 = ranks.all_reduce(bytes_RP2.to(ranks.device))
        return [in_gib(bytes_P2) for bytes_P2 in bytes_RP2.tolist()]

    # Steps

    @contextmanager
    def step(self, batch: StepBatch) -> Iterator[None]:
        """Measures one optimizer step."""
        self.num_steps += 1
        traced = batch.step == self.trace_step
        counted = self.device.type == "cuda"
        measured = not counted and self.ledger is None and self.may_be_largest(batch)
        if self.ledger is not None or not (traced or measured):
            yield
            return
        self.ledger = ledger = self.begin_ledger(with_sites=traced)
        with self.tracing(ledger, batch) if traced else ledger:
            yield
        self.ledger = None  # after an error it stays, for the report
        if not counted:
            self.most_bytes = max(self.most_bytes, ledger.peak)

    def tracing(self, ledger: Ledger, batch: StepBatch) -> AbstractContextManager[None]:
        """Keeps the ledger in this step, and writes its page when the step has ended."""
        there = [value for m in batch.microbatches for value in vars(m).values() if isinstance(value, Tensor)]
        path = self.run_dir / f"memory-step-{batch.step}-rank-{self.rank}.html"
        return recorded(ledger, there, self.device, path, f"{self.run_dir.name}, step {batch.step}, rank {self.rank}", self.say)

    def may_be_largest(self, batch: StepBatch) -> bool:
        most = max((len(m.predict_N) for m in batch.microbatches), default=0)
        now = sizes([m.lengths for m in batch.microbatches], most)
        largest = self.num_steps <= 2 or any(size > before for size, before in zip(now, self.largest))
        self.largest = [max(pair) for pair in zip(now, self.largest or now)]
        return largest

    def begin_ledger(self, with_sites: bool = False) -> Ledger:
        """A ledger that knows what is there already."""
        ledger = Ledger(CUDA_BLOCK if self.device.type == "cuda" else 1, with_sites)
        ledger.watch(self.model)
        ledger.hold("weights", weight_tensors(self.model))
        ledger.hold("adapters", self.adapters)
        ledger.hold("optimizer", optimizer_tensors(self.optimizer))
        for name, module in self.model.named_modules() if with_sites else ():
            for tensor in own_tensors(module):
                ledger.allocation_of(tensor).module = name
        return ledger


def in_gib(bytes_P2: list[list[float]]) -> dict[str, dict[str, float]]:
    """The phases that occurred, as memory.jsonl has them: to the KiB."""
    return {
        NAMES.get(phase, phase): {"gib": round(now / GIB, 6), "peak_gib": round(peak / GIB, 6)}
        for phase, (now, peak) in zip(PHASES, bytes_P2) if now >= 0
    }


def sizes(lengths: list[tuple[int, ...]], num_supervised: int) -> list[tuple[int, ...]]:
    """What decides the memory of a step of microbatches whose segments have these lengths, what counts most first: a
    single microbatch, or all that a pipeline keeps, or how far the delta rule pads."""
    length = sum(lengths[0]) if lengths else 0
    padded = max((padded_positions(segments) for segments in lengths), default=0)
    return [(length, len(lengths), num_supervised), (length * len(lengths), length, num_supervised),
            (padded, length, num_supervised)]


def weight_tensors(model: nn.Module) -> list[Tensor]:
    """Everything a model holds but its adapters: parameters, buffers, and the states of 4-bit weights."""
    return [t for module in model.modules() for t in own_tensors(module) if not t.requires_grad]


def own_tensors(module: nn.Module) -> list[Tensor]:
    """What a module itself holds, its children apart."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return own + tensors_of(getattr(module, "state", None))


def tensors_of(state: Any) -> list[Tensor]:
    """Tensors of a bitsandbytes QuantState, and of the one that it may hold in turn."""
    held = vars(state).values() if state is not None else ()
    found = [value for value in held if isinstance(value, Tensor)]
    return found + (tensors_of(state.state2) if getattr(state, "state2", None) is not None else [])


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    states = optimizer.state.values() if optimizer is not None else ()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]
