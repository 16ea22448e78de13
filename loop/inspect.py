"""Shows the rows that will be trained on, token by token, and counts them.

python -m loop.inspect --config configs/4b.yaml [key=value ...] [--rows 3] [--html FILE] [--json] [--dump FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from data.audit import audit, coloured, html_page, table
from data.chat import ChatFormat
from data.records import MAX_SHOWN, OVERLONG, Dropped, described
from data.tokenized import load_rows
from loop.config import Config, load_config
from loop.config.command_line import add_config_arguments
from loop.errors import run_command
from loop.run import load_tokenizer
from model.weights.fetch import model_directory


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loop.inspect", description="Show what will be trained on.")
    add_config_arguments(parser)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many rows to show in colour (3)")
    parser.add_argument("--html", metavar="FILE", help="write the audit and the rows as a page")
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
    number = max(0, min(args.rows, len(splits["train"])))
    shown = [(splits["train"], i * len(splits["train"]) // number) for i in range(number)]
    if args.dump:
        with open(args.dump, "w", encoding="utf-8") as file:
            for split, rows in splits.items():
                for index, line in enumerate(rows.lines_E.tolist()):
                    ids, supervised = (values.tolist() for values in rows.example(index))
                    print(json.dumps({"split": split, "line": line, "ids": ids, "supervised": supervised}), file=file)
    if args.html:
        Path(args.html).write_text(html_page(report, shown, tokenizer), encoding="utf-8")
    if args.json:
        print(json.dumps(report))
        return
    print(table(report))
    for split, rows in splits.items():
        print(problems_of(config, split, rows.problems), end="")
    for rows, index in shown:
        print("\n" + coloured(rows, index, tokenizer))
    for written in (args.dump, args.html):
        if written:
            print(f"wrote {written}", file=sys.stderr)


def problems_of(config: Config, split: str, problems: list[Dropped]) -> str:
    """The first rows of a split that cannot be trained on, a line each, and what becomes of them."""
    if not problems:
        return ""
    refused = any(config.data.refuses(problem.reason == OVERLONG) for problem in problems)
    lines = [described(config.data.file(split), problem) for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"and {len(problems) - MAX_SHOWN:,} more: --json lists all")
    becomes = "a run refuses them; data.bad_rows=skip and data.overlong=drop leave them out" if refused else "they are left out"
    return "\n".join(["", f"{len(problems):,} {split} row(s) cannot be trained on, {becomes}:", *lines, ""])


if __name__ == "__main__":
    run_command(main)
