"""Measures what a run pays for checkpoints, and for memory marks and metrics: the same step with and without, in turns.
One process, the demo's model, one batch again and again; only the ratios count.

python bench/overhead.py [key=value ...]    # prints the table, about 5 minutes on 2 cores; settings as for train.py
python bench/overhead.py --write            # also puts it into bench/README.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from report import machine, write

from loop.accumulate import forward_backward
from loop.config import load_config
from loop.memory.phases import Memory
from loop.optim import sync_and_clip
from loop.run import earlier_start, load_batches, load_state, prepare_directory, start
from loop.state import resume, save

REPO = Path(__file__).resolve().parent.parent
EVERY = 50  # steps from one checkpoint to the next
SETTINGS = ["run=overhead", "log=/dev/null", f"data.train={REPO / 'data/demo/train.jsonl'}", "model.base=bf16",
            f"data.eval={REPO / 'data/demo/eval.jsonl'}", "eval.samples=0", "train.rows_per_step=4", "train.plan=false"]


class NoMemory:
    """In place of `Memory`: marks nothing."""

    def during(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    step = during


class Bench:
    """A run that is ready for its first step."""

    def __init__(self, settings: list[str]) -> None:
        self.config = load_config(REPO / "configs/demo.yaml", [*SETTINGS, *settings])
        self.ranks, model_dir, self.log = start(self.config)
        prepare_directory(self.config, print)
        batches, held_out, chat = load_batches(self.config, model_dir, self.ranks)
        self.memory = Memory(self.ranks.device)
        earlier = earlier_start(self.config, model_dir, batches, held_out, self.ranks, print)
        self.state = load_state(self.config, model_dir, earlier, chat, self.ranks, self.memory, print)
        resume(self.config, self.state, self.ranks, print)
        self.log.start(0, 10**6)
        self.log.say = lambda line, on_bar=False: None  # type: ignore[method-assign]
        self.batch = next(iter(batches.train_steps(0, 1, 0)))
        for _ in range(3):
            self.step(True)  # the first two are counted by a ledger

    def step(self, marked: bool) -> float:
        """Seconds of one step, as `fit` makes it."""
        started, state = time.perf_counter(), self.state
        memory: Any = self.memory if marked else NoMemory()
        with memory.step(self.batch):
            loss = forward_backward(state.stage, memory, self.batch).sum().item()
            with memory.during("sync"):
                norm = sync_and_clip(state.adapters.values(), 1.0, self.ranks).item()
            with memory.during("update"):
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if marked:
            self.record(loss, norm)
        return time.perf_counter() - started

    def record(self, loss: float, norm: float) -> None:
        self.log.step(self.batch, 10**6, loss=loss, lr=0.0, grad_norm=norm, skipped=False, step_s=1.0,
                      memory=self.memory, marks=self.memory.marks(self.ranks))

    def marks_alone(self) -> float:
        """Seconds of all that a step records when nothing is computed."""
        started, phases = time.perf_counter(), ["forward", "loss", "backward"] * len(self.batch.microbatches)
        with self.memory.step(self.batch):
            for phase in (*phases, "sync", "update"):
                with self.memory.during(phase):
                    pass
        self.record(1.0, 1.0)
        return time.perf_counter() - started

    def block(self, saves: bool, steps: int) -> tuple[float, float]:
        """Seconds of a few steps after a checkpoint has begun, or of as many without one; and for how long it held them up."""
        started = time.perf_counter()
        if saves:
            self.log.sync()
            save(self.config, self.state, 1.0, self.ranks, self.log.say)
        held_s = time.perf_counter() - started
        for _ in range(steps):
            self.step(True)
        self.state.writer.wait()  # else what it still writes would count for the next block
        return time.perf_counter() - started, held_s


def measure(bench: Bench, rounds: int, steps: int) -> str:
    extra_s, held_s, written_s, marks = [], [], [], []
    for number in range(rounds):
        order = (True, False) if number % 2 else (False, True)
        took = {saves: bench.block(saves, steps) for saves in order}
        extra_s.append(took[True][0] - took[False][0])
        held_s.append(took[True][1])
        written_s.append(took[False][0] / steps)
        pairs = [{marked: bench.step(marked) for marked in order} for _ in range(steps)]
        marks += [100 * (pair[True] / pair[False] - 1) for pair in pairs]
    step_s, alone_s = statistics.median(written_s), statistics.median(bench.marks_alone() for _ in range(200))
    share, held = (100 * statistics.median(values) / (EVERY * step_s) for values in (extra_s, held_s))
    noise = 1.25 * statistics.stdev(marks) / len(marks) ** 0.5  # the standard error of a median
    size = sum(file.stat().st_size for file in max(bench.config.run_dir.glob("step-*")).iterdir())
    lines = ["| | costs | at most |", "|---|---|---|",
             f"| a checkpoint of {size / 1e6:.0f} MB every {EVERY} steps of {step_s:.2f} s, against none | {share:.2f} % "
             f"(the loop was held up for {held:.2f} %) | 1 % |",
             f"| memory marks and metrics, against none | {statistics.median(marks):.2f} +- {noise:.2f} % (alone they "
             f"take {1e3 * alone_s:.2f} ms, {100 * alone_s / step_s:.3f} %) | 0.5 % |"]
    return f"{machine('transformers')}\n{rounds} rounds in turns, medians.\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="of a block: long enough for a checkpoint to be written")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    args = parser.parse_intermixed_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        text = measure(Bench(args.settings), args.rounds, args.steps)
        print(text)
        os.chdir(REPO)
    if args.write:
        write("overhead", text)


if __name__ == "__main__":
    main()
