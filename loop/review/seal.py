"""Binds a verdict to what it was made from, and says what no longer holds. The module prints in one line whether there is a go.
Reads the files once; for the chat template it loads a tokenizer, but no model.

python -m loop.review.seal checkpoints/NAME
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import sha256
from loop.checkpoint import MANIFEST, read_json
from loop.errors import run_command

if TYPE_CHECKING:
    from loop.review.pairs import Review

GONE = "is not there any more"


def seal(review: Review) -> dict[str, str]:
    """SHA-256 of everything that a verdict rests on, by name."""
    from loop.review.pairs import RULES, SECRET, VOTES

    run_dir, described = review.directory.parent, review.described
    sums = {}
    for path in map(Path, described["checkpoints"]):
        for file in (*sorted(path.iterdir() if path.is_dir() else ()), path / MANIFEST):
            sums[str(file)] = sum_of(file)
    for file in (run_dir / "config.yaml", *(review.directory / name for name in (RULES, SECRET, VOTES, "review.json"))):
        sums[str(file)] = sum_of(file)
    held_out = Path(described["eval"]).expanduser()
    lines = held_out.read_bytes().split(b"\n") if held_out.is_file() else []
    for pair in review.pairs.values():
        sums[f"{described['eval']}:{pair.line}"] = (
            hashlib.sha256(lines[pair.line - 1]).hexdigest() if pair.line <= len(lines) else GONE)
    sums[f"chat template of {described['model']}"] = template_sum(described["model"])
    return sums


def sum_of(file: Path) -> str:
    return sha256(file) if file.is_file() else GONE


def template_sum(model: str) -> str:
    from loop.run import load_tokenizer
    from model.weights.fetch import from_cache

    directory = Path(model).expanduser() if Path(model).expanduser().is_dir() else from_cache(model, False)
    if directory is None:
        return GONE
    return hashlib.sha256(str(load_tokenizer(directory).chat_template).encode()).hexdigest()


def broken(review: Review, verdict: dict[str, Any], judged: dict[str, Any]) -> list[str]:
    """What of a verdict no longer holds, each in a line.

    Args:
        judged: the judgement that the files give now.
    """
    sealed, now = verdict["seal"], seal(review)
    problems = [f"{name}: " + (GONE if now.get(name, GONE) == GONE else "is new" if name not in sealed else "was changed")
                for name in sorted(sealed.keys() | now.keys()) if sealed.get(name) != now.get(name)]
    judged = json.loads(json.dumps(judged))
    problems += [f"{review.directory / 'verdict.json'}: {key} is " + (
        "not what the votes give now" if isinstance(value, (list, dict)) else f"{verdict.get(key)}, computed again {value}")
        for key, value in judged.items() if verdict.get(key) != value]
    return problems


def one_line(run_dir: Path) -> str:
    """Whether there is a go, for who starts the next run."""
    path = run_dir / "review" / "verdict.json"
    try:
        verdict = read_json(path)
        decided = "GO" if verdict["go"] else "NO GO"
        return (f"{path}: {decided}, {verdict['votes']} votes by {verdict['reviewer']} on {verdict['date']}; whether it still "
                f"holds: bash launch.sh review {run_dir} --verify")
    except (ValueError, KeyError):
        return f"no verdict on {run_dir} yet: bash launch.sh review {run_dir}"


if __name__ == "__main__":
    run_command(lambda: print(one_line(Path(sys.argv[1]))))
