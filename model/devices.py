"""Chooses between code paths: the CPU's or the GPU's, a fast path or its plain reference.
Normally a tensor's own device decides, but in a memory plan, whose fake tensors are on the CPU, the device planned for. Every
fast path is taken unless this process has switched it off, which loop/paths.py does where the path computes wrong numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from typing import Iterator

import torch
from torch import Tensor

PLANNED: list[str] = []  # the device type that a plan is made for; empty while there is no plan
CARD: list[int | None] = []  # beside it the generation of the card, as of `generation`
OFF: set[str] = set()  # fast paths that this process does not take, by their names in loop/paths.py
ON: set[str] = set()  # fast paths that a CPU takes only where they are named here, because their start takes long


def on_gpu(tensor: Tensor) -> bool:
    """Whether `tensor` takes the GPU's code path."""
    return PLANNED[-1] == "cuda" if PLANNED else tensor.is_cuda


def generation(tensor: Tensor) -> int | None:
    """The first number of the compute capability of the tensor's card, or of the card planned for: 9 Hopper, 10 data-center
    Blackwell, 12 RTX 50; None on a CPU, and where the card of a plan is not known."""
    if PLANNED:
        return CARD[-1]
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else None


@contextmanager
def planning_for(device_type: str, card: int | None = None) -> Iterator[None]:
    """While the context lasts, tensors take the code path of `device_type`, whatever their own device is.

    Args:
        card: the card's generation, as of `generation`.
    """
    PLANNED.append(device_type)
    CARD.append(card)
    try:
        yield
    finally:
        PLANNED.pop()
        CARD.pop()


def without(path: str) -> AbstractContextManager[None]:
    """While the context lasts, a fast path is off, and its plain reference is taken."""
    return with_member(OFF, path)


def taking(path: str) -> AbstractContextManager[None]:
    """While the context lasts, a CPU takes a fast path that it takes only where it is asked to."""
    return with_member(ON, path)


@contextmanager
def with_member(paths: set[str], path: str) -> Iterator[None]:
    was_there = path in paths
    paths.add(path)
    try:
        yield
    finally:
        if not was_there:
            paths.discard(path)
