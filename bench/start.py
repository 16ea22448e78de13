"""Measures against TRL's SFTTrainer how long rows take to prepare, and how long a command takes to its first step.
Each run is a fresh process with the same rows and the demo's model; both sides in turns.

python bench/start.py             # prints the tables, about 20 minutes on 2 cores
python bench/start.py --rows 500  # a quick try
python bench/start.py --write     # also puts them into bench/README.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import machine, write
from vs_trl import trl_trainer

REPO = Path(__file__).resolve().parent.parent
MAX_TOKENS = 8192
BEGIN = "begins:"
BASE = 500  # rows that are made; more rows are these again, under other numbers


def write_rows(directory: Path, num_rows: int) -> Path:
    """Rows of about 1,730 tokens, as this project's own."""
    command = [sys.executable, "-m", "data.demo", directory / "base", "--train", str(BASE), "--eval", "20", "--long"]
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    read = map(json.loads, (directory / "base/train.jsonl").read_text().splitlines())
    made = [row["messages"] for row in read if row["metadata"]["source"] == "textbook"]
    rows = directory / "rows.jsonl"
    with open(rows, "w") as file:
        for number, (*before, question, answer) in zip(range(num_rows), itertools.cycle(made)):
            messages = [*before, {**question, "content": f"{question['content']}\nPosition {number}."}, answer]
            file.write(json.dumps({"messages": messages, "metadata": {"source": "textbook"}}) + "\n")
    return rows


# ---- the two sides, each in a process of its own ----

def prepare(rows: str, model_dir: str) -> None:
    """What a first start does with its rows."""
    from data.records import DataConfig
    from data.tokenized import load_rows
    from loop.run import load_tokenizer

    tokenizer, config = load_tokenizer(Path(model_dir)), DataConfig(train=rows, eval=rows, sources=("textbook",))
    started = time.perf_counter()
    made = load_rows("train", tokenizer, config, Path("checkpoints/start/data"))
    print(BEGIN, json.dumps([time.perf_counter() - started, len(made), len(made.ids_N)]), flush=True)


def trl(rows: str, model_dir: str, num_proc: str) -> None:
    """Prepares rows as vs_trl.py has TRL do it, from a file, so that a second start finds what the first has made; ends where
    the first step begins."""
    import datasets
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class Stop(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            print(BEGIN, json.dumps(result), flush=True)
            os._exit(0)

    class Clocked(SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            result.extend([time.perf_counter() - started, len(prepared)])
            return prepared

    result: list[float] = []
    pairs = Path("pairs.jsonl")
    if not pairs.exists():
        messages = [json.loads(line)["messages"] for line in Path(rows).read_text().splitlines()]
        pairs.write_text("".join(json.dumps({"prompt": m[:-1], "completion": m[-1:]}) + "\n" for m in messages))
    dataset = datasets.load_dataset("json", data_files=str(pairs), split="train", cache_dir="hub")
    trl_trainer(Clocked, model_dir, dataset, "bf16", Stop(), output_dir="trl", max_length=MAX_TOKENS,
                dataset_num_proc=int(num_proc) or None).train()


def commands(rows: Path, model_dir: Path) -> dict[str, tuple[list[str], list[str]]]:
    """By side, what prepares the rows, and what starts a run."""
    worker = [sys.executable, str(Path(__file__).resolve())]
    start = [sys.executable, str(REPO / "train.py"), "--config", str(REPO / "configs/demo.yaml"), "run=start", "log=/dev/null",
             f"model.path={model_dir}", f"data.train={rows}", f"data.eval={REPO / 'data/demo/eval.jsonl'}", "train.max_steps=1",
             f"data.max_tokens={MAX_TOKENS}", f"train.microbatch_tokens={MAX_TOKENS}", "model.base=bf16",
             "train.optimizer=adamw", "train.rows_per_step=1", "eval.max_rows=1", "eval.samples=0"]
    theirs = {f"TRL{words}": [*worker, "--trl", str(rows), str(model_dir), number]
              for words, number in (("", "0"), (", dataset_num_proc=2", "2"))}
    return {"this trainer": ([*worker, "--prepare", str(rows), str(model_dir)], start),
            **{side: (command, command) for side, command in theirs.items()}}


def until(command: list[str], mark: str, directory: Path) -> tuple[float, str]:
    """Seconds from the start of a command to its first line with a mark, and what follows the mark."""
    directory.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    started, said = time.perf_counter(), []
    with subprocess.Popen(command, cwd=directory, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        for line in process.stdout or ():
            said.append(line)
            if mark in line:
                took = time.perf_counter() - started
                process.kill()
                return took, line.partition(mark)[2]
    sys.exit(f"{' '.join(command)}\n{''.join(said[-30:])}")


def main() -> None:
    for flag, work in (("--prepare", prepare), ("--trl", trl)):
        if sys.argv[1:2] == [flag]:
            return work(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=26_079)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each side")
    parser.add_argument("--write", action="store_true", help="put the tables into bench/README.md")
    args = parser.parse_args()
    from model.smollm2 import demo_model

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        sides = commands(write_rows(directory, args.rows), demo_model())
        prepared = {side: json.loads(until(first, BEGIN, directory / side)[1]) for side, (first, _) in sides.items()}
        assert {len_ for _, len_, *_ in prepared.values()} == {args.rows}, prepared
        starts: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(args.rounds + 1):  # the first warms the caches
            for side, (_, command) in sides.items():
                mark = BEGIN if command[1] != str(REPO / "train.py") else "step 0  eval loss"  # after which step 1 begins
                starts[side].append(until(command, mark, directory / side)[0])
    middle = {side: statistics.median(took[1:]) for side, took in starts.items()}
    tokens = prepared["this trainer"][2] / args.rows
    lines = [f"{machine('transformers', 'trl', 'tokenizers')}", f"{args.rows:,} rows of {tokens:,.0f} tokens; {args.rounds} "
             "starts each in turns, medians; rows were prepared once by each.", "",
             "| | rows prepared, s | x this trainer | command to first step, s | x this trainer |", "|---|---|---|---|---|"]
    (ours_s, *_), ours_start_s = prepared["this trainer"], middle["this trainer"]
    lines += [f"| {side} | {prepared[side][0]:.1f} | {prepared[side][0] / ours_s:.1f} | {middle[side]:.1f} | "
              f"{middle[side] / ours_start_s:.2f} |" for side in sides]
    print("\n".join(lines))
    if args.write:
        write("start", "\n".join(lines))


if __name__ == "__main__":
    main()
