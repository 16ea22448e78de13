"""Shows the rows that will be trained on, token by token, and counts them.

python -m loop.inspect --config configs/4b.yaml [key=value ...] [--rows 3] [--html FILE] [--json] [--dump FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.audit import audit, coloured, fullness, runs, table
from data.chat import ChatFormat
from data.records import MAX_SHOWN, OVERLONG, Dropped, described, evenly
from data.tokenized import TokenizedRows, load_rows
from loop.config import Config, load_config
from loop.config.command_line import add_config_arguments
from loop.errors import run_command
from loop.pages import document
from loop.run import load_tokenizer
from model.weights.fetch import model_directory

PAGE = Path(__file__).with_suffix(".html")
ROWS, ROWS_OF_PAGE = 3, 200


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loop.inspect", description="Show what will be trained on.")
    add_config_arguments(parser)
    parser.add_argument("--rows", type=int, metavar="N", help=f"how many rows to show in colour: here ({ROWS}), or, "
                        f"with --html, in the page alone ({ROWS_OF_PAGE})")
    parser.add_argument("--html", metavar="FILE", help="write the audit and the rows as a page, with a search")
    parser.add_argument("--json", action="store_true", help="print the audit for machines, and nothing else")
    parser.add_argument("--dump", metavar="FILE", help="write ids and mask of every example, one JSON line each")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)

    tokenizer = load_tokenizer(model_directory(config.model.path, weights=False))
    cache = config.run_dir / "data"
    # no row ends the audit: those that a run would refuse are listed
    lenient = replace(config.data, bad_rows="skip", overlong="truncate" if config.data.overlong == "truncate" else "drop")
    splits = {split: load_rows(split, tokenizer, lenient, cache) for split in ("train", "eval")}
    report = audit(splits, ChatFormat(tokenizer, config.data.think).stop_id)
    report["microbatches"] = filled = microbatches(config, splits["train"])
    number = args.rows if args.rows is not None else ROWS_OF_PAGE if args.html else ROWS
    shown = evenly(range(len(splits["train"])), max(0, number))
    if args.dump:
        with open(args.dump, "w", encoding="utf-8") as file:
            for split, rows in splits.items():
                for index, line in enumerate(rows.lines_E.tolist()):
                    ids, supervised = (values.tolist() for values in rows.example(index))
                    print(json.dumps({"split": split, "line": line, "ids": ids, "supervised": supervised}), file=file)
    if args.html:
        Path(args.html).write_text(page(config, report, splits, shown, tokenizer), encoding="utf-8")
    if args.json:
        print(json.dumps(report))
        return
    print(f"{table(report)}\n{in_words(filled)}")
    for split, rows in splits.items():
        print(problems_of(config, split, rows.problems), end="")
    for index in [] if args.html else shown:
        print("\n" + coloured(splits["train"], index, tokenizer))
    for written in (args.dump, args.html):
        if written:
            print(f"wrote {written}", file=sys.stderr)


def problems_of(config: Config, split: str, problems: list[Dropped]) -> str:
    """The first rows of a split that cannot be trained on, a line each, and what becomes of them."""
    if not problems:
        return ""
    lines = [described(config.data.file(split), problem) for problem in sorted(problems, key=lambda p: p.line)[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"and {len(problems) - MAX_SHOWN:,} more: --json lists all")
    return "\n".join(["", f"{len(problems):,} {split} row(s) cannot be trained on, {fate(config, problems)}:", *lines, ""])


def fate(config: Config, problems: list[Dropped]) -> str:
    """What becomes of rows that cannot be trained on."""
    refused = any(config.data.refuses(problem.reason == OVERLONG) for problem in problems)
    return "a run refuses them; data.bad_rows=skip and data.overlong=drop leave them out" if refused else "they are left out"


def microbatches(config: Config, rows: TokenizedRows) -> dict[str, Any]:
    """How full they are, as `fullness` says; or the `problem`: a row that fits into none."""
    train = config.train
    try:
        return fullness(rows, train.rows_per_step, train.microbatch_tokens, train.seed)
    except ValueError as error:
        return {"problem": str(error)}


def in_words(filled: dict[str, Any]) -> str:
    """What `microbatches` found, in a sentence."""
    if "problem" in filled:
        return filled["problem"]
    numbers, num_steps = filled["microbatches_per_step"], filled["steps_per_epoch"]
    least, most = f"{numbers['least']:,}", f"{numbers['most']:,}"
    spread = most if least == most else f"{least} to {most}, on average {numbers['mean']:.3g},"
    steps = f"an epoch's {num_steps:,} step{'s' * (num_steps != 1)}"
    if filled["steps"] < num_steps:
        steps = f"the first {filled['steps']:,} of {steps}"
    return (f"{filled['tokens_share']:.1%} of the positions in microbatches hold tokens, the rest is padding; {spread} "
            f"microbatch{'es' * (most != '1')} a step on one device, over {steps}")


def page(config: Config, report: dict[str, Any], splits: dict[str, TokenizedRows], shown: list[int], tokenizer: Any) -> str:
    """The audit and the `shown` training examples as one self-contained HTML page."""
    rows, data = splits["train"], config.data
    held_out = f"{data.eval} of its rows held out" if data.held_out is not None else f"held-out rows: {data.eval}"
    return document("What will be trained on", PAGE.read_text(encoding="utf-8"), {
        "of": f"{data.train}; {held_out}; data.think={data.think}; tokens as {config.model.path} reads them", "report": report,
        "examples": len(rows), "fullness": in_words(report["microbatches"]),
        "files": {split: config.data.file(split) for split in splits},
        "fate": fate(config, [problem for split in splits.values() for problem in split.problems]),
        "limits": {"data.max_tokens": config.data.max_tokens, "train.microbatch_tokens": config.train.microbatch_tokens},
        "rows": [{"line": int(rows.lines_E[index]), "source": rows.sources[int(rows.sources_E[index])],
                  "tokens": int(rows.lengths_E[index]), "parts": list(runs(rows, index, tokenizer))} for index in shown]})


if __name__ == "__main__":
    run_command(main)
