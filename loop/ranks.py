"""Process groups and collectives; the only reader of the launcher's environment.
Collectives carry tensors, never pickled objects."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Callable, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from loop.launch import die_with_parent
from loop.watch import Watch

Result = TypeVar("Result")
SPARE_S = 30  # after which torch's own timeout ends a rank, should ours not have


@dataclass(frozen=True)
class DistributedConfig:
    """How ranks talk to each other."""

    timeout_s: int = 600  # so long after a rank hangs the whole run is down

    def __post_init__(self) -> None:
        if self.timeout_s < 1:
            raise ValueError(f"distributed.timeout_s is {self.timeout_s}, expected at least 1 second")


@dataclass
class Ranks:
    """This process among all processes of the run. Without a launcher it is alone, and every collective is a no-op.

    A model in `num_stages` stages takes as many neighbouring ranks, one replica; the replicas share the rows.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    num_stages: int = 1
    replica_group: dist.ProcessGroup | None = None  # the stages of this rank's replica; None while there is one stage
    stage_group: dist.ProcessGroup | None = None  # the ranks that hold this rank's stage; None for all ranks
    watch: Watch = field(default_factory=Watch)

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
        """Such as "rank 3 (stage 1)", for messages."""
        return f"rank {self.rank}" + (f" (stage {self.stage})" if self.num_stages > 1 else "")

    @classmethod
    def from_launcher(cls, deterministic: bool = False, num_stages: int = 1) -> Ranks:
        """Reads what torchrun set, and picks this rank's device; optionally has it repeat bit by bit.

        Raises:
            ValueError: more local ranks than GPUs, or ranks that do not make whole replicas.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
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
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
        return cls(int(os.environ.get("RANK", 0)), world_size, local_rank, device, num_stages)

    def connect(self, config: DistributedConfig) -> None:
        """Joins the process groups; returns when every rank has."""
        if self.world_size == 1:
            return
        self.watch.start(self.name, config.timeout_s)
        on_gpu = self.device.type == "cuda"
        timeout = timedelta(seconds=config.timeout_s + SPARE_S)
        with self.watch.waiting("all ranks to connect"):
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", timeout=timeout, device_id=self.device if on_gpu else None,
            )
            self.make_groups(timeout)

    def make_groups(self, timeout: timedelta) -> None:
        """The groups of stages and of replicas, once all ranks are connected."""
        if self.num_stages > 1:
            ranks = torch.arange(self.world_size).view(self.num_replicas, self.num_stages)
            self.replica_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout)
            self.stage_group, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout)

    def disconnect(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Sums a tensor over all ranks, or those of a group, in place."""
        if self.world_size > 1:
            with self.watch.waiting("the other ranks to join in a sum"):
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
        """The values of all stages of one replica, end to end, on each of them."""
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
            with self.watch.waiting("rank 0 to send what it has read"):
                dist.broadcast(tensor, src=0)
                self.wait_for_device()
        return tensor

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Sends rank 0's named tensors to all ranks; the others pass None. Returns them on the CPU."""
        if self.world_size == 1:
            assert tensors is not None
            return tensors
        header = describe(tensors or {})
        size = self.broadcast(torch.tensor([len(header)], device=self.device))
        header = header if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        received = empty_tensors(self.broadcast(header.to(self.device)))
        return {name: self.broadcast((tensors or received)[name].to(self.device)).cpu() for name in received}

    def gather_stages(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Brings the named tensors of all stages of the first replica to rank 0; other ranks get their own back.

        Costs rank 0 the tensors of all stages, on the CPU.
        """
        if self.num_stages == 1 or self.replica > 0:
            return tensors
        if not self.is_main:
            header = describe(tensors)
            with self.watch.waiting("rank 0 to take a checkpoint's tensors"):
                for tensor in (torch.tensor([len(header)]), header, *tensors.values()):
                    dist.send(tensor.to(self.device).contiguous(), dst=0)
                self.wait_for_device()
            return tensors
        gathered = {name: tensor.cpu() for name, tensor in tensors.items()}
        for rank in range(1, self.num_stages):
            with self.watch.waiting(f"rank {rank} (stage {rank}) to send a checkpoint's tensors"):
                size = self.receive(torch.empty(1, dtype=torch.int64), rank)
                expected = empty_tensors(self.receive(torch.empty(int(size), dtype=torch.uint8), rank))
                gathered |= {name: self.receive(tensor, rank) for name, tensor in expected.items()}
        return gathered

    def receive(self, empty: Tensor, rank: int) -> Tensor:
        """The tensor that `rank` sends, on the CPU."""
        received = empty.to(self.device)
        dist.recv(received, src=rank)
        return received.cpu()

    def wait_for_device(self) -> None:
        """A GPU is told to communicate and goes on: the wait is here, a few times a step, where the watch can see it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def on_main(self, work: Callable[[], Result]) -> Result | None:
        """Runs `work` on rank 0 while the others wait. If it fails there, the others leave quietly: rank 0 says why."""
        if self.world_size == 1:
            return work()
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


def launched_ranks() -> int:
    """How many processes the launcher started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def describe(tensors: dict[str, Tensor]) -> Tensor:
    """Names, dtypes and shapes as bytes of JSON, [B] in uint8."""
    described = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


def empty_tensors(header_B: Tensor) -> dict[str, Tensor]:
    """The tensors that a header describes, yet to be filled, on the CPU."""
    described = json.loads(bytes(header_B.tolist()))
    return {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in described}
