"""Says in words which Python object keeps a tensor alive: an attribute, a global, a list.
Takes 0.1 to 0.5 s, for it goes through all objects of the interpreter; meant for one step, not for every step."""

from __future__ import annotations

import gc
from types import ModuleType
from typing import Any

from torch import Tensor

from loop.memory.ledger import Allocation, Ledger

CONTAINERS = ("list", "tuple", "set", "frozenset", "deque", "cell")  # a cell holds a variable of a closure
MAX_DEPTH = 4  # of a container in a container
UNNAMED = "by a local variable or a graph"


def explained(ledger: Ledger, groups: list[list[Allocation]]) -> list[str]:
    """What keeps each group of allocations alive, in words."""
    address_of = {id(a): address for address, (_, a) in ledger.live.items()}
    living = [[(a, address_of[id(a)]) for a in members if a.died is None] for members in groups]
    tensors_at = tensors_on({address for members in living for _, address in members})
    ignored = {id(tensors) for tensors in tensors_at.values()}
    chosen = [representative([(a, tensors_at.get(address, [])) for a, address in members], ignored) for members in living]
    ends = [a for a, has_graph, _ in chosen if a is not None and has_graph]
    return [remark(a, has_graph, holder, ends) for a, has_graph, holder in chosen]


def representative(
    members: list[tuple[Allocation, list[Tensor]]], ignored: set[int]
) -> tuple[Allocation | None, bool, str]:
    """One allocation of a group, whether a tensor on it has a graph, and its holder: one that a Python object holds, if any
    does. In what a graph of autograd keeps, only the end of the graph has such a holder, and the end was made last."""
    chosen: tuple[Allocation | None, list[Tensor], str] = (*members[0], "") if members else (None, [], "")
    for a, tensors in members[-1:] + members[:1]:
        for tensor in tensors:
            if not chosen[2]:
                chosen = (a, tensors, holder) if (holder := holder_of(tensor, ignored)) else chosen
    return chosen[0], any(tensor.grad_fn is not None for tensor in chosen[1]), chosen[2]


def remark(a: Allocation | None, has_graph: bool, holder: str, ends: list[Allocation]) -> str:
    """The holder in words.

    Args:
        ends: those survivors that have a graph. A tensor that a graph has saved is held in C++, by no Python object.
    """
    if a is None:
        return "in a reference cycle, which goes when Python's collector runs"
    words = f"held {holder or 'by a graph of autograd'}"
    if not holder:
        end = next((other for other in ends if other.born > a.born), None)
        words += f", perhaps that of what was made at {end.line}" if end else ", or by a local variable of a running function"
    return words + ("; has a grad_fn: is a .detach() missing where it is kept?" if has_graph else "")


def tensors_on(addresses: set[int]) -> dict[int, list[Tensor]]:
    """All Python tensors on these storages, by the storage's address in C++."""
    found: dict[int, list[Tensor]] = {}
    for item in gc.get_objects():
        if not issubclass(type(item), Tensor):  # isinstance would ask lazy modules for their class, which imports them
            continue
        try:
            address = item.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):  # a sparse tensor has no storage
            continue
        if address in addresses:
            found.setdefault(address, []).append(item)
    return found


def holder_of(item: Any, ignored: set[int], depth: int = 0) -> str:
    """The object that refers to `item`, such as "by the attribute 'last' of model.stages.Stage"; "" where there is none.
    An object that a person can find by its name comes before one without.

    Args:
        ignored: ids of lists that refer to `item` only because of this search.
    """
    owners = gc.get_referrers(item)
    ignored = ignored | {id(owners)}
    found = ""
    for owner in owners:  # no comprehension here and in `held_by`: its closure would refer to `item` as well
        words = held_by(item, owner, ignored, depth) if id(owner) not in ignored else ""
        if words and (not found or found.endswith(UNNAMED)):
            found = words
    return found


def held_by(item: Any, owner: Any, ignored: set[int], depth: int) -> str:
    """What `owner` is, in words; "" for an owner that says nothing, such as the frame of a running function."""
    kind = type(owner).__name__
    words = f"in a {kind}" if kind in CONTAINERS else ""
    home, name = owner, None
    if isinstance(owner, dict):
        home, name = home_of(owner), name_in(owner, item)
        words = f"under {name!r} in a dict" if home is None else ""
    elif not words:
        name = name_in(attributes(owner), item)
    if words:
        outer = holder_of(owner, ignored, depth + 1) if depth < MAX_DEPTH else ""
        return f"{words}, held {outer or UNNAMED}"
    if name is None:
        return ""
    if isinstance(home, ModuleType):
        return f"by the global '{name}' of {home.__name__}"
    cls = home if isinstance(home, type) else type(home)
    return f"by the attribute '{name}' of {cls.__module__}.{cls.__qualname__}"


def name_in(values: dict[Any, Any], item: Any) -> Any:
    for name, value in list(values.items()):
        if value is item:
            return name
    return None


def home_of(values: dict[Any, Any]) -> Any:
    """The object or module whose `__dict__` this is; None for any other dict."""
    for owner in gc.get_referrers(values):
        if attributes(owner) is values:
            return owner
    return None


def attributes(owner: Any) -> Any:
    """The `__dict__` of an object, read without running any code of its class."""
    try:
        return object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return {}
