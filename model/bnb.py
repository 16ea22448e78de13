"""bitsandbytes' functions, imported when the first of them is used: the import takes 0.5 s or more, since it brings torch's
compiler with it. Costs nothing in a run whose weights are not quantized."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from bitsandbytes import functional

    return getattr(functional, name)
