"""Counts live tensor bytes, allocation by allocation: the phase, module and source line that made each, and when it went.
Costs 10 to 40 microseconds an operation of torch and 300 bytes an allocation while it is on, and nothing while it is off."""

from __future__ import annotations

import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
NUM_FRAMES = 4  # of a site: enough to see who asked for a dequantized weight
ASK_DEVICE = torch.ops.prim.device.default
READ_NUMBER = torch.ops.aten._local_scalar_dense.default

# What an allocation is for. Sites and phases decide; `classify` says how.
CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "working", "logits", "communication")

Frame = tuple[CodeType, int]  # a function and a line in it


@dataclass(slots=True)
class Allocation:
    """One storage, from the operation that made it to the moment when nothing held it any more."""

    num_bytes: int
    born: int  # number of the event, counted over births and deaths
    phase: int  # number of the phase it was made in
    module: str
    frames: tuple[Frame, ...]  # innermost first
    node: str  # of autograd, where a C++ backward function made it
    category: str = ""  # known from what it holds, else by `classify`
    died: int | None = None
    tensor: Any = None  # weak reference to the first tensor on it

    @property
    def line(self) -> str:
        """Where it was made, such as `model/lora.py:85 forward`; of a backward function of torch, where its forward was."""
        where = " < ".join(describe_frame(frame) for frame in self.frames[:3]) or "torch"
        return f"backward of {where} ({self.node})" if self.node else where


@dataclass(slots=True)
class Phase:
    """A stretch of the run with a name: build, load, forward, loss, backward, sync, step, or what is between them."""

    name: str
    started: int  # event
    microbatch: int | None = None


class Ledger(TorchDispatchMode):
    """Records every storage that torch's operations make while it is on, on any device, real or fake.

    What an operation allocates and frees inside itself is not seen. Categories come from `tag`, else from phases.

    Args:
        round_to: bytes that the device's allocator rounds up to (CUDA: 512).
        with_sites: also record module and source lines, which takes most of its time.
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
        self.pretended: tuple[str, tuple[Frame, ...], str] | None = None
        self.made_at: dict[int, tuple[str, tuple[Frame, ...]]] = {}  # by sequence number of the node of autograd

    # What is recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASK_DEVICE:  # of a fake tensor, many times an operation
            return args[0].fake_device
        if func is READ_NUMBER and is_fake(args[0]):
            return 1.0 if args[0].is_floating_point() else 1  # a number that nobody knows
        out = func(*args, **(kwargs or {}))
        if self.with_sites:
            self.remember_forward()
        if isinstance(out, Tensor):
            self.note(out)
        elif isinstance(out, (tuple, list)):
            for item in out:
                if isinstance(item, Tensor):
                    self.note(item)
        return out

    def note(self, tensor: Tensor) -> None:
        if device_of(tensor).type == "meta":
            return  # a shape, no memory
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
        if self.with_sites:
            made.tensor = weakref.ref(tensor)
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
        """Takes in what was there before the ledger was, and says what it is."""
        for tensor in tensors:
            self.note(tensor)
        self.tag(category, tensors)

    def tag(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Says what these tensors are, from their birth on."""
        for tensor in tensors:
            known = self.live.get(tensor.untyped_storage()._cdata)
            if known is not None:
                known[1].category = category

    def begin(self, name: str, microbatch: int | None = None) -> None:
        """The phases before end here."""
        self.phases.append(Phase(name, self.clock, microbatch))

    def allocation_of(self, tensor: Tensor) -> Allocation:
        """What is known of the memory that a tensor lies in."""
        return self.live[tensor.untyped_storage()._cdata][1]

    # Where it happens

    def watch(self, modules: nn.Module) -> None:
        """From now on allocations name the module that was called."""
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
            # what follows belongs to the layer that called it
            self.last_module = self.inside.pop().rpartition(".")[0]

    def remember_forward(self) -> None:
        """Notes where a node of autograd comes from, as its backward function allocates without a line of Python."""
        sequence: int = torch._C._autograd._get_sequence_nr()
        if sequence != self.last_sequence and torch._C._current_autograd_node() is None:
            self.last_sequence = sequence
            self.made_at[sequence - 1] = (self.module(), frames_above(4))

    @contextmanager
    def pretending(self, module: str, function: Any) -> Iterator[None]:
        """Names this module and this function for all that is made inside."""
        code = function.__code__
        self.pretended = (module, ((code, code.co_firstlineno),), "")
        yield
        self.pretended = None

    def module(self) -> str:
        return self.inside[-1] if self.inside else self.last_module

    def site(self) -> tuple[str, tuple[Frame, ...], str]:
        if self.pretended is not None:
            return self.pretended
        node = torch._C._current_autograd_node()
        frames = frames_above(4)
        if node is None:
            return self.module(), frames, ""
        module, made_at = self.made_at.get(node._sequence_nr(), ("", ()))
        if self.inside:  # computed once more, by checkpoint
            return self.inside[-1], frames, ""
        if frames:  # a backward function in Python
            return module, frames, ""
        return module, made_at, node.name()


def frames_above(depth: int) -> tuple[Frame, ...]:
    """The callers outside of torch, innermost first: at most one of another library before this project's."""
    frame: Any = sys._getframe(depth - 1)
    frames: list[Frame] = []
    while frame is not None and len(frames) < NUM_FRAMES:
        code = frame.f_code
        kind = KINDS.get(code)
        if kind is None:
            kind = KINDS[code] = kind_of(code)
        if kind == "project" or (kind == "library" and not frames):
            frames.append((code, frame.f_lineno))
        elif code.co_name == RUNS_BACKWARD:  # whoever called it did not ask for this allocation
            break
        frame = frame.f_back
    return tuple(frames)


RUNS_BACKWARD = "_engine_run_backward"
KINDS: dict[CodeType, str] = {}  # of the code objects met so far
TORCH = str(Path(torch.__file__).parent)


def kind_of(code: CodeType) -> str:
    """project | library | torch: torch's own frames say nothing to a reader, nor do the interpreter's."""
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


def device_of(tensor: Any) -> torch.device:
    """Without asking torch, which would take an operation, where the tensor is fake."""
    device: torch.device = tensor.fake_device if is_fake(tensor) else tensor.device
    return device


def is_fake(tensor: Any) -> bool:
    return type(tensor).__name__ == "FakeTensor"
