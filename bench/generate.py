"""Measures decoding: this trainer against transformers' generate, and against itself without a cache, in turns.
Both sides are in one process; a model is loaded, and everything has run once, before the clock starts.

python bench/generate.py              # prints the table; trains the demo's model for 20 steps first
python bench/generate.py --run DIR    # with the adapters of a run of configs/demo.yaml
python bench/generate.py --write      # also puts the table into bench/README.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable

import torch
from peft import PeftModel
from report import write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.chat import ChatFormat
from loop import checkpoint
from loop.config import load_config
from loop.state import load_adapters
from model.build import build
from model.decode.generate import Answer, generate
from model.decode.weights import kept_for_decoding
from model.mixers import Segments
from model.smollm2 import demo_model
from model.stages import Stage

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BATCH_ROWS, NUM_ROWS = 16, 64
FEWER_ROWS, FEWER_TOKENS = 16, 24  # without a cache


@dataclass(frozen=True)
class Task:
    """The same model on both sides, and what it answers."""

    stage: Stage
    theirs: Any  # transformers' model with the adapters merged into its weights
    prompts: list[list[int]]
    stop_id: int
    max_tokens: int


def prepare(run_dir: Path, max_tokens: int) -> Task:
    config = load_config(run_dir / "config.yaml")
    model_dir, path = demo_model(), checkpoint.best(run_dir)
    stage = build(model_dir, "bf16", config.lora, seed=0, device=CPU, recompute=False)
    load_adapters(stage.adapters(), checkpoint.load(path).adapter)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, trust_remote_code=False)
    theirs = PeftModel.from_pretrained(base, path).merge_and_unload().eval()
    chat = ChatFormat(AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False), config.data.think)
    lines = [line for name in ("eval", "train") for line in (REPO / f"data/demo/{name}.jsonl").read_text().splitlines()]
    prompts = []
    for line in lines[:NUM_ROWS]:  # all held-out rows, and as many others as are missing
        text = chat.prompt(json.loads(line)["messages"][:-1], thinking=False)
        prompts.append(chat.tokenizer(text, add_special_tokens=False).input_ids)
    return Task(stage, theirs, prompts, chat.stop_id, max_tokens)


def train(directory: Path, steps: int) -> Path:
    """A short run of the demo, after which most answers end by themselves."""
    data = [f"data.{split}={REPO / f'data/demo/{split}.jsonl'}" for split in ("train", "eval")]
    command = [sys.executable, str(REPO / "train.py"), "--config", str(REPO / "configs/demo.yaml"), "run=bench",
               "log=/dev/null", "model.base=bf16", f"model.path={demo_model()}", f"train.max_steps={steps}",
               "train.plan=false", "eval.every=100000", "eval.max_rows=1", f"checkpoint.every={steps}", *data]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=directory, env=environment, check=True, stdout=sys.stderr)
    return directory / "checkpoints/bench"


# ---- the sides; each returns how many tokens it wrote, the stop tokens included ----

def ours(task: Task, prompts: list[list[int]], max_tokens: int) -> int:
    answers = generate(task.stage, prompts, stop_id=task.stop_id, max_tokens=max_tokens, batch_rows=BATCH_ROWS)
    return sum(len(answer.ids) for answer in answers)


@torch.no_grad()
def ours_without_cache(task: Task, prompts: list[list[int]], max_tokens: int) -> int:
    """The whole texts of all unfinished rows again for each token, as one packed stream."""
    model, texts, num_tokens = task.stage.model, [list(prompt) for prompt in prompts], 0
    task.stage.eval()
    with kept_for_decoding(task.stage):
        for _ in range(max_tokens):
            h_TD, last_R = packed(task.stage, texts)
            chosen = model.lm_head(model.model.norm(h_TD[last_R])).float().argmax(-1).tolist()
            num_tokens += len(texts)
            texts = [[*text, token] for text, token in zip(texts, chosen) if token != task.stop_id]
            if not texts:
                break
    return num_tokens


@torch.no_grad()
def theirs(task: Task, prompts: list[list[int]], max_tokens: int) -> int:
    """Batches of 16 in the rows' order, padded on the left, as transformers' documentation shows."""
    num_tokens = 0
    for start in range(0, len(prompts), BATCH_ROWS):
        batch = prompts[start : start + BATCH_ROWS]
        longest = max(len(prompt) for prompt in batch)
        ids = torch.tensor([[task.stop_id] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        written = task.theirs.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False,
                                       eos_token_id=task.stop_id, pad_token_id=task.stop_id)[:, longest:]
        is_stop = (written == task.stop_id).int()
        num_tokens += int((is_stop.cumsum(1) - is_stop == 0).sum())
    return num_tokens


def packed(stage: Stage, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Hidden states of one packed forward pass, and where each text ends."""
    lengths = tuple(len(text) for text in texts)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.tensor([token for text in texts for token in text])
    return stage(ids[None], positions, Segments(bounds.int(), lengths))[0], bounds[1:] - 1


# ---- measuring ----

def tokens_per_s(side: Callable[[Task, list[list[int]], int], int], task: Task, num_rows: int, max_tokens: int) -> float:
    start = time.perf_counter()
    num_tokens = side(task, task.prompts[:num_rows], max_tokens)
    return num_tokens / (time.perf_counter() - start)


def in_turns(task: Task, sides: list[Any], rounds: int, num_rows: int, max_tokens: int) -> list[list[float]]:
    """Tokens a second of each side in each round."""
    speeds: list[list[float]] = [[] for _ in sides]
    for side in sides:  # whatever is made at first use
        side(task, task.prompts[:BATCH_ROWS], 4)
    for number in range(rounds):
        for side, found in zip(sides, speeds):
            found.append(tokens_per_s(side, task, num_rows, max_tokens))
            print(f"round {number + 1}: {side.__name__} {found[-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    return speeds


@torch.no_grad()
def difference(task: Task, answers: list[Answer]) -> tuple[float, float]:
    """The mean and the largest difference of log-probabilities to those of one packed training forward pass."""
    texts = [prompt + answer.ids for prompt, answer in zip(task.prompts, answers)]
    h_TD, last_R = packed(task.stage.train(), texts)
    predict = torch.cat([torch.arange(last - len(a.ids), last) for last, a in zip(last_R.tolist(), answers)])
    labels = torch.tensor([token for answer in answers for token in answer.ids])
    log_probs = -task.stage.losses(h_TD[None], predict, labels)
    apart = (log_probs - torch.tensor([p for answer in answers for p in answer.log_probs])).abs()
    return apart.mean().item(), apart.max().item()


def measure(task: Task, rounds: int) -> str:
    answers = generate(task.stage, task.prompts, stop_id=task.stop_id, max_tokens=task.max_tokens, batch_rows=BATCH_ROWS)
    lengths = sorted(len(answer.ids) for answer in answers)
    mean, most = difference(task, answers)
    speeds = in_turns(task, [theirs, ours], rounds, NUM_ROWS, task.max_tokens)
    few_speeds = in_turns(task, [ours_without_cache, ours], max(rounds // 2, 1), FEWER_ROWS, FEWER_TOKENS)
    return table(task, rounds, lengths, (mean, most), speeds, few_speeds)


# ---- the table ----

def ratio(speeds: list[float], others: list[float]) -> str:
    """The median, least and largest of the rounds' ratios: both sides of a ratio ran one right after the other."""
    ratios = [speed / other for speed, other in zip(speeds, others)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def table(task: Task, rounds: int, lengths: list[int], apart: tuple[float, float], speeds: list[list[float]],
          few_speeds: list[list[float]]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    prompts = sorted(len(prompt) for prompt in task.prompts)
    middle = [f"{statistics.median(found):.0f}" for found in (*speeds, *few_speeds)]
    return "\n".join([
        f"{datetime.date.today()}. SmolLM2-135M-Instruct in bf16, LoRA 16 on 7 projections, {NUM_ROWS} rows, {BATCH_ROWS} at a "
        "time, greedy.",
        f"Prompts of {prompts[0]} to {prompts[-1]} tokens; answers of {lengths[0]} to {lengths[-1]} (median "
        f"{statistics.median(lengths):.0f}), {task.max_tokens} allowed.",
        f"{rounds} rounds in turns: medians, and the median (least to most) of the rounds' ratios. {cpu_name()},",
        f"{torch.get_num_threads()} threads, a load of {os.getloadavg()[0]:.1f} at the end; {platform.system()}, "
        f"Python {platform.python_version()}, {packages}.",
        "",
        "| | tokens/s | x transformers | x without a cache |",
        "|---|---|---|---|",
        f"| transformers' generate, adapters merged into the weights | {middle[0]} | 1 | |",
        f"| this decoder, adapters beside the weights | {middle[1]} | {ratio(speeds[1], speeds[0])} | |",
        f"| {FEWER_ROWS} rows, {FEWER_TOKENS} tokens, without a cache | {middle[2]} | | 1 |",
        f"| {FEWER_ROWS} rows, {FEWER_TOKENS} tokens, this decoder | {middle[3]} | | {ratio(few_speeds[1], few_speeds[0])} |",
        "",
        "Log-probabilities in bf16 against one packed training forward pass over prompts and answers: "
        f"{apart[0]:.1e} apart on average,",
        f"{apart[1]:.1e} at most."])


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} {'with' if 'avx512_bf16' in text else 'without'} avx512_bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a run of configs/demo.yaml; by default one of 20 steps is made")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=96, metavar="N", help="longest answer (96)")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        task = prepare(args.run or train(Path(directory), 20), args.max_tokens)
    text = measure(task, args.rounds)
    print(text)
    if args.write:
        write("generation", text)


if __name__ == "__main__":
    main()
