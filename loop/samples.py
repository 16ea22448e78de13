"""What the model wrote before and after training, beside the reference, for a few held-out rows.

python -m loop.samples checkpoints/demo [--rows 2] [--max-tokens 80]
"""

from __future__ import annotations

import argparse
import textwrap
from contextlib import nullcontext
from pathlib import Path

import torch

from data.chat import ChatFormat
from data.records import Row, read_rows
from loop import checkpoint
from loop.config import Config, load_config
from loop.errors import run_command
from loop.run import load_adapters, load_tokenizer
from model.build import build
from model.fetch import model_directory
from model.generate import generate
from model.lora import adapters_off
from model.quant import kept_dequantized
from model.stages import Stage


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loop.samples", description="Held-out rows, before and after.")
    parser.add_argument("run_dir", type=Path, help="such as checkpoints/demo")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="how many rows (2)")
    parser.add_argument("--max-tokens", type=int, default=80, metavar="N", help="longest answer in tokens (80)")
    args = parser.parse_args()

    path = checkpoint.best(args.run_dir)
    config = load_config(args.run_dir / "config.yaml")
    model_dir = model_directory(config.model.path)
    chat = ChatFormat(load_tokenizer(model_dir), config.data.think)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # one token's matmuls are too small to share
    stage = build(model_dir, config.model.base, config.lora, seed=config.train.seed, device=device, recompute=False)
    load_adapters(stage.adapters(), checkpoint.load(path).adapter)

    print(f"What the model writes on rows it was not trained on, before training and after it ({path}):")
    # on the CPU dequantizing for every token costs most, and memory least
    with kept_dequantized(stage) if device.type == "cpu" else nullcontext():
        for row in held_out(config, args.rows):
            show(row, stage, chat, args.max_tokens, config.data.eval)


def show(row: Row, stage: Stage, chat: ChatFormat, max_tokens: int, path: str) -> None:
    """One row: its question, both answers and the reference."""
    *context, reference = row.messages
    text = chat.prompt(context, thinking=row.turns[-1].thought is not None)
    prompt = chat.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    with adapters_off(stage):
        before = generate(stage, prompt, max_tokens, chat.stop_id)
    after = generate(stage, prompt, max_tokens, chat.stop_id)
    print(f"\n{'=' * 100}\n{path}:{row.line}\n{context[-1]['content']}")
    texts = {"before": chat.tokenizer.decode(before), "after": chat.tokenizer.decode(after), "reference": reference["content"]}
    for title, text in texts.items():
        print(f"\n{title}:\n{textwrap.indent(textwrap.fill(' '.join(text.split()), 96), '    ')}")


def held_out(config: Config, number: int) -> list[Row]:
    """Rows spread over the held-out file, one question and one answer each."""
    rows = [row for row in read_rows(config.data.eval, config.data.sources, config.data.think)
            if isinstance(row, Row) and len(row.turns) == 1]
    return [rows[i * len(rows) // number] for i in range(min(number, len(rows)))]


if __name__ == "__main__":
    run_command(main)
