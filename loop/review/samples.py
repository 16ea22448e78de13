"""Prints what a run wrote for held-out rows before training and at its end, beside the references.
Reads the run's samples.jsonl; needs no model.

python -m loop.review.samples checkpoints/demo
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from loop.errors import run_command
from loop.line_file import SAMPLES_FILE, read_metrics

LONGEST = 300  # characters shown of a text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loop.review.samples", description="Held-out rows, before and after.")
    parser.add_argument("run_dir", type=Path, help="such as checkpoints/demo")
    path = parser.parse_args().run_dir / SAMPLES_FILE
    records = read_metrics(path) if path.exists() else []
    if not records:
        raise ValueError(f"{path}: no answers there. A run writes them where its configuration has eval.samples=2, say")
    first, last = records[0]["step"], records[-1]["step"]
    print(f"What the model wrote on rows it is not trained on, at step {first} and at step {last} (all steps: {path}):")
    answers = {(record["step"], record["line"]): record["answer"] for record in records}
    for record in records:
        if record["step"] == last and (first, record["line"]) in answers:
            question = record["prompt"].rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
            print(f"\n{'=' * 100}\nheld-out line {record['line']}\n{question}")
            shown = {"before": answers[first, record["line"]], "after": record["answer"], "reference": record["reference"]}
            for title, text in shown.items():
                print(f"\n{title}:\n" + textwrap.indent(textwrap.fill(textwrap.shorten(text, LONGEST), 96), "    "))


if __name__ == "__main__":
    run_command(main)
