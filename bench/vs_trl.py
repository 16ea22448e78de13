"""Measures this trainer against TRL's SFTTrainer, and against itself at another commit: same rows, model and adapters, in turn.
Each run is a fresh process; what is measured is tokens a second after the first two steps, and peak memory.

python bench/vs_trl.py                      # prints the table, about 25 minutes on 2 cores
python bench/vs_trl.py --against COMMIT     # also this trainer as it was at that commit
python bench/vs_trl.py --quick              # is everything installed? a small run, too short to be believed
python bench/vs_trl.py --write              # also puts the table into bench/README.md
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report import machine, write

REPO = Path(__file__).resolve().parent.parent
ROWS_A_BATCH, ACCUMULATION = 4, 2  # TRL's batches; here the same 8 rows are one step
ROWS_A_STEP = ROWS_A_BATCH * ACCUMULATION
RANK, ALPHA, RATE, MAX_TOKENS = 16, 32, 1e-3, 1024
MICROBATCH_TOKENS = 1024  # two rows: how a step is cut changes nothing but memory and speed
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SYSTEM = "You are a chess coach. Comment on the move that was played: the idea behind it, and what was better."
# 4 operations a weight: the linears at every token, the head at the fifth that is supervised
FLOPS_A_TOKEN = 4 * (30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 49_152 * 576 / 5)
NUM_STARTING = 2  # steps that are not counted: in these, kernels are compiled and memory is counted tensor by tensor


@dataclass(frozen=True)
class Contender:
    """One way to train: whose code, and with which settings."""

    name: str
    is_trl: bool
    settings: tuple[str, ...] = ()  # key=value
    commit: str = ""  # of this project; "" for the working tree


@dataclass
class Runs:
    """What the repeated runs of one contender in one precision measured."""

    tokens_per_s: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)  # the first steps that are not counted, together
    supervised: int = 0  # tokens with a loss, in all rows
    first_loss: float = 0.0  # of the first step, before anything was learned


def contenders(precision: str, commit: str, extra: list[str]) -> list[Contender]:
    """TRL as it comes and as it is fastest, and this trainer, each with and without recomputation, one process each. TRL has no
    int8 that trains on a CPU."""
    ours = [
        Contender(f"this trainer{f' at {of}' * bool(of)}{', recompute' * (recompute == 'true')}", False,
                  (f"model.base={precision}", f"train.recompute={recompute}", *(() if of else extra)), of)
        for recompute in ("false", "true") for of in dict.fromkeys((commit, ""))
    ]
    return ours if precision == "int8" else [
        Contender("TRL, its defaults", True),
        Contender("TRL, gradient_checkpointing=False", True, settings=("gradient_checkpointing=false",)),
        *ours,
    ]


# ---- the rows ----

OPENINGS = ("The idea is plain:", "At first sight this looks slow, but", "Here it pays to stop and count:",
            "In the spirit of the opening")
SUBJECTS = ("the knight", "the bishop", "the rook", "the queen", "the king", "the pawn", "the exchange", "the break")
VERBS = ("takes aim at", "gives up", "defends", "blocks", "prepares", "invites", "weakens", "supports")
REASONS = ("so that the centre stays closed", "before the other side can castle", "which leaves a hole behind it",
           "and wins a move", "though nothing is forced yet", "because the back rank is weak")


def square(rng: random.Random) -> str:
    return rng.choice("abcdefgh") + rng.choice("12345678")


def make_row(rng: random.Random) -> dict[str, Any]:
    """A row of about 510 tokens (SmolLM2), a fifth of them the answer, as in the coaching rows of this project."""
    board = [rng.choices("pnbrqkPNBRQK.", weights=[1] * 12 + [20], k=8) for _ in range(8)]
    diagram = "\n".join(f"{8 - i} {' '.join(rank)}" for i, rank in enumerate(board))
    moves = " ".join(rng.choice(("", "N", "B", "R", "Q")) + square(rng) for _ in range(rng.randint(98, 106)))
    answer = " ".join(
        f"{rng.choice(OPENINGS)} {rng.choice(SUBJECTS)} on {square(rng)} {rng.choice(VERBS)} {square(rng)}, "
        f"{rng.choice(REASONS)}."
        for _ in range(rng.randint(4, 5))
    )
    prompt = f"Board before the move:\n  a b c d e f g h\n{diagram}\nGame so far: {moves}\nExplain the move {square(rng)}."
    return {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt},
                         {"role": "assistant", "content": answer}], "metadata": {"source": "textbook"}}


def write_rows(path: Path, num_rows: int) -> None:
    rng = random.Random(1)
    path.write_text("".join(json.dumps(make_row(rng)) + "\n" for _ in range(num_rows)), encoding="utf-8")


def count_tokens(model_dir: Path, rows: Path) -> list[int]:
    """Length of each row as both sides tokenize it; TRL's also ends in the template's newline, which is not counted."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    texts = [str(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)).rstrip("\n")
             for line in rows.read_text(encoding="utf-8").splitlines()]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


# ---- the two sides ----

def trl_trainer(kind: type, model_dir: str, dataset: Any, precision: str, callback: Any, **overrides: Any) -> Any:
    """TRL's trainer, or a class made of it, set up as its documentation shows for LoRA on prompt and completion."""
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig

    settings: dict[str, Any] = dict(
        use_cpu=True, bf16=precision == "bf16",
        model_init_kwargs={"dtype": "bfloat16" if precision == "bf16" else "float32"},
        per_device_train_batch_size=ROWS_A_BATCH, gradient_accumulation_steps=ACCUMULATION, num_train_epochs=1,
        max_length=MAX_TOKENS, completion_only_loss=True, learning_rate=RATE, lr_scheduler_type="cosine",
        warmup_steps=0.1,
        train_sampling_strategy="sequential", logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
    )
    return kind(
        model_dir, SFTConfig(**settings | overrides), train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
        callbacks=[callback],
    )


def train_with_trl(model_dir: str, rows: str, precision: str, settings: list[str], out: str) -> None:
    """The worker of TRL's side."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTTrainer

    messages = [json.loads(line)["messages"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    dataset = Dataset.from_list([{"prompt": m[:-1], "completion": m[-1:]} for m in messages])
    bounds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            bounds.append(time.perf_counter())

        on_train_end = on_step_begin

    overrides: dict[str, Any] = {key: json.loads(value) for key, value in (s.split("=", 1) for s in settings)}
    trainer = trl_trainer(SFTTrainer, model_dir, dataset, precision, Clock(), output_dir=f"{out}.trl", **overrides)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    prepared: Any = trainer.train_dataset
    supervised = sum(label != -100 for labels in prepared["labels"] for label in labels)
    seconds = [stop - start for start, stop in zip(bounds, bounds[1:])]
    Path(out).write_text(json.dumps({
        "seconds": seconds, "supervised": supervised, "first_loss": losses[0], "threads": torch.get_num_threads()}))


def trl_command(model_dir: Path, rows: Path, precision: str, contender: Contender, out: Path) -> list[str]:
    worker = [sys.executable, str(Path(__file__).resolve()), "--trl-worker"]
    return [*worker, str(model_dir), str(rows), precision, str(out), *contender.settings]


def our_command(model_dir: Path, rows: Path, contender: Contender, code: Path) -> list[str]:
    """The product's own entry point."""
    return [
        sys.executable, str(code / "train.py"), "--config", str(code / "configs/demo.yaml"), "run=bench", "log=/dev/null",
        f"model.path={model_dir}", f"data.train={rows}", f"data.eval={rows}", f"data.max_tokens={MAX_TOKENS}",
        "eval.max_rows=1", "eval.every=100000", "eval.samples=0", f"lora.rank={RANK}", f"lora.alpha={ALPHA}",
        f"train.rows_per_step={ROWS_A_STEP}", f"train.microbatch_tokens={MICROBATCH_TOKENS}",
        f"train.learning_rate={RATE}", "train.optimizer=adamw", *contender.settings,
    ]


# ---- measuring ----

def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


class PeakMemory(threading.Thread):
    """Sums over a process and all it starts the most memory (VmHWM) each has ever had resident."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.finished = pid, threading.Event()
        self.peaks: dict[int, int] = {}  # KiB by process

    def run(self) -> None:
        while not self.finished.wait(0.5):
            for pid in descendants(self.pid):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                for line in status.splitlines():
                    if line.startswith("VmHWM:"):
                        self.peaks[pid] = int(line.split()[1])

    def gib(self) -> float:
        self.finished.set()
        self.join()
        return sum(self.peaks.values()) / 2**20


def run_once(contender: Contender, precision: str, model_dir: Path, rows: Path, lengths: list[int], runs: Runs) -> None:
    """One fresh process (or a torchrun of them), measured from outside.

    Raises:
        RuntimeError: it failed; its output is in the message.
    """
    with tempfile.TemporaryDirectory() as directory:
        out, code = Path(directory) / "out.json", REPO
        if contender.commit:
            code = Path(directory) / "code"
            code.mkdir()
            archive = subprocess.run(["git", "archive", contender.commit], cwd=REPO, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x", "-C", str(code)], input=archive, check=True)
        command = (trl_command(model_dir, rows, precision, contender, out) if contender.is_trl
                   else our_command(model_dir, rows, contender, code))
        environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": str(os.cpu_count() or 1),
                       "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with open(Path(directory) / "output", "w+b") as output:
            process = subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT)
            memory = PeakMemory(process.pid)
            memory.start()
            failed = process.wait()
            peak_gib = memory.gib()
            if failed:
                output.seek(0)
                raise RuntimeError(f"{' '.join(command)}\n{output.read().decode(errors='replace')[-3000:]}")
        if contender.is_trl:
            result = json.loads(out.read_text())
            runs.supervised, runs.first_loss = result["supervised"], result["first_loss"]
            seconds = result["seconds"]
            tokens = [sum(lengths[i:i + ROWS_A_STEP]) for i in range(0, len(lengths), ROWS_A_STEP)]
        else:
            lines = (Path(directory) / "checkpoints/bench/metrics.jsonl").read_text().splitlines()
            steps = [record for record in map(json.loads, lines) if "loss" in record]
            runs.supervised, runs.first_loss = sum(step["supervised_tokens"] for step in steps), steps[0]["loss"]
            seconds, tokens = [step["step_s"] for step in steps], [step["tokens"] for step in steps]
        assert sum(tokens) == sum(lengths), "the two sides did not see the same tokens"
        runs.tokens_per_s.append(sum(tokens[NUM_STARTING:]) / sum(seconds[NUM_STARTING:]))
        runs.start_s.append(sum(seconds[:NUM_STARTING]))
        runs.peak_gib.append(peak_gib)


def matmul_rate() -> float:
    """Operations a second of bf16 matmuls of a microbatch with the model's linears, forward and for the input's gradient."""
    import torch

    took = flops = 0.0
    for num_in, num_out, count in ((576, 576, 2), (576, 192, 2), (576, 1536, 2), (1536, 576, 1)):
        x, w, dy = (torch.randn(*shape).bfloat16() for shape in (
            (MICROBATCH_TOKENS, num_in), (num_out, num_in), (MICROBATCH_TOKENS, num_out)))
        times = []
        for _ in range(20):
            started = time.perf_counter()
            x @ w.T, dy @ w
            times.append(time.perf_counter() - started)
        took += count * statistics.median(times)
        flops += count * 4 * MICROBATCH_TOKENS * num_in * num_out
    return flops / took


def measure(
    precisions: list[str], num_steps: int, repeats: int, only: list[str], commit: str, extra: list[str]
) -> tuple[dict[tuple[str, Contender], Runs], list[float]]:
    """All contenders in turn, the whole round repeated, so that what else happens on the machine hits all alike; and the rates
    of matmuls alone, between the rounds."""
    from model.smollm2 import demo_model

    model_dir = demo_model()
    results: dict[tuple[str, Contender], Runs] = {}
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.jsonl"
        write_rows(rows, num_steps * ROWS_A_STEP)
        lengths = count_tokens(model_dir, rows)
        print(f"{len(lengths)} rows of {statistics.mean(lengths):.0f} tokens ({min(lengths)} to {max(lengths)})",
              file=sys.stderr)
        for _ in range(repeats):
            rates.append(matmul_rate())
            for precision in precisions:
                for contender in contenders(precision, commit, extra):
                    if only and contender.name not in only:
                        continue
                    runs = results.setdefault((precision, contender), Runs())
                    run_once(contender, precision, model_dir, rows, lengths, runs)
                    print(f"{precision}  {contender.name}: {runs.tokens_per_s[-1]:.0f} tokens/s, "
                          f"{runs.peak_gib[-1]:.2f} GiB, start {runs.start_s[-1]:.0f} s, first loss {runs.first_loss:.4f}, "
                          f"{runs.supervised} supervised", file=sys.stderr, flush=True)
    return results, rates


# ---- the table ----

def spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def table(results: dict[tuple[str, Contender], Runs], rates: list[float]) -> str:
    """Medians with their range. This trainer's ratios are medians over the rounds: to each of TRL's configurations in the same
    precision, and to itself at the other commit with the same recomputation."""
    theirs = list(dict.fromkeys(contender for _, contender in results if contender.is_trl))
    before = [contender for _, contender in results if contender.commit]
    columns = [f"x {contender.name}: tokens/s, memory" for contender in theirs]
    columns += [f"x itself at {before[0].commit}: tokens/s, memory"] if before else []
    lines = ["| precision | | tokens/s | of bf16 matmul | peak memory, GiB | first steps, s | "
             + "".join(f"{column} | " for column in columns), "|---|---|---|---|---|---|" + "---|" * len(columns)]
    for (precision, contender), runs in results.items():
        others = [(precision, other) for other in theirs]
        if before:
            recompute = contender.name.partition(",")[2]
            others += [key for key in results if key[0] == precision and key[1].commit
                       and key[1].name.partition(",")[2] == recompute]
        is_new = not contender.is_trl and not contender.commit
        ratios = [f"{ratio(runs.tokens_per_s, results[other].tokens_per_s)}, {ratio(runs.peak_gib, results[other].peak_gib)}"
                  if is_new and other in results else "" for other in others]
        share = statistics.median(runs.tokens_per_s) * FLOPS_A_TOKEN / statistics.median(rates)
        cells = [precision, contender.name, spread(runs.tokens_per_s, 0), f"{share:.0%}", spread(runs.peak_gib, 2),
                 f"{statistics.median(runs.start_s):.0f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(values: list[float], others: list[float]) -> str:
    return f"{statistics.median(value / other for value, other in zip(values, others)):.2f}"


def describe(num_steps: int, repeats: int, rates: list[float]) -> str:
    return (f"SmolLM2-135M-Instruct, LoRA {RANK} on 7 projections, {ROWS_A_BATCH} x "
            f"{ACCUMULATION} rows of about 510\ntokens a step, {num_steps} steps, the first {NUM_STARTING} not counted, "
            f"{repeats} run(s) each in turn: median (least to most).\nbf16 matmuls of these shapes alone: "
            f"{spread([rate / 1e9 for rate in rates], 0)} GFLOP/s; the share counts {FLOPS_A_TOKEN / 1e6:.0f} M operations a "
            f"token, 4 a weight.\n{machine('transformers', 'trl', 'peft')}")


def main() -> None:
    if sys.argv[1:2] == ["--trl-worker"]:
        model_dir, rows, precision, out, *settings = sys.argv[2:]
        train_with_trl(model_dir, rows, precision, settings, out)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each run; the first two are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender")
    parser.add_argument("--precision", action="append", choices=("float32", "bf16", "int8"),
                        help="default: float32 and bf16")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="contenders with this name alone")
    parser.add_argument("--against", default="", metavar="COMMIT", help="also this trainer at another commit")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of this trainer's runs")
    parser.add_argument("--quick", action="store_true", help="3 steps, 1 run")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    arguments = parser.parse_args()
    steps, repeats = (NUM_STARTING + 1, 1) if arguments.quick else (arguments.steps, arguments.repeats)
    if steps <= NUM_STARTING or repeats < 1:
        parser.error(f"expected at least {NUM_STARTING + 1} steps and 1 repeat")
    sys.path.insert(0, str(REPO))
    results, rates = measure(arguments.precision or ["float32", "bf16"], steps, repeats, arguments.only, arguments.against,
                             arguments.set)
    text = f"{describe(steps, repeats, rates)}\n\n{table(results, rates)}"
    print(text)
    if arguments.write:
        write("measured", text)


if __name__ == "__main__":
    main()
