"""Chooses between the CPU's and the GPU's code path for a tensor. Normally the tensor's own device decides.
While loop/plan/rehearsal.py makes a memory plan with fake CPU tensors, the device that is planned for decides."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

from torch import Tensor

PLANNED: list[str] = []  # the device type that a plan is made for; empty while there is no plan


def on_gpu(tensor: Tensor) -> bool:
    """Whether `tensor` takes the GPU's code path."""
    return PLANNED[-1] == "cuda" if PLANNED else tensor.is_cuda


@contextmanager
def planning_for(device_type: str) -> Iterator[None]:
    """While the context lasts, tensors take the code path of `device_type`, whatever their own device is."""
    PLANNED.append(device_type)
    try:
        yield
    finally:
        PLANNED.pop()
