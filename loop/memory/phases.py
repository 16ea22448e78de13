"""Measures memory by phase of a step: what a rank held at the end of each phase, and the most that tensors ever held.
Reads counters of CUDA's allocator or of the operating system, which no device waits for; never resets the counters."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, NamedTuple

import torch
from torch import Tensor, nn

from data.batches import StepBatch
from loop.distributed.groups import Ranks
from loop.memory.growth import GrowthSearch
from loop.memory.ledger import LASTING, Ledger
from model.delta_rule import padded_positions

GIB = 2**30
CUDA_BLOCK = 512  # bytes that CUDA's allocator rounds up to
PHASES = ("build", "load", "communicate", "forward", "loss", "backward", "sync", "update", "eval")
NAMES = {"build": "built", "load": "loaded"}  # in memory.jsonl
CREATED = {"backward": "gradients", "update": "optimizer"}  # the category that these phases bring about
NUM_FIRST = 2  # steps always counted on the CPU: the first makes the optimizer's states, the second starts with them


def peak_gib(device: torch.device) -> float:
    """The most that tensors ever held on CUDA; on the CPU the process's peak resident size."""
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()) / GIB


def peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """Resident bytes of this process; the peak on a system without /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


class StepSize(NamedTuple):
    """Three keys to order steps by the memory they take. The model and the schedule decide which key applies, so the largest
    step is sought under each."""

    one_microbatch: tuple[int, ...]  # where one microbatch is held at a time
    all_microbatches: tuple[int, ...]  # where a pipeline holds all of them
    padded: tuple[int, ...]  # where the delta rule pads the rows of a microbatch

    @classmethod
    def of(cls, lengths: list[tuple[int, ...]], num_supervised: int) -> StepSize:
        """The keys of a step.

        Args:
            lengths: tokens of each segment, by microbatch.
            num_supervised: supervised positions of the microbatch that has the most.
        """
        length = sum(lengths[0]) if lengths else 0
        padded = max((padded_positions(segments) for segments in lengths), default=0)
        return cls((length, len(lengths), num_supervised), (length * len(lengths), length, num_supervised),
                   (padded, length, num_supervised))


class Memory:
    """What one rank's memory was in each phase, and the most that tensors held in any step (`most_bytes`).

    CUDA's allocator always counts tensors. On the CPU a ledger counts them, which takes time, so only in the steps that may
    hold the most: the first two, and every step larger than all before.

    Args:
        device: this rank's.
        ledger: a ledger for all phases, in a rehearsal.
        trace_step: the step whose ledger also records lines of the source and stays in `traced` (see trace.py).
    """

    def __init__(self, device: torch.device, ledger: Ledger | None = None, trace_step: int | None = None) -> None:
        self.device, self.ledger, self.trace_step = device, ledger, trace_step
        self.phase = ""
        self.batch: StepBatch | None = None  # in work now
        self.microbatch: int | None = None  # its number in the batch
        self.traced: Ledger | None = None
        self.seen: dict[str, tuple[int, int]] = {}  # by phase since the last `marks`: bytes at its end, and peak bytes
        self.most_bytes = 0
        self.model: nn.Module = nn.Module()
        self.adapters: list[nn.Parameter] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.largest: StepSize | None = None  # of the steps so far, by each key
        self.num_steps = 0
        self.is_asked = False  # whether `now` was called since the last step began
        self.growth = GrowthSearch()  # from microbatch to microbatch

    def attach(
        self, model: nn.Module, adapters: Iterable[nn.Parameter] = (), optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Sets the model, adapters and optimizer whose tensors are told apart in a ledger and in a report."""
        self.model, self.adapters, self.optimizer = model, list(adapters), optimizer

    def tensors(self, category: str) -> list[Tensor]:
        """The tensors of one of the LASTING categories."""
        if category == "weights":
            return weight_tensors(self.model)
        if category == "adapters":
            return list(self.adapters)
        if category == "gradients":
            return [p.grad for p in self.adapters if p.grad is not None]
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def now(self) -> dict[str, int]:
        """Bytes that tensors hold at this moment, by category: weights, adapters, gradients, optimizer, and `other`, which are
        activations and what is computed with. For your own lines in the loop: `print(memory.now())`.

        On the CPU `other` is known while a ledger counts: in the first two steps, in every step after one that called this
        method, and where it is not known it is left out. `resident` is then the whole process, Python and all.
        """
        self.is_asked = True
        held = {category: sum(t.untyped_storage().nbytes() for t in unique(self.tensors(category))) for category in LASTING}
        on_cuda = self.device.type == "cuda"
        total = self.read()[0] if on_cuda else self.ledger.current if self.ledger is not None else None
        if total is not None:
            held["other"] = total - sum(held.values())
        return held if on_cuda else held | {"resident": resident()}

    # Phases

    @contextmanager
    def during(self, phase: str, microbatch: int | None = None) -> Iterator[None]:
        """Runs its `with` block as a phase, and notes in `seen` what was held at the end. In an evaluation the phases inside
        stay `eval`. After an error the phase and microbatch stay as they were, for the report."""
        outside = self.phase, self.microbatch
        self.enter("eval" if self.phase == "eval" else phase, microbatch)
        yield
        if self.ledger is not None and self.phase in CREATED:
            self.ledger.tag(CREATED[self.phase], self.tensors(CREATED[self.phase]))
        self.enter(*outside)
        is_last = self.batch is not None and microbatch == len(self.batch.microbatches) - 1
        if not self.phase and (phase == "communicate" or phase == "loss" and is_last):
            self.growth.look_for_holders()

    def enter(self, phase: str, microbatch: int | None) -> None:
        self.microbatch = microbatch
        if phase == self.phase == "eval":
            return
        if self.phase in PHASES:
            self.seen[self.phase] = self.read()
        if phase == "forward" and self.phase != "communicate" and self.device.type == "cuda":
            self.growth.starts.append(self.read()[0])
        self.phase = phase
        if self.ledger is not None:
            self.ledger.begin(phase, microbatch)

    def read(self) -> tuple[int, int]:
        """Bytes now, and at most since the process began."""
        if self.device.type != "cuda":
            now = resident()
            return now, max(now, peak_resident())  # Linux updates the two counters at different times
        counts = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]
        return counts["current"], counts["peak"]

    def marks(self, ranks: Ranks) -> list[dict[str, dict[str, float]]]:
        """What each rank held in each phase since the last call, by rank and phase; every rank must call this method.

        `gib` is what the rank held at the end of the phase, `peak_gib` the most since its process began: allocated memory on
        CUDA, resident size on the CPU. With several ranks one sum of 144 bytes a rank waits for the device.
        """
        if self.ledger is not None:  # the tensors of a rehearsal have no memory
            return []
        bytes_RP2 = torch.zeros(ranks.world_size, len(PHASES), 2, dtype=torch.float64)
        bytes_RP2[ranks.rank] = torch.tensor([self.seen.get(phase, (-1, -1)) for phase in PHASES])  # -1: it did not occur
        self.seen = {}
        if ranks.world_size > 1:
            bytes_RP2 = ranks.all_reduce(bytes_RP2.to(ranks.device))
        return [
            {NAMES.get(phase, phase): {"gib": round(now / GIB, 6), "peak_gib": round(peak / GIB, 6)}
             for phase, (now, peak) in zip(PHASES, bytes_P2) if now >= 0}
            for bytes_P2 in bytes_RP2.tolist()
        ]

    # Steps

    @contextmanager
    def step(self, batch: StepBatch) -> Iterator[None]:
        """Measures one optimizer step. After an error the step's batch and ledger stay, for the report."""
        self.batch = batch
        self.num_steps += 1
        is_traced, on_cuda = batch.step == self.trace_step, self.device.type == "cuda"
        is_counted = not on_cuda and self.ledger is None and (self.may_be_largest(batch) or self.is_asked)
        self.is_asked = False
        with_sites = is_traced or self.growth.needs_lines
        if self.ledger is not None:  # a rehearsal
            yield
        elif is_counted or with_sites:
            self.ledger = self.begin_ledger(batch, with_sites, is_traced)
            self.growth.begin(batch.step, self.ledger)
            with self.ledger:
                yield
            self.growth.end()
            self.most_bytes = max(self.most_bytes, 0 if on_cuda else self.ledger.peak)
            self.traced, self.ledger = self.ledger if is_traced else None, None
        else:
            self.growth.begin(batch.step, None)
            yield
            self.growth.end()
        if on_cuda:
            self.most_bytes = torch.cuda.max_memory_allocated(self.device)
        self.batch = None

    def may_be_largest(self, batch: StepBatch) -> bool:
        most = max((len(m.predict_N) for m in batch.microbatches), default=0)
        size = StepSize.of([m.lengths for m in batch.microbatches], most)
        before = self.largest or size
        self.largest = StepSize(*map(max, size, before))
        return self.num_steps <= NUM_FIRST or self.largest != before

    def begin_ledger(self, batch: StepBatch, with_sites: bool, is_traced: bool) -> Ledger:
        """A ledger that holds what was made before the step. For a trace CUDA's allocator records the step as well."""
        ledger = Ledger(CUDA_BLOCK if self.device.type == "cuda" else 1, with_sites)
        for category in LASTING:
            ledger.hold(category, self.tensors(category))
        if with_sites:
            ledger.watch(self.model)
            for name, module in self.model.named_modules():
                for tensor in own_tensors(module):
                    ledger.allocation_of(tensor).module = name
        given = [value for m in batch.microbatches for value in vars(m).values() if isinstance(value, Tensor)]
        ledger.hold("working", given)
        ledger.begin("")  # phase 0 ends: later allocations count as made in the step
        if is_traced and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        return ledger


def weight_tensors(model: nn.Module) -> list[Tensor]:
    """All tensors of a model but its adapters: parameters, buffers, and the states of 4-bit weights."""
    return [t for module in model.modules() for t in own_tensors(module) if not t.requires_grad]


def unique(tensors: list[Tensor]) -> list[Tensor]:
    """One tensor of each storage: a tied head and embedding are held once."""
    return list({t.untyped_storage()._cdata: t for t in tensors}.values())


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors of a module without those of its children."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    state: Any = getattr(module, "state", None)
    while state is not None:  # a QuantState of bitsandbytes may hold another in `state2`
        own += [value for value in vars(state).values() if isinstance(value, Tensor)]
        state = getattr(state, "state2", None)
    return own
