"""Who keeps a tensor alive, in words: an attribute, a global, a list, and the lines of the source that put it there.
One pass over all objects of the interpreter, 0.1 to 0.5 s; for looking into one step, never for every step."""

from __future__ import annotations

import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CellType, FrameType, GeneratorType, ModuleType
from typing import Any, Iterable, Iterator

from torch import Tensor

from loop.ledger import ROOT, Allocation, Ledger

CONTAINERS = (list, tuple, set, frozenset)
MAX_DEPTH = 4  # of a container in a container
FILLS = r"\s*(?::[^=]+)?(?:=[^=]|\+=|\[[^]]*\]\s*=[^=]|\.(?:append|appendleft|add|extend|insert|update|setdefault)\()"


@dataclass(frozen=True)
class Holder:
    """What refers to a tensor, and where it was made to, such as `model/stages.py:57`, where that was found."""

    words: str
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.words + (f", see {', '.join(self.lines)}" if self.lines else "")


def explained(ledger: Ledger, groups: list[list[Allocation]]) -> list[str]:
    """Why each group is still there."""
    addresses = {id(a): address for address, (_, a) in ledger.live.items()}
    known = tensors_on({addresses[id(a)] for members in groups for a in members if a.died is None})
    ignored = {id(known), *map(id, known.values())}
    shown = []
    for members in groups:
        on_each = [(a, known.get(addresses[id(a)], [])) for a in members if a.died is None]
        shown.append(representative(on_each, ignored | {id(on_each), *map(id, on_each)}))
    with_graph = [a for a, tensors, _ in shown if a is not None and has_graph(tensors)]
    return [remark(*each, with_graph) for each in shown]


def representative(
    on_each: list[tuple[Allocation, list[Tensor]]], ignored: set[int]
) -> tuple[Allocation | None, list[Tensor], Holder | None]:
    """One of a group, by preference one that an object of Python holds: of what a graph holds that is the last."""
    for a, tensors in on_each[-1:] + on_each[:1]:
        for tensor in tensors:  # not in a generator, which would hold it too
            holder = holder_of(tensor, ignored)
            if holder is not None:
                return a, tensors, holder
    return (*on_each[0], None) if on_each else (None, [], None)


def has_graph(tensors: list[Tensor]) -> bool:
    return any(tensor.grad_fn is not None for tensor in tensors)


def remark(a: Allocation | None, tensors: list[Tensor], held: Holder | None, with_graph: list[Allocation]) -> str:
    """The holder in words.

    Args:
        with_graph: those among the survivors that are the ends of a graph. What a graph has saved has no holder in Python.
    """
    if a is None:
        return "in a reference cycle, which goes when Python's collector runs"
    words = f"held {held}" if held else "held by a graph of autograd"
    if not held:
        end = next((other for other in with_graph if other.born > a.born), None)
        words += f", perhaps that of what was made at {end.line}" if end else ", or by a local variable of a running function"
    if has_graph(tensors):
        words += "; has a grad_fn: is a .detach() missing where it is kept?"
    return words


def tensors_on(addresses: set[int]) -> dict[int, list[Tensor]]:
    """All tensors that Python knows on these storages, given by their addresses in C++."""
    found: dict[int, list[Tensor]] = {}
    for item in gc.get_objects():
        if not issubclass(type(item), Tensor):  # not isinstance: that would ask lazy modules for their class
            continue
        try:
            address = item.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):  # sparse ones have none
            continue
        if address in addresses:
            found.setdefault(address, []).append(item)
    return found


def holder_of(item: Any, ignored: set[int], depth: int = 0) -> Holder | None:
    """Who refers to `item`; None where no object of Python does: then it is a graph of autograd, or a running function.

    Args:
        ignored: ids of objects that refer to it only while it is looked for.
    """
    owners = gc.get_referrers(item)
    ignored = ignored | {id(owners)}
    best = None
    for owner in owners:  # here and below no comprehension uses `item`: its closure would hold it too
        holder = held_by(item, owner, ignored, depth) if id(owner) not in ignored else None
        if holder is not None and (best is None or (holder.lines and not best.lines)):
            best = holder
    return best


def held_by(item: Any, owner: Any, ignored: set[int], depth: int) -> Holder | None:
    """What `owner` is, in words; None if it says nothing, such as a frame that is just running."""
    if isinstance(owner, dict):
        key, home = name_of(item, owner.items()), home_of(owner)
        if home is not None:
            return named(home, str(key))
        return inside(f"under {key!r} in a dict", owner, ignored, depth)
    if isinstance(owner, CONTAINERS) or type(owner).__name__ == "deque":
        return inside(f"in a {type(owner).__name__}", owner, ignored, depth)
    if isinstance(owner, (GeneratorType, FrameType)):
        code = owner.gi_code if isinstance(owner, GeneratorType) else owner.f_code
        return Holder(f"by a local variable of {code.co_name}")
    if isinstance(owner, CellType):
        return inside("by a variable of a closure", owner, ignored, depth)
    name = name_of(item, attributes(owner))
    return named(owner, name) if name is not None else None


def name_of(item: Any, named_values: Iterable[tuple[Any, Any]]) -> Any:
    for name, value in list(named_values):
        if value is item:
            return name
    return None


def inside(words: str, container: Any, ignored: set[int], depth: int) -> Holder:
    """The same for what lies in a container, which someone holds in turn."""
    outer = holder_of(container, ignored, depth + 1) if depth < MAX_DEPTH else None
    if outer is None:
        return Holder(words + ("" if depth else ", by a local variable or a graph"))
    return Holder(f"{words}, held {outer.words}", outer.lines)


def named(home: Any, name: str) -> Holder:
    """An attribute of an object, or a global of a module, and the lines that fill it."""
    if isinstance(home, ModuleType):
        return Holder(f"by the global '{name}' of {home.__name__}", tuple(filled_at(name, home.__file__)))
    kind = home if isinstance(home, type) else type(home)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return Holder(f"by the attribute '{name}' of {kind.__qualname__}", tuple(filled_at(rf"\.{name}", file)))


def home_of(attributes: dict[Any, Any]) -> Any:
    """The object or module that this is the `__dict__` of."""
    for owner in gc.get_referrers(attributes):
        try:
            if object.__getattribute__(owner, "__dict__") is attributes:
                return owner
        except AttributeError:
            continue
    return None


def attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds by name, in its `__dict__` or its slots, without running any code of its own."""
    try:
        yield from list(object.__getattribute__(owner, "__dict__").items())
    except AttributeError:
        pass
    for kind in type(owner).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            try:
                yield name, object.__getattribute__(owner, name)
            except AttributeError:
                continue


def filled_at(name: str, home: str | None) -> list[str]:
    """At most three lines of this project that assign or add to a name: in its own file, else in the others."""
    pattern = re.compile(rf"(?<![\w'\"]){name}{FILLS}" if not name.startswith("\\") else name + FILLS)
    ours = [path for package in ("data", "model", "loop") for path in sorted((ROOT / package).glob("*.py"))]
    ours += sorted(ROOT.glob("*.py"))
    own = [Path(home)] if home is not None and Path(home).is_relative_to(ROOT) else []
    for paths in (own, ours):
        found = [place for path in paths for place in matches(pattern, path)]
        if found:
            return found[:3]
    return []


def matches(pattern: re.Pattern[str], path: Path) -> list[str]:
    """The lines that add to the name; those that only start it empty come where there is no other."""
    lines = [(number, text) for number, text in enumerate(path.read_text().splitlines(), 1) if pattern.search(text)]
    adding = [line for line in lines if not re.search(r"=\s*(\[\]|\{\}|None|list\(\)|dict\(\)|set\(\))", line[1])]
    return [f"{path.relative_to(ROOT)}:{number}" for number, _ in adding or lines]
