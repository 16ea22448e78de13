"""The memory targets, by the planner: each a true model on cards of its own, without weights and without a GPU.

python bench/memory.py            # prints the table; takes a few minutes
python bench/memory.py --write    # and puts it into bench/README.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from report import write

ROOT = Path(__file__).resolve().parents[1]
B4, B35 = "configs/4b.yaml", "configs/35b.yaml"
TARGETS = [  # what, GiB at most, arguments
    ("4B, int8, LoRA 64, 8,192 tokens, each of two cards", 8.0, ["--config", B4]),
    ("35B, nf4, LoRA 8, 8,192 tokens, one card", 24.0, ["--config", B35, "--split", "none"]),
    ("35B, nf4, two stages, 80 rows a step, gpipe", 25.0, ["--config", B35, "pipeline.schedule=gpipe"]),
    ("the same with 1f1b", 13.5, ["--config", B35, "pipeline.schedule=1f1b"]),
    ("35B, int8, two stages, 1f1b", 21.0, ["--config", B35, "pipeline.schedule=1f1b", "model.base=int8"]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    args = parser.parse_args()
    lines = ["| | at most, GiB | planned, by rank | if all tokens go to the same experts | fullest in | seconds |",
             "|---|---|---|---|---|---|"]
    missed = False
    for what, limit, arguments in TARGETS:
        started = time.perf_counter()
        command = [sys.executable, "-m", "loop.plan", *arguments, "--device", "cuda", "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        ranks = json.loads(done.stdout)["ranks"]
        peaks, worst = ([rank[key] for rank in ranks] for key in ("peak_gib", "worst_routing_gib"))
        fullest = max(ranks, key=lambda rank: rank["peak_gib"])
        missed |= max(peaks) > limit
        lines.append(
            f"| {what} | {limit} | {', '.join(f'{gib:.2f}' for gib in peaks)} | {', '.join(f'{gib:.2f}' for gib in worst)} | "
            f"{fullest['moment']}, {fullest['module']} | {time.perf_counter() - started:.0f} |")
        print(lines[-1], flush=True)
    if args.write:
        write("memory", "\n".join(lines))
    sys.exit(missed)


if __name__ == "__main__":
    main()
