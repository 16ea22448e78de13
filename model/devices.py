"""Chooses between code paths: the CPU's or the GPU's, a fast path or its plain reference.
Normally a tensor's own device decides, but in a memory plan, whose fake tensors are on the CPU, the device planned for. Every
fast path is taken unless this process has switched it off, which loop/paths.py does where the path computes wrong numbers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

from torch import Tensor

PLANNED: list[str] = []  # the device type that a plan is made for; empty while there is no plan
OFF: set[str] = set()  # fast paths that this process does not take, by their names in loop/paths.py


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


@contextmanager
def without(path: str) -> Iterator[None]:
    """While the context lasts, a fast path is off, and its plain reference is taken."""
    was_off = path in OFF
    OFF.add(path)
    try:
        yield
    finally:
        if not was_off:
            OFF.discard(path)
