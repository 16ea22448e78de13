"""One rank's training step without weights and without its device: the real build, the real loop and the real schedule
on fake tensors, which have shapes and no values. Takes seconds and some 100 MiB, whatever the model's size."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules

from data.batches import Batches, Microbatch, StepBatch
from loop import accumulate
from loop.config import Config
from loop.fit import fit
from loop.gpipe import Pipeline
from loop.ledger import Ledger
from loop.memory import Memory, own_tensors
from loop.metrics import RunLog
from loop.optim import make_optimizer
from loop.peak import Peak
from loop.ranks import Ranks
from model import experts
from model.build import Weights, build_empty
from model.delta_rule import padded_positions
from model.devices import planning_for
from model.lora import LoraMatmul
from model.shards import Weight
from model.stages import Stage, decoder_layer

SLICE_BYTES = 8 * 2**20  # as `shards.stream` reads
CUDA_BLOCK = 512  # bytes that CUDA's allocator rounds up to


@dataclass(frozen=True)
class Share:
    """What one rank of a run does."""

    device: str  # its type
    rank: int = 0
    num_replicas: int = 1
    num_stages: int = 1
    first: int = 0  # its sublayers
    stop: int | None = None


def rehearse(
    config: Config, model: Path, share: Share, batches: list[StepBatch], worst_routing: bool = False,
    all_layers: bool = False, first_step: bool = False, group: dist.ProcessGroup | None = None,
) -> tuple[Peak, Peak]:
    """The highest peak of some steps, and the same if all tokens go to the same experts.

    Args:
        model: a directory with config.json, or a file like it.
        worst_routing: whether to rehearse that, too; else the second peak is the first.
        all_layers: compute every layer of every microbatch, for tests; else of layers that are alike only one.
        first_step: the first of the steps is the run's first, when no optimizer states are there.
        group: the stages of this replica, where there is such a group; else one is pretended.
    """
    ledger = Ledger(round_to=CUDA_BLOCK if share.device == "cuda" else 1)
    memory = Memory(torch.device("cpu"), ledger)
    ranks = RehearsedRanks(
        share.rank, share.num_replicas * share.num_stages, 0, torch.device("cpu"), share.num_stages, group)
    peaks: list[list[tuple[int, int]]] = [[], []]  # first and last event of each step, by routing
    with ExitStack() as stack:
        for context in (pretended_group(ranks), nothing_sent(), nothing_left_behind(), planning_for(share.device),
                        FakeTensorMode(allow_non_fake_inputs=True), ledger):
            stack.enter_context(context)
        stage = build_fake(config, model, share, memory, ledger)
        adapters = stage.adapters()
        optimizer = make_optimizer(config.train.optimizer, adapters.values(), config.train.weight_decay)
        memory.attach(stage.model, adapters.values(), optimizer)
        representatives = Representatives(stage, memory, ledger, share.num_stages)
        if not all_layers:
            setattr(stage, "run_layer", representatives)

        def steps() -> Iterator[StepBatch]:
            if not first_step:
                yield replace(batches[0], microbatches=[], slots=range(0))  # leaves optimizer states behind
            for batch in batches:
                representatives.begin(batch)
                for kind, bounds in enumerate((experts.uniform_bounds, experts.worst_bounds)[: 1 + worst_routing]):
                    start = ledger.clock
                    with assumed(bounds):
                        yield fake(batch)
                    peaks[kind].append((start, ledger.clock))

        if share.num_stages > 1:
            forward_backward: Any = Pipeline([stage], ranks, config.pipeline.schedule, memory).forward_backward
        else:
            forward_backward = partial(accumulate.forward_backward, stage, memory)
        fit(
            replace(config.train, max_steps=1 + 2 * len(batches), router_stats=False), 0, Steps(steps), adapters, optimizer,
            forward_backward, evaluate=lambda: (0.0, {}), save=lambda step, eval_loss: None,
            eval_every=1000, save_every=1000, ranks=ranks, log=RunLog(Path(), "", enabled=False), memory=memory,
        )
    uniform, worst = (
        max((Peak.of(ledger, *span) for span in spans), key=lambda peak: peak.num_bytes, default=None) for spans in peaks)
    assert uniform is not None
    return uniform, worst or uniform


def build_fake(config: Config, model: Path, share: Share, memory: Memory, ledger: Ledger) -> Stage:
    """The stage as a run builds it, with storage for every weight; the ledger knows each by its module."""
    with memory.during("build"):
        stage, weights = build_empty(
            model, config.model.base, config.lora, seed=0, device=torch.device("cpu"), recompute=config.train.recompute,
            keep_layers=config.train.keep_layers, first=share.first, stop=share.stop,
        )
    with memory.during("load"):
        put_nothing(weights)
    ledger.watch(stage.model)
    for name, module in stage.model.named_modules():
        for tensor in own_tensors(module):
            ledger.allocation_of(tensor).module = name
    ledger.tag("adapters", stage.adapters().values())
    return stage


class Steps(Batches):
    """Gives the loop these steps, not those of any rows."""

    def __init__(self, steps: Callable[[], Iterator[StepBatch]]) -> None:
        self.steps = steps
        self.steps_per_epoch = 1

    def train_steps(self, done: int, total: int, seed: int) -> Iterator[StepBatch]:
        return self.steps()


class RehearsedRanks(Ranks):
    """Ranks of which only this one is there: collectives return what they were given."""

    def all_reduce(self, tensor: Tensor, group: Any = None) -> Tensor:
        return tensor

    def concatenate_stages(self, values_P: Tensor) -> Tensor:
        return values_P


@contextmanager
def pretended_group(ranks: Ranks) -> Iterator[None]:
    """torch's pipeline stages want a process group; where there is none, one that goes nowhere."""
    if ranks.num_stages == 1 or dist.is_initialized():
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=ranks.stage, world_size=ranks.num_stages, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Sent:
    """Stands in for a message under way: holds its tensor until it is waited for, as NCCL's and gloo's do."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def wait(self) -> None:
        self.tensor = None


@contextmanager
def nothing_sent() -> Iterator[None]:
    """No message leaves, whatever group there is: of the schedule's, of those that torch sends before its first one."""
    replaced = [
        (schedules, "_batch_p2p", lambda ops, desc=None: [Sent(op.tensor) for op in ops]),
        (dist, "send", lambda *args, **kwargs: None),
        (dist, "recv", lambda *args, **kwargs: None),
    ]
    originals = [getattr(module, name) for module, name, _ in replaced]
    for module, name, stand_in in replaced:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name, _), original in zip(replaced, originals):
            setattr(module, name, original)


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """bitsandbytes keeps its 8-bit type for whoever quantizes next, which must not find one without values."""
    before = dict(bnb.name2qmap)
    try:
        yield
    finally:
        bnb.name2qmap.clear()
        bnb.name2qmap.update(before)


def put_nothing(weights: Weights) -> None:
    """Gives every weight its storage. Experts are alike, so one of each layer shows what quantizing takes."""
    for item in weights.wanted:
        if isinstance(item, Weight):
            num_rows, *rest = item.shape
            step = max(SLICE_BYTES // (2 * torch.Size(rest).numel()) // 128 * 128, 128)
            for start in range(0, num_rows, step):
                item.put(start, torch.empty(min(step, num_rows - start), *rest, dtype=torch.bfloat16))
        else:
            gate_up_2ID = torch.empty(2 * item.intermediate, item.hidden, dtype=torch.bfloat16)
            item.put(0, gate_up_2ID, torch.empty(item.hidden, item.intermediate, dtype=torch.bfloat16))


def fake(batch: StepBatch) -> StepBatch:
    """The same with tensors that have no values; to be called inside FakeTensorMode."""
    def empty(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    return replace(batch, microbatches=[
        Microbatch(**{name: empty(value) for name, value in vars(m).items()}) for m in batch.microbatches])


@contextmanager
def assumed(bounds: Callable[[int, int, int], list[int]]) -> Iterator[None]:
    experts.ASSUMED.append(bounds)
    try:
        yield
    finally:
        experts.ASSUMED.pop()


# Of layers that are alike, one is enough


class Representatives:
    """Runs one decoder layer of each kind, and has the others allocate and keep as much, in the same places.

    The last of its kind is run: there, at the start of the backward pass, most is kept. The first one is run too where
    its activations are kept, which tells how much those of the others are, and where more gradients come in a step's
    first backward pass than activations go. Of many microbatches the first two and the last are run, and the one
    whose rows pad each other most; on one device, where a microbatch meets nothing of the one before but its
    gradients, the last two of these are enough. `rehearse(all_layers=True)` is the plain reference.
    """

    def __init__(self, stage: Stage, memory: Memory, ledger: Ledger, num_stages: int) -> None:
        self.stage, self.memory, self.ledger = stage, memory, ledger
        self.plain = stage.run_layer
        self.run_microbatches: set[int] = set()
        numbers = range(stage.first // 2, (stage.stop + 1) // 2)
        self.only_last = num_stages == 1 and len(numbers) == len(stage.recomputed)
        self.kind = {number: kind_of(stage, number) for number in numbers}
        self.first = {kind: number for number, kind in reversed(self.kind.items())}
        self.last = {kind: number for number, kind in self.kind.items()}
        # bytes that a layer of a kind keeps, beside its input and output, of rows of these lengths
        self.kept: dict[tuple[Any, tuple[int, ...]], int] = {}

    def begin(self, batch: StepBatch) -> None:
        """The next step."""
        num = len(batch.microbatches)
        padded = max(range(num), key=lambda m: padded_positions(batch.microbatches[m].lengths), default=0)
        self.run_microbatches = {padded, num - 1} if self.only_last else {0, 1, padded, num - 1}

    def __call__(self, number: int, x_1TD: Tensor, rotary: Any, segments: Any) -> Tensor:
        kind, keeps = self.kind[number], number not in self.stage.recomputed
        parameters = [p for p in self.stage.model.model.layers[number].parameters() if p.requires_grad]
        grows = 4 * sum(p.numel() for p in parameters) > x_1TD.numel() * x_1TD.element_size()
        is_first_use = self.first[kind] == number and (
            self.memory.microbatch == 0 and grows or keeps and (kind, segments.lengths) not in self.kept)
        if self.memory.microbatch in self.run_microbatches and (self.last[kind] == number or is_first_use):
            before = self.ledger.current
            y_1TD = self.plain(number, x_1TD, rotary, segments)
            output_bytes = self.ledger.allocation_of(y_1TD).num_bytes
            self.kept[kind, segments.lengths] = self.ledger.current - before - output_bytes if keeps else 0
            return y_1TD
        kept = self.kept.get((kind, segments.lengths))
        if kept is None:  # of other rows, as many as any
            kept = max((num_bytes for (known, _), num_bytes in self.kept.items() if known == kind), default=0)
        named = partial(self.ledger.pretending, f"model.layers.{number}")
        with named(decoder_layer):
            return StandIn.apply(x_1TD, parameters[0] if parameters else None, kept, parameters, named)


def kind_of(stage: Stage, number: int) -> Any:
    """What two layers have in common if they are alike."""
    layer = stage.model.model.layers[number]
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    halves = 2 * number >= stage.first, 2 * number + 1 < stage.stop, number in stage.recomputed
    no_gradient = number == 0 and number not in stage.recomputed  # its input needs none, so that it keeps less
    return halves, no_gradient, tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)


class StandIn(torch.autograd.Function):
    """Takes and keeps the memory of a decoder layer, but for what it needs while it computes."""

    @staticmethod
    def forward(
        ctx: Any, x_1TD: Tensor, anchor: Tensor | None, kept_bytes: int, parameters: list[nn.Parameter],
        named: Callable[..., Any],
    ) -> Tensor:
        ctx.save_for_backward(x_1TD, torch.empty(kept_bytes, dtype=torch.uint8))
        ctx.parameters, ctx.named = parameters, named
        return torch.empty_like(x_1TD)

    @staticmethod
    def backward(ctx: Any, dy_1TD: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.named(LoraMatmul.backward):
            for parameter in ctx.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            dx_1TD = torch.empty_like(dy_1TD) if ctx.needs_input_grad[0] else None
        return dx_1TD, None, None, None, None
