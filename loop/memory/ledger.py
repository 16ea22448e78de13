"""Counts the bytes of live tensors: which phase, module and source line made each allocation, and when each was freed.
Costs 10 to 40 microseconds an operation of torch and 300 bytes an allocation while a ledger is on, nothing otherwise."""

from __future__ import annotations

import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from loop.errors import ROOT

NUM_FRAMES = 4  # kept of an allocation: enough to see who asked for a dequantized weight
RUNS_BACKWARD = "_engine_run_backward"
TORCH = str(Path(torch.__file__).parent)
ASK_DEVICE = torch.ops.prim.device.default
READ_NUMBER = torch.ops.aten._local_scalar_dense.default

LASTING = ("weights", "adapters", "gradients", "optimizer")  # categories that outlive a microbatch
CATEGORIES = (*LASTING, "activations", "working", "logits", "communication")  # what an allocation is for

Frame = tuple[CodeType, int]  # a function and a line in it
Site = tuple[str, tuple[Frame, ...], str]  # `module`, `frames` and `node` of an Allocation


@dataclass(slots=True)
class Allocation:
    """One storage, from the operation that made it to the moment when the last tensor on it was gone."""

    num_bytes: int
    born: int  # number of the event, counted over births and deaths
    phase: int  # number of the phase of its birth
    module: str
    frames: tuple[Frame, ...]  # innermost first
    node: str  # name of the C++ backward function that made the storage, else ""
    category: str = ""  # set by `tag`, else by `classify` in peak.py
    died: int | None = None

    @property
    def line(self) -> str:
        """Where the storage was made, such as `model/lora.py:85 forward`; for a backward function of torch, where the forward
        function was called."""
        where = " < ".join(describe_frame(frame) for frame in self.frames[:3]) or "torch"
        return f"backward of {where} ({self.node})" if self.node else where


@dataclass(slots=True)
class Phase:
    """A stretch of the run: build, load, forward, loss, backward, sync, update; the name is "" between two of these."""

    name: str
    started: int  # event
    microbatch: int | None = None


class Ledger(TorchDispatchMode):
    """Records every storage that torch's operations make in its `with` block, on any device, real or fake.

    Memory that an operation allocates and frees inside itself is not recorded.

    Args:
        round_to: bytes that the device's allocator rounds up to (CUDA: 512).
        with_sites: also record module and source lines, which takes most of the time.
    """

    def __init__(self, round_to: int = 1, with_sites: bool = True) -> None:
        super().__init__()
        self.round_to, self.with_sites = round_to, with_sites
        self.allocations: list[Allocation] = []
        self.live: dict[int, tuple[weakref.ref[Any], Allocation]] = {}  # by the storage's address in C++
        self.phases = [Phase("", 0)]
        self.clock = self.current = self.peak = 0
        self.names: dict[int, str] = {}  # of modules, by id
        self.inside: list[str] = []  # names of the modules that are being called
        self.last_module = ""
        self.last_sequence = -1
        self.pretended: Site | None = None
        self.forward_sites: dict[int, Site] = {}  # by sequence number of the node of autograd
        self.piled_up: list[Any] = []  # lines of what each microbatch leaves behind, see growth.py

    # What is recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASK_DEVICE:  # torch asks a fake tensor for its device many times in one operation
            return args[0].fake_device
        if func is READ_NUMBER and is_fake(args[0]):
            return 1.0 if args[0].is_floating_point() else 1  # a fake tensor has no number to read; any will do
        out = func(*args, **(kwargs or {}))
        if self.with_sites:
            self.remember_forward()
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor):
                self.note(item)
        return out

    def note(self, tensor: Any) -> None:
        """Records the storage of a tensor, unless it is known. A fake tensor answers `device` with an operation of torch,
        which would be recorded in turn; its `fake_device` is a plain attribute."""
        if (tensor.fake_device if is_fake(tensor) else tensor.device).type == "meta":
            return  # only a shape, without memory
        storage = tensor.untyped_storage()
        address, num_bytes = storage._cdata, storage.nbytes()
        num_bytes += -num_bytes % self.round_to
        known = self.live.get(address)
        if known is not None:
            if known[1].num_bytes != num_bytes:  # resized
                self.count(num_bytes - known[1].num_bytes)
                known[1].num_bytes = num_bytes
            return
        self.clock += 1
        module, frames, node = self.site() if self.with_sites else ("", (), "")
        made = Allocation(num_bytes, self.clock, len(self.phases) - 1, module, frames, node)
        self.allocations.append(made)
        self.live[address] = (weakref.ref(storage, lambda _: self.forget(address)), made)
        self.count(num_bytes)

    def count(self, num_bytes: int) -> None:
        self.current += num_bytes
        self.peak = max(self.peak, self.current)

    def forget(self, address: int) -> None:
        _, gone = self.live.pop(address)
        self.clock += 1
        gone.died = self.clock
        self.current -= gone.num_bytes

    def hold(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Records tensors that were made before the ledger was, under a category."""
        for tensor in tensors:
            self.note(tensor)
        self.tag(category, tensors)

    def tag(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Sets the category of these tensors, from their birth on."""
        for tensor in tensors:
            known = self.live.get(tensor.untyped_storage()._cdata)
            if known is not None:
                known[1].category = category

    def begin(self, name: str, microbatch: int | None = None) -> None:
        """Ends the current phase and begins another."""
        self.phases.append(Phase(name, self.clock, microbatch))

    def allocation_of(self, tensor: Tensor) -> Allocation:
        """The recorded allocation that holds a tensor."""
        return self.live[tensor.untyped_storage()._cdata][1]

    # Where it happens

    def watch(self, modules: nn.Module) -> None:
        """Names these modules in the allocations that follow."""
        self.names = {id(module): name for name, module in modules.named_modules()}

    def __enter__(self) -> Any:
        self.hooks: list[Any] = []
        if self.with_sites:
            self.hooks = [register_module_forward_pre_hook(self.enter_module),
                          register_module_forward_hook(self.leave_module, always_call=True)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def enter_module(self, module: nn.Module, _: Any) -> None:
        name = self.names.get(id(module))
        if name is not None:
            self.inside.append(name)

    def leave_module(self, module: nn.Module, *_: Any) -> None:
        if self.inside and id(module) in self.names:
            # until the next module is called, operations belong to the caller of this one
            self.last_module = self.inside.pop().rpartition(".")[0]

    def remember_forward(self) -> None:
        """Keeps the site of a forward operation under the sequence number of its autograd node.

        The node's backward function runs in C++, where no Python frame says which line the memory is for; `site` reads this
        entry instead.
        """
        sequence: int = torch._C._autograd._get_sequence_nr()
        if sequence != self.last_sequence and torch._C._current_autograd_node() is None:
            self.last_sequence = sequence
            self.forward_sites[sequence - 1] = (self.module(), frames_above(), "")

    @contextmanager
    def pretending(self, module: str, frames: tuple[Frame, ...]) -> Iterator[None]:
        """Gives all allocations in the `with` block this module and these lines."""
        self.pretended = (module, frames, "")
        yield
        self.pretended = None

    def module(self) -> str:
        return self.inside[-1] if self.inside else self.last_module

    def site(self) -> Site:
        """The module and lines that allocate now. In a backward pass these are, in this order: of a module that a checkpoint
        computes again, of a backward function in Python, else of the forward operation that the running node belongs to."""
        if self.pretended is not None:
            return self.pretended
        node, frames = torch._C._current_autograd_node(), frames_above()
        if node is None or self.inside:
            return self.module(), frames, ""
        module, forward_frames, _ = self.forward_sites.get(node._sequence_nr(), ("", (), ""))
        return (module, frames, "") if frames else (module, forward_frames, node.name())


def frames_above() -> tuple[Frame, ...]:
    """The callers outside of torch and of this file, innermost first: at most one of another library, then the project's."""
    frame: Any = sys._getframe(1)
    frames: list[Frame] = []
    while frame is not None and len(frames) < NUM_FRAMES:
        code = frame.f_code
        owner = whose(code)
        if owner == "project" or (owner == "library" and not frames):
            frames.append((code, frame.f_lineno))
        elif code.co_name == RUNS_BACKWARD:  # the line that called backward() did not ask for this allocation
            break
        frame = frame.f_back
    return tuple(frames)


@cache
def whose(code: CodeType) -> str:
    """project, library or torch; this file's frames and the interpreter's count as torch, for they tell a reader nothing."""
    name = code.co_filename
    if name.startswith(TORCH) or name == __file__ or name.startswith("<"):
        return "torch"
    if "site-packages" in name:
        return "library"
    return "project" if name.startswith(str(ROOT)) else "torch"


def describe_frame(frame: Frame) -> str:
    code, line = frame
    path = code.co_filename
    short = path.rpartition("site-packages/")[2] if "site-packages/" in path else path.removeprefix(f"{ROOT}/")
    return f"{short}:{line} {code.co_name}"


def is_fake(tensor: Any) -> bool:
    return type(tensor).__name__ == "FakeTensor"
