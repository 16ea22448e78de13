"""What an operator of this project computes, moves and starts: it declares what a counter of torch's operators cannot see.
Costs nothing while a model trains; `loop.plan` counts a step by it."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Sequence

from torch import Tensor


class Work(NamedTuple):
    """What one call of an operator does."""

    flops: float = 0.0
    num_bytes: float = 0.0  # read and written
    launches: float = 1.0  # kernels started


Declaration = Callable[[Sequence[Any], Sequence[Tensor]], Work]

# by an operator's name, such as "coach::norm": what its work is for, and its work from its arguments and results
DECLARED: dict[str, tuple[str, Declaration]] = {}


def declare(name: str, category: str, work: Declaration | None = None) -> None:
    """Declares an operator's work; by default one kernel that reads each argument and writes each result once."""
    DECLARED[name] = (category, work or once)


def once(arguments: Sequence[Any], results: Sequence[Tensor]) -> Work:
    return Work(num_bytes=sum(x.numel() * x.element_size() for x in (*arguments, *results) if isinstance(x, Tensor)))
