"""Prints what the model writes before and after training, and the reference, for a few held-out rows.

python -m loop.review.samples checkpoints/demo [--rows 2] [--max-tokens 80]
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch

from data.chat import ChatFormat
from data.records import Row, read_rows
from loop import checkpoint
from loop.config import load_config
from loop.errors import run_command
from loop.run import load_tokenizer
from loop.state import load_adapters
from model.build import build
from model.decode.generate import generate
from model.lora import adapters_off
from model.weights.fetch import model_directory


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loop.review.samples", description="Held-out rows, before and after.")
    parser.add_argument("run_dir", type=Path, help="such as checkpoints/demo")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="how many rows (2)")
    parser.add_argument("--max-tokens", type=int, default=80, metavar="N", help="longest answer in tokens (80)")
    args = parser.parse_args()

    path = checkpoint.best(args.run_dir)
    config = load_config(args.run_dir / "config.yaml")
    model_dir = model_directory(config.model.path)
    chat = ChatFormat(load_tokenizer(model_dir), config.data.think)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # the matmuls of one token are too small for several threads
    stage = build(model_dir, config.model.base, config.lora, seed=config.train.seed, device=device, recompute=False)
    load_adapters(stage.adapters(), checkpoint.load(path).adapter)

    rows = [row for row in read_rows(config.data.eval, config.data.sources, config.data.think)
            if isinstance(row, Row) and len(row.turns) == 1]  # one question and one answer
    shown = [rows[i * len(rows) // args.rows] for i in range(min(args.rows, len(rows)))]
    prompts = [prompt_ids(row, chat) for row in shown]
    with adapters_off(stage):
        before = generate(stage, prompts, stop_id=chat.stop_id, max_tokens=args.max_tokens)
    after = generate(stage, prompts, stop_id=chat.stop_id, max_tokens=args.max_tokens)
    print(f"What the model writes on rows it was not trained on, before training and after it ({path}):")
    for row, *answers in zip(shown, before, after):
        show(row, [chat.tokenizer.decode(answer.text_ids) for answer in answers], config.data.eval)


def prompt_ids(row: Row, chat: ChatFormat) -> list[int]:
    text = chat.prompt(row.messages[:-1], thinking=row.turns[-1].thought is not None)
    ids: list[int] = chat.tokenizer(text, add_special_tokens=False).input_ids
    return ids


def show(row: Row, answers: list[str], path: str) -> None:
    """Prints one row: its question, both answers and the reference."""
    *context, reference = row.messages
    print(f"\n{'=' * 100}\n{path}:{row.line}\n{context[-1]['content']}")
    for title, text in zip(("before", "after", "reference"), (*answers, reference["content"])):
        print(f"\n{title}:\n{textwrap.indent(textwrap.fill(' '.join(text.split()), 96), '    ')}")


if __name__ == "__main__":
    run_command(main)
