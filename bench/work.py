"""What steps of the true models ask of a card: launches and bytes, counted, and the time that they are predicted to take.
Both with the fast paths that an RTX 5090 takes now and with those of before, without weights and without a GPU.

python bench/work.py            # prints the table; takes some minutes
python bench/work.py --write    # and puts it into bench/README.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Callable

from report import write

from loop.config import load_config
from loop.paths import PATHS
from loop.plan.pieces import Pieces
from loop.run import find_model
from model.build import text_config
from model.devices import OFF, without

ROOT = Path(__file__).resolve().parents[1]
B4, B35 = "configs/4b.yaml", "configs/35b.yaml"
TOKENS, ROW, SUPERVISED, EPOCH_TOKENS = 8192, 1730, 0.35, 40.5e6
BEFORE = {"attention", "delta_rule", "int8", "nf4", "lora_gradients", "adamw8bit"}  # paths that an RTX 5090 took before
PLAIN = set(PATHS) - BEFORE


def counted(config_file: str) -> tuple[dict[str, float], dict[str, float]]:
    """Launches and bytes of a microbatch of the whole model on sm_120, by purpose; bytes by token and layer."""
    config = load_config(ROOT / config_file, [])
    model = find_model(config.model.path)[0]
    num_layers = text_config(model).num_hidden_layers
    rows = (ROW,) * (TOKENS // ROW)
    pieces = Pieces(config, model, "cuda", 12, (*rows, TOKENS - sum(rows)), int(SUPERVISED * TOKENS))
    num_launches, num_bytes = defaultdict[str, float](float), defaultdict[str, float](float)
    layers = Counter(pieces.layers(0, 2 * num_layers, 0))
    counts = [*((pieces.layer(layer), number) for layer, number in layers.items()), (pieces.embedding(), 1), (pieces.loss(), 1)]
    for operations, times in counts:
        for operation in operations:
            num_launches[operation.purpose] += times * operation.work.launches
            num_bytes[operation.purpose] += times * operation.work.num_bytes
    return num_launches, {purpose: number / TOKENS / num_layers for purpose, number in num_bytes.items()}


def planned(*arguments: str) -> dict[str, float]:
    """What the planner says of two RTX 5090."""
    command = [sys.executable, "-m", "loop.plan", *arguments, "--card", "rtx5090", "--row-tokens", str(ROW), "--json"]
    done = subprocess.run([*command, "--without", ",".join(OFF)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    answer = json.loads(done.stdout)
    return answer["fit"][0] if "fit" in answer else answer["time"]


def launches(config_file: str, *off: str) -> float:
    with ExitStack() as stack:
        for path in off:
            stack.enter_context(without(path))
        return sum(counted(config_file)[0].values())


# what is counted, how, its format, and what this command counted at a492850, before the work on it (0: not counted)
ROWS: list[tuple[str, Callable[[], float], str, float]] = [
    ("launches of a 35B microbatch of 8,192 tokens", lambda: launches(B35), ",.0f", 156_630),
    ("the same without flash-linear-attention", lambda: launches(B35, "delta_rule"), ",.0f", 251_804),
    ("MB moved by elementwise work, a token and layer of the 4B", lambda: counted(B4)[1]["elementwise"] / 1e6, ".2f", 1.99),
    ("4B, 80 rows of 1,730 tokens, two cards: s a step as configured", lambda: planned("--config", B4)["step_s"], ".1f", 15.6),
    ("the same with the settings that --fit finds", lambda: planned("--config", B4, "--fit")["step_s"], ".1f", 11.5),
    ("35B on two cards: hours for 40.5 M tokens as configured, with 1f1b", lambda: EPOCH_TOKENS / 3600 / planned(
        "--config", B35)["tokens_per_s"], ".2f", 1.81),
    ("the same with the settings that --fit finds", lambda: EPOCH_TOKENS / 3600 / planned(
        "--config", B35, "--fit")["tokens_per_s"], ".2f", 0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    args = parser.parse_args()
    off = ", ".join(sorted(PLAIN))
    lines = [f"{date.today()}, by the plan of RTX 5090s; the column in the middle without the fast paths named there.", "",
             f"| RTX 5090 | at a492850 | now, without {off} | now | now / a492850 |", "|---|---|---|---|---|"]
    print("\n".join(lines))
    for what, function, form, base in ROWS:
        OFF.update(PLAIN)
        before = function()
        OFF.clear()
        now = function()
        first, ratio = (f"{base:{form}}", f"{now / base:.2f}") if base else ("", "")
        lines.append(f"| {what} | {first} | {before:{form}} | {now:{form}} | {ratio} |")
        print(lines[-1], flush=True)
    if args.write:
        write("work", "\n".join(lines))


if __name__ == "__main__":
    main()
