"""Writes a random checkpoint of a real architecture (see model/tiny/write.py).

python -m model.tiny OUT --layout fused|per-expert|fp8 [--kind qwen3_5_moe|qwen3_moe|qwen3|llama] [--scale S]
                         [--tokenizer DIR] [--seed N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model.tiny.write import DEFAULT_SCALE, KINDS, LAYOUTS, write_tiny


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.tiny", description="Write a random checkpoint.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="fused")
    parser.add_argument("--kind", choices=KINDS, default="qwen3_5_moe")
    parser.add_argument("--scale", type=float, default=DEFAULT_SCALE, help="fraction of the true widths and experts")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer to use in place of the bytes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        out = write_tiny(options.out, options.kind, options.layout, options.scale, options.tokenizer, options.seed)
    except ValueError as error:
        parser.error(str(error))
    num_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{out}: {options.kind}, {options.layout}, {num_bytes / 1e6:,.1f} MB of weights")


if __name__ == "__main__":
    main()
