"""Writes any number of coaching rows from legal chess positions: `python -m data.demo OUT_DIR --train N --eval M`.
Rows are written as they are made; the used positions take about 100 bytes a row. Every statement in a row is computed
from its board. The committed rows in `data/demo/` are what `python -m data.demo data/demo` writes."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

NUM_TRAIN, NUM_EVAL, SEED = 640, 48, 1


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]], num_rows: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in tqdm(rows, desc=str(path), total=num_rows, unit="row", disable=None):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_rows(out_dir: Path, num_train: int, num_eval: int, seed: int = SEED, long: bool = False) -> None:
    """Writes `train.jsonl` and `eval.jsonl`; the same arguments give the same bytes.

    The evaluation rows are made first, so that the training rows can leave their positions out.

    Args:
        out_dir: made if missing; files of these names are replaced.
        num_train: number of training rows.
        num_eval: number of evaluation rows.
        seed: each seed gives other games.
        long: rows of about 1,730 tokens (Qwen3) instead of about 150 (SmolLM2).

    Raises:
        ModuleNotFoundError: without python-chess.
    """
    from data.demo.rows import make_rows
    out_dir.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    for split, num_rows in (("eval", num_eval), ("train", num_train)):
        write_jsonl(out_dir / f"{split}.jsonl", make_rows(num_rows, f"{seed}/{split}", long, used), num_rows)


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} rows; expected 0 or more")
    return number


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.demo", description="Write chess coaching rows as JSONL.")
    parser.add_argument("out_dir", type=Path, help="train.jsonl and eval.jsonl are written here")
    parser.add_argument("--train", type=count, default=NUM_TRAIN, help="number of training rows (default %(default)s)")
    parser.add_argument("--eval", type=count, default=NUM_EVAL, help="number of evaluation rows (default %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="other seeds, other games (default %(default)s)")
    parser.add_argument("--long", action="store_true", help="rows of about 1,730 tokens instead of about 150")
    given = parser.parse_args(args)
    try:
        write_rows(given.out_dir, given.train, given.eval, given.seed, given.long)
    except ModuleNotFoundError as error:
        if error.name != "chess":
            raise
        sys.exit("data.demo needs python-chess: pip install chess")
    print(f"{given.out_dir}: {given.train} training and {given.eval} evaluation rows")


if __name__ == "__main__":
    main()
