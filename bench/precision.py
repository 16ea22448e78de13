"""Measures what precision costs: the same training in float32, bf16, int8 and nf4, and the held-out losses at the same steps.
Each is a run of train.py from the same seed over the same rows; finished runs are not made again.

python bench/precision.py                  # the demo's model, 10 minutes on 2 cores; prints the table
python bench/precision.py --seeds 2        # also with another seed, so that noise can be told from precision
python bench/precision.py --config configs/4b.yaml --bases bf16 int8 nf4 data.train=my/train.jsonl data.eval=my/eval.jsonl
python bench/precision.py --write          # also puts the table into bench/README.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from report import machine, write

REPO = Path(__file__).resolve().parent.parent
BASES = ("float32", "bf16", "int8", "nf4")
FIRST_SEED = 42

Losses = dict[int, float]  # held-out loss by step


def run(config: str, base: str, seed: int, steps: int, every: int, settings: list[str]) -> Losses:
    """Trains once, below checkpoints/ of the current directory, and reads the losses."""
    name = f"precision-{base}-seed{seed}"
    command = [sys.executable, str(REPO / "train.py"), "--config", config, f"train.max_steps={steps}", f"eval.every={every}",
               "checkpoint.keep=1", "eval.samples=0", "train.plan=false", *settings, f"run={name}", f"model.base={base}",
               f"train.seed={seed}"]
    print(f"{name} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}")
    lines = map(json.loads, Path("checkpoints", name, "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def table(losses: dict[str, list[Losses]]) -> str:
    """A line each precision: its losses by step, and how much higher they are than the first precision's of the same seed."""
    first = next(iter(losses))
    steps = sorted(losses[first][0])
    lines = ["| | " + " | ".join(f"step {step}" for step in steps) + f" | above {first} at the end |",
             "|---|" + "---|" * (len(steps) + 1)]
    for base, runs in losses.items():
        above = [run[steps[-1]] - other[steps[-1]] for run, other in zip(runs, losses[first])]
        cells = [f"{statistics.mean(run[step] for run in runs):.4f}" for step in steps]
        lines.append(f"| {base} | {' | '.join(cells)} | {'' if base == first else ', '.join(f'{x:+.4f}' for x in above)} |")
    spread = [max(values) - min(values) for values in zip(*([run[steps[-1]] for run in runs] for runs in losses.values()))]
    seeds = [run[steps[-1]] for run in losses[first]]
    noise = f" Between seeds {first} differs by {max(seeds) - min(seeds):.4f} at the end." if len(seeds) > 1 else ""
    return "\n".join(lines) + f"\n\nBetween precisions the last loss differs by {max(spread):.4f} at most.{noise}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for train.py")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES, help="the others are compared with the first")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=4, help="steps from one held-out loss to the next")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    args = parser.parse_intermixed_args()
    losses: dict[str, list[Losses]] = {base: [] for base in args.bases}
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
        for base, runs in losses.items():
            runs.append(run(args.config, base, seed, args.steps, args.every, args.settings))
    text = (f"{machine('transformers', 'bitsandbytes')}\n{args.config} {' '.join(args.settings)}".rstrip()
            + f", {args.steps} steps, {args.seeds} seed(s): held-out losses, means.\n\n{table(losses)}")
    print(text)
    if args.write:
        write("precision", text)


if __name__ == "__main__":
    main()
