"""Process groups and collectives; the only reader of the launcher's environment.
Collectives carry tensors, never pickled objects."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class DistributedConfig:
    """How ranks talk to each other."""

    timeout_s: int = 600  # a collective that waits longer ends the run

    def __post_init__(self) -> None:
        if self.timeout_s < 1:
            raise ValueError(f"distributed.timeout_s is {self.timeout_s}, expected at least 1 second")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run. Without a launcher it is alone, and every collective is a no-op."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_launcher(cls, deterministic: bool = False) -> Ranks:
        """Reads what torchrun set, and picks this rank's device; optionally has it repeat bit by bit.

        Raises:
            ValueError: more local ranks than GPUs.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
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
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), local_rank, device)

    def connect(self, config: DistributedConfig) -> None:
        """Joins the process group; returns when every rank has."""
        if self.world_size > 1:
            on_gpu = self.device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                timeout=timedelta(seconds=config.timeout_s),
                device_id=self.device if on_gpu else None,
            )

    def disconnect(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Sends rank 0's tensor to all ranks, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Sends rank 0's named tensors to all ranks; the others pass None. Returns them on the CPU."""
        if self.world_size == 1:
            assert tensors is not None
            return tensors
        header = json.dumps([[k, str(t.dtype).removeprefix("torch."), list(t.shape)] for k, t in (tensors or {}).items()])
        size = self.broadcast(torch.tensor([len(header)], device=self.device))
        text = torch.empty(int(size), dtype=torch.uint8)
        if self.is_main:
            text = torch.tensor(list(header.encode()), dtype=torch.uint8)
        described = json.loads(bytes(self.broadcast(text.to(self.device)).tolist()))
        received = {}
        for name, dtype, shape in described:
            ours = tensors[name] if tensors else torch.empty(shape, dtype=getattr(torch, dtype))
            received[name] = self.broadcast(ours.to(self.device)).cpu()
        return received

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
