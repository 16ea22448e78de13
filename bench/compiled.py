"""Compiled elementwise code against the plain functions on this machine's CPU: the demo's model, a step of one microbatch, both
in turns in one process, by CPU time. Also what compiling took: run it twice for the first start and a later one.

python bench/compiled.py --base int8
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python bench/compiled.py --base bf16      # a first start
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from loop.compiling import start_up
from loop.config import load_config
from model.build import build
from model.devices import ON
from model.mixers import Segments
from model.stages import Stage

ROOT = Path(__file__).resolve().parents[1]
LENGTHS, SUPERVISED = (512, 512), 256


def step(stage: Stage) -> float:
    """CPU seconds of forward and backward."""
    began, num = time.process_time(), sum(LENGTHS)
    ids_T = torch.arange(num) * 31 % 40_000
    positions_T = torch.cat([torch.arange(length) for length in LENGTHS])
    cu_seqlens_R1 = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    x_1TD = stage(ids_T[None], positions_T, Segments(cu_seqlens_R1, LENGTHS))
    predict_N = torch.arange(num - SUPERVISED, num)
    stage.losses(x_1TD, predict_N, ids_T[predict_N]).mean().backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="bf16", choices=("bf16", "float32", "int8", "nf4"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = load_config(ROOT / "configs/demo.yaml")
    stage = build(Path(config.model.path).expanduser(), args.base, config.lora, seed=0, device=torch.device("cpu"),
                  recompute=False)
    took: dict[bool, list[float]] = {False: [], True: []}
    for number in range(args.rounds + 1):
        for is_compiled in (False, True):
            ON.clear()
            ON.update({"compiled"} if is_compiled else ())
            seconds = step(stage)
            if number:  # the first of each warms up, and compiles
                took[is_compiled].append(seconds)
        print(start_up() if not number else f"round {number}: {took[False][-1]:.3f} s plain, {took[True][-1]:.3f} s compiled")
    ratios = [plain / fast for plain, fast in zip(took[False], took[True])]
    print(f"{args.base}: {statistics.median(ratios):.3f} times as fast (median of {args.rounds}), {sum(LENGTHS)} tokens a step")


if __name__ == "__main__":
    main()
