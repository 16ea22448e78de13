"""Process groups and collectives of tensors, never of pickled objects. Alone reads the launcher's environment.
Costs the buffers of the backend; gathering a checkpoint costs rank 0 all stages' adapters and optimizer states."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Callable, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from loop.config import Config
from loop.distributed.launch import die_with_parent, launched_ranks
from loop.distributed.roll_call import by_host, call_roll, open_store
from loop.distributed.signals import Signals
from loop.distributed.watch import Watch

Result = TypeVar("Result")
SPARE_S = 30  # torch's own timeout ends a rank so many seconds after the watch should have done so


@dataclass
class Place:
    """The position of one process among all processes of a run, and which sublayers of the model the process holds.

    `num_stages` neighbouring ranks hold one copy of the model, a replica. The replicas share the rows.
    """

    rank: int = 0
    world_size: int = 1
    num_stages: int = 1
    split: tuple[int, ...] = ()  # sublayers at which the stages 1, 2, ... begin; empty until the split is chosen

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def stage(self) -> int:
        return self.rank % self.num_stages

    @property
    def replica(self) -> int:
        return self.rank // self.num_stages

    @property
    def num_replicas(self) -> int:
        return self.world_size // self.num_stages

    @property
    def name(self) -> str:
        """For messages, such as "rank 3 (stage 1)"."""
        return f"rank {self.rank}" + (f" (stage {self.stage})" if self.num_stages > 1 else "")

    @property
    def first(self) -> int:
        """The first sublayer of this rank's stage."""
        return (0, *self.split)[self.stage]

    @property
    def stop(self) -> int | None:
        """The first sublayer of the next stage; None for the last stage."""
        return (*self.split, None)[self.stage]


@dataclass
class Ranks(Place):
    """This process's place, its device, and its process groups. Without a launcher every collective is a no-op."""

    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    replica_group: dist.ProcessGroup | None = None  # the stages of this rank's replica; None for all ranks
    stage_group: dist.ProcessGroup | None = None  # the ranks that hold this rank's stage; None for all ranks
    store: dist.Store | None = None  # keys and values that all ranks see; None before `connect`, and without a launcher
    group: dist.ProcessGroup | None = None  # in which tensors are gathered; None for that of all ranks
    watch: Watch = field(default_factory=Watch)
    others: str = "the other ranks"  # for messages; on several hosts, each rank and its host
    signals: Signals = field(default_factory=Signals)

    @classmethod
    def from_launcher(cls, deterministic: bool = False, num_stages: int = 1) -> Ranks:
        """Reads the environment that torchrun set, and picks this rank's device.

        Args:
            deterministic: makes repeated runs on a GPU bit-equal.

        Raises:
            ValueError: more local ranks than GPUs, or ranks that do not make whole replicas.
        """
        if "LOCAL_WORLD_SIZE" in os.environ:  # set by launchers
            die_with_parent(signal.SIGKILL)
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        world_size = launched_ranks()
        if world_size % num_stages:
            raise ValueError(f"{world_size} ranks for a model in {num_stages} stages, expected a multiple of {num_stages}")
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible. "
                    f"Start torchrun with --nproc-per-node {torch.cuda.device_count()}"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            if deterministic:
                compute_deterministically()
        return cls(int(os.environ.get("RANK", 0)), world_size, num_stages, local_rank=local_rank, device=device)

    def connect(self, timeout_s: int, config: Config | None = None) -> None:
        """Joins the process groups; returns when every rank has joined. From here on signals stop the run (see signals.py).

        Args:
            timeout_s: seconds after which a rank that hangs must have ended the whole run.
            config: of a run, which must agree on all ranks, as the code must; None where there is nothing to compare.

        Raises:
            ValueError: the ranks do not agree.
        """
        self.signals.listen(self.watch)
        if self.world_size == 1:
            return
        self.watch.start(self.name, timeout_s, self.is_main)
        on_gpu = self.device.type == "cuda"
        timeout = timedelta(seconds=timeout_s + SPARE_S)
        self.store = open_store(self.rank, self.local_rank, self.watch, timeout)
        if config is not None:
            hosts = call_roll(self.store, self.rank, self.world_size, self.local_rank, self.watch, config)
            if len(set(hosts)) > 1:
                self.watch.name = f"{self.name} on {hosts[self.rank]}"
                self.others = by_host({rank: host for rank, host in enumerate(hosts) if rank != self.rank})
        with self.watch.waiting("all ranks to connect"):
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", timeout=timeout, device_id=self.device if on_gpu else None,
                store=self.store, rank=self.rank, world_size=self.world_size)
            self.make_groups(timeout)
            self.signals.connect(self.store, dist.new_group(backend="gloo", timeout=timeout))

    def aside(self) -> Ranks:
        """The same rank as a thread beside the main one communicates: on the CPU, in the group of `signals`."""
        return replace(self, device=torch.device("cpu"), group=self.signals.group, watch=Watch(), signals=Signals())

    def make_groups(self, timeout: timedelta) -> None:
        """Makes the groups of stages and of replicas where each is a part of all ranks; all ranks must be connected. A group
        of one rank would take a communicator's memory on the GPU for nothing."""
        if self.num_stages > 1 and self.num_replicas > 1:
            ranks = torch.arange(self.world_size).view(self.num_replicas, self.num_stages)
            self.replica_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout)
            self.stage_group, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout)

    def disconnect(self) -> None:
        self.signals.listen_no_more()
        if dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Sums a tensor in place, over all ranks or over a group."""
        if self.world_size > 1:
            with self.watch.waiting(f"{self.others} to join in a sum"):
                dist.all_reduce(tensor, group=group)
                self.wait_for_device()
        return tensor

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks that hold the same stage, in place."""
        return self.all_reduce(tensor, self.stage_group) if self.num_replicas > 1 else tensor

    def sum_stages(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the stages of one replica, in place."""
        return self.all_reduce(tensor, self.replica_group) if self.num_stages > 1 else tensor

    def concatenate_stages(self, values_P: Tensor) -> Tensor:
        """Concatenates the values of all stages of one replica; every stage gets the whole."""
        if self.num_stages == 1:
            return values_P
        counts_S = torch.zeros(self.num_stages, dtype=torch.int64, device=self.device)
        counts_S[self.stage] = len(values_P)
        counts = self.sum_stages(counts_S).tolist()
        values = values_P.new_zeros(sum(counts))
        values.split(counts)[self.stage].copy_(values_P)
        return self.sum_stages(values)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Sends rank 0's tensor to all ranks, in place."""
        if self.world_size > 1:
            what = "the other ranks to take what rank 0 has read" if self.is_main else "rank 0 to send what it has read"
            with self.watch.waiting(what):
                dist.broadcast(tensor, src=0)
                self.wait_for_device()
        return tensor

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Sends rank 0's named tensors to all ranks; the others pass None. Returns them on the CPU."""
        return self.exchange(tensors, self.broadcast) if self.world_size > 1 else tensors or {}

    def gather_stages(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Brings copies of the named tensors of all stages of the first replica to rank 0, on the CPU; other ranks get their
        own back.

        Costs rank 0 the tensors of all stages on the CPU, and each sending rank its own.
        """
        if self.replica > 0:
            return tensors
        if not self.is_main:
            with self.watch.waiting("rank 0 to take a checkpoint's tensors"):
                return self.exchange(tensors, partial(dist.send, dst=0, group=self.group))
        gathered = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        for rank in range(1, self.num_stages):
            with self.watch.waiting(f"rank {rank} (stage {rank}) to send a checkpoint's tensors"):
                gathered |= self.exchange(None, partial(dist.recv, src=rank, group=self.group))
        return gathered

    def exchange(self, tensors: dict[str, Tensor] | None, communicate: Callable[[Tensor], object]) -> dict[str, Tensor]:
        """Sends `tensors`, or receives tensors where `tensors` is None; returns them on the CPU.

        `communicate` sends or fills one tensor on the device. A header with names, dtypes and shapes goes first.
        """
        def sent(tensor: Tensor) -> Tensor:
            on_device = tensor.to(self.device).contiguous()
            communicate(on_device)
            return on_device.cpu()  # waits for the device

        described = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in (tensors or {}).items()]
        header_B = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
        size = int(sent(torch.tensor([len(header_B)])))
        header_B = sent(header_B if tensors is not None else header_B.new_empty(size))
        return {
            name: sent(torch.empty(shape, dtype=getattr(torch, dtype)) if tensors is None else tensors[name])
            for name, dtype, shape in json.loads(bytes(header_B.tolist()))
        }

    def wait_for_device(self) -> None:
        """Waits until the GPU has communicated, so that a peer that hangs is noticed inside `watch.waiting`."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def on_main(self, work: Callable[[], Result]) -> Result | None:
        """Runs `work` on rank 0 while the other ranks wait, and returns its result; None on the other ranks.

        If `work` raises an error, rank 0 raises the error and the other ranks exit without a message.
        """
        result, failed = None, torch.zeros(1, device=self.device)
        if self.is_main:
            try:
                result = work()
            except BaseException:
                self.broadcast(failed.fill_(1))
                raise
        if self.broadcast(failed).item():
            raise SystemExit(1)
        return result


def compute_deterministically() -> None:
    """Makes repeated runs on a GPU bit-equal."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # else dequantized weights are filled first
