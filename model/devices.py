"""Which device's code path a tensor takes: its own, or that of the device a plan is made for (loop/rehearsal.py).
Costs nothing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

from torch import Tensor

PLANNED: list[str] = []  # device type, while a plan is made on the CPU for it


def on_gpu(tensor: Tensor) -> bool:
    """Whether kernels that need a GPU are to be used on `tensor`."""
    return PLANNED[-1] == "cuda" if PLANNED else tensor.is_cuda


@contextmanager
def planning_for(device_type: str) -> Iterator[None]:
    """While it lasts, code on fake CPU tensors takes the path that it would take on `device_type`."""
    PLANNED.append(device_type)
    try:
        yield
    finally:
        PLANNED.pop()
