"""How much memory this process has taken at most."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 2**30


def peak_gib(device: torch.device) -> float:
    """On CUDA the most that tensors ever held; on the CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB
