"""Predicted against measured seconds of a step on this CPU: the demo's model and two tiny ones, in one thread.
Compares CPU seconds, which other processes change little. With --threads N it compares wall seconds, and discards a case
whose wall time is more than BUSY times its CPU time by thread.

python bench/prediction.py            # prints the table, 12 minutes; needs `python -m model.smollm2`
python bench/prediction.py --write    # and puts it into bench/README.md
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from report import write

from data.batches import Batches
from loop.accumulate import forward_backward
from loop.config import Config, load_config
from loop.memory.phases import Memory
from loop.optim import make_optimizer, sync_and_clip
from loop.pipeline.split import RowLengths
from loop.plan.fakes import RehearsedRanks
from loop.plan.seconds import Forecast, Shape, StepTime
from loop.plan.workload import Workload, read_rows
from loop.rates import measure
from loop.run import find_model
from model.build import build
from model.tiny.write import write_tiny

ROOT = Path(__file__).resolve().parents[1]
CPU, BUSY = torch.device("cpu"), 1.25
TINY = {"llama": {}, "qwen3_5_moe": {"hidden_size": 128, "num_experts": 8, "num_experts_per_tok": 2}}
TARGETS = {"llama": "[q_proj,v_proj,down_proj]", "qwen3_5_moe": "[q_proj,v_proj,out_proj]"}
CASES = [  # a model and settings
    ("SmolLM2-135M", ["model.base=bf16"]), ("SmolLM2-135M", ["model.base=bf16", "train.recompute=true"]),
    ("SmolLM2-135M", ["model.base=int8"]), ("SmolLM2-135M", ["model.base=nf4", "train.recompute=true"]),
    ("SmolLM2-135M", ["model.base=float32"]), ("llama", ["model.base=float32"]), ("qwen3_5_moe", ["model.base=nf4"])]


def predicted(config: Config, model: Path, workload: Workload, num_threads: int) -> StepTime:
    rates = measure(config, model, CPU, Shape.of(workload).lengths, num_threads)
    return Forecast(workload, rates).step((), config.train.keep_layers)


def measured(config: Config, model: Path, workload: Workload, num_steps: int) -> tuple[float, float]:
    """Mean CPU and wall seconds of the steps after the first."""
    assert workload.rows is not None
    torch.manual_seed(0)
    stage = build(model, config.model.base, config.lora, seed=0, device=CPU, recompute=config.train.recompute)
    parameters = list(stage.adapters().values())
    optimizer = make_optimizer(config.train.optimizer, parameters, config.train.weight_decay)
    batches = Batches(workload.rows, config.train.rows_per_step, config.train.microbatch_tokens)
    memory, took = Memory(CPU), []
    for batch in batches.train_steps(0, num_steps + 1, config.train.seed):
        started = time.process_time(), time.perf_counter()
        forward_backward(stage, memory, batch)
        sync_and_clip(parameters, config.train.max_grad_norm, RehearsedRanks())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        took.append((time.process_time() - started[0], time.perf_counter() - started[1]))
    cpu_s, wall_s = (statistics.fmean(seconds) for seconds in zip(*took[1:]))
    return cpu_s, wall_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of a prediction and a measurement, one right after the other")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [f"{date.today()}. {platform.processor() or platform.machine()}, {args.threads} thread(s), torch "
             f"{torch.__version__}; the mean of {args.steps} steps after the first, medians of {args.rounds} rounds (least to "
             "most).", "",
             "| | | predicted, s | measured, s | predicted / measured | of it most |", "|---|---|---|---|---|---|"]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as scratch:
        for name, settings in CASES:
            path = [] if name not in TINY else [
                f"model.path={write_tiny(Path(scratch) / name, kind=name, **TINY[name])}", f"lora.target={TARGETS[name]}"]
            config = load_config(ROOT / "configs/demo.yaml", [*settings, *path, "train.rows_per_step=8",
                                                              "train.microbatch_tokens=1024"])
            model, _ = find_model(config.model.path)
            rows = read_rows(config, model)
            workload = Workload(config, model, "cpu", 1, 1, rows, RowLengths.of(rows)) if rows else None
            assert workload is not None, "the demo's rows are not here"
            pairs: list[tuple[float, float]] = []
            for _ in range(3 * args.rounds):
                forecast = predicted(config, model, workload, args.threads)
                cpu_s, wall_s = measured(config, model, workload, args.steps)
                if args.threads > 1 and wall_s * args.threads > BUSY * cpu_s:
                    print(f"discarded: the machine is busy ({wall_s:.3f} s, {cpu_s:.3f} CPU seconds)", flush=True)
                    continue
                pairs.append((forecast.seconds, cpu_s if args.threads == 1 else wall_s))
                if len(pairs) == args.rounds:
                    break
            if not pairs:
                sys.exit("the machine was busy all the time")
            before_s, took_s = (statistics.median(seconds) for seconds in zip(*pairs))
            ratios = sorted(forecast_s / step_s for forecast_s, step_s in pairs)
            most = max(forecast.by_purpose, key=lambda purpose: forecast.by_purpose[purpose])
            lines.append(f"| {name} | {' '.join(settings)} | {before_s:.3f} | {took_s:.3f} | {statistics.median(ratios):.2f} "
                         f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {most} |")
            print(lines[-1], flush=True)
    if args.write:
        write("prediction", "\n".join(lines))


if __name__ == "__main__":
    main()
