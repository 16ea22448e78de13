"""Measures this trainer against TRL's SFTTrainer, and against itself at another commit: same rows, model and adapters.
Each contender is a process of its own. In each round every one makes a step while the others are stopped (SIGSTOP), so that
whatever else the machine does meets all alike. Measured: tokens a second after the first two steps, and peak memory.

python bench/vs_trl.py                      # prints the table, about 40 minutes on 2 cores
python bench/vs_trl.py --against COMMIT     # also this trainer as it was at that commit
python bench/vs_trl.py --rounds 1           # is everything installed? too short to be believed
python bench/vs_trl.py --write              # also puts the table into bench/README.md
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import machine, write

REPO = Path(__file__).resolve().parent.parent
ROWS_A_STEP = 4  # one batch of TRL's
RANK, ALPHA, RATE, MAX_TOKENS = 16, 32, 1e-3, 1024
MICROBATCH_TOKENS = 1152  # any two rows fit; how a step is cut changes nothing but memory and speed
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
        per_device_train_batch_size=ROWS_A_STEP, num_train_epochs=1,
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
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTTrainer

    messages = [json.loads(line)["messages"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    dataset = Dataset.from_list([{"prompt": m[:-1], "completion": m[-1:]} for m in messages])

    class Steps(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                put({"loss": logs["loss"]})

    def put(record: dict[str, Any]) -> None:
        with open(out, "a") as file:
            print(json.dumps(record), file=file)

    overrides: dict[str, Any] = {key: json.loads(value) for key, value in (s.split("=", 1) for s in settings)}
    trainer = trl_trainer(SFTTrainer, model_dir, dataset, precision, Steps(), output_dir=f"{out}.trl", **overrides)
    prepared: Any = trainer.train_dataset
    put({"supervised": sum(label != -100 for labels in prepared["labels"] for label in labels)})
    trainer.train()


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
        f"train.learning_rate={RATE}", "train.optimizer=adamw", "train.plan=false", *contender.settings,
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


def peak_bytes(pid: int) -> int:
    """The most memory (VmHWM) that a process and those it has started, as far as they are still there, had resident each."""
    total = 0
    for one in descendants(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return total


class Run:
    """One contender's process, which is stopped but for its turns."""

    def __init__(self, contender: Contender, precision: str, model_dir: Path, rows: Path, lengths: list[int],
                 directory: Path) -> None:
        self.contender, self.lengths = contender, lengths
        out, code = directory / "steps.jsonl", REPO
        if contender.commit:
            code = directory / "code"
            code.mkdir()
            archive = subprocess.run(["git", "archive", contender.commit], cwd=REPO, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x", "-C", str(code)], input=archive, check=True)
        command = (trl_command(model_dir, rows, precision, contender, out) if contender.is_trl
                   else our_command(model_dir, rows, contender, code))
        self.file = out if contender.is_trl else directory / "checkpoints/bench/metrics.jsonl"
        self.output, self.peak_gib = directory / "output", 0.0
        self.seconds: list[float] = []
        self.measured: list[float] = []  # tokens a second of each step that counts
        environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": str(os.cpu_count() or 1),
                       "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                            start_new_session=True)
        self.start_s = self.turn(NUM_STARTING)
        self.seconds.clear()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def steps(self) -> list[dict[str, Any]]:
        return [record for record in self.records() if "loss" in record]

    def turn(self, num_steps: int = 1) -> float:
        """Lets it go on until it has made so many more steps; returns and keeps the seconds.

        Raises:
            RuntimeError: it ended; its output is in the message.
        """
        before, size, started = len(self.steps()), -1, time.perf_counter()
        os.killpg(self.process.pid, signal.SIGCONT)
        while True:
            if self.file.exists() and (found := self.file.stat().st_size) != size:
                size = found
                if len(self.steps()) >= before + num_steps:
                    break
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.contender.name} ended:\n{self.output.read_text(errors='replace')[-3000:]}")
            time.sleep(0.005)
        self.seconds.append(time.perf_counter() - started)
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.peak_gib = peak_bytes(self.process.pid) / 2**30
        return self.seconds[-1]

    def tokens_per_s(self) -> list[float]:
        """Of each step that counts. Both sides take the rows in steps of as many; this trainer shuffles them."""
        if self.contender.is_trl:
            tokens = [sum(self.lengths[i:i + ROWS_A_STEP]) for i in range(0, len(self.lengths), ROWS_A_STEP)]
        else:
            tokens = [record["tokens"] for record in self.steps()]
        return [num / took for num, took in zip(tokens[NUM_STARTING:], self.seconds)]

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


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
    precisions: list[str], rounds: int, only: list[str], commit: str, extra: list[str]
) -> tuple[dict[str, list[Run]], list[float]]:
    """The runs by precision, those of one precision in turns; and the rates of matmuls alone, between the rounds."""
    from model.smollm2 import demo_model

    model_dir = demo_model()
    results: dict[str, list[Run]] = {}
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as running:
        rows = Path(temporary) / "rows.jsonl"
        write_rows(rows, (NUM_STARTING + rounds + 2) * ROWS_A_STEP)
        lengths = count_tokens(model_dir, rows)
        for precision in precisions:
            runs = results[precision] = []
            for contender in contenders(precision, commit, extra):
                if not only or contender.name in only:
                    directory = Path(temporary) / f"{precision}-{len(runs)}"
                    directory.mkdir()
                    runs.append(Run(contender, precision, model_dir, rows, lengths, directory))
                    running.callback(runs[-1].end)
            for number in range(rounds):
                rates.append(matmul_rate())
                for run in runs[number % len(runs):] + runs[:number % len(runs)]:
                    run.turn()
                    print(f"{precision}  {run.contender.name}: {run.tokens_per_s()[-1]:.0f} tokens/s, {run.peak_gib:.2f} GiB, "
                          f"first loss {run.steps()[0]['loss']:.4f}", file=sys.stderr, flush=True)
            for run in runs:
                run.measured = run.tokens_per_s()  # while its files are there
            running.pop_all().close()
    return results, rates


# ---- the table ----

def spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def table(results: dict[str, list[Run]], rates: list[float]) -> str:
    """Medians with their range. This trainer's ratios are medians over the rounds: to each of TRL's configurations in the same
    precision, and to itself at the other commit with the same recomputation."""
    theirs = list(dict.fromkeys(run.contender.name for runs in results.values() for run in runs if run.contender.is_trl))
    before = next((run.contender.commit for runs in results.values() for run in runs if run.contender.commit), "")
    columns = [f"x {name}: tokens/s, memory" for name in theirs] + [f"x itself at {before}: tokens/s, memory"] * bool(before)
    lines = ["| precision | | tokens/s | of bf16 matmul | peak memory, GiB | command to second step, s | "
             + "".join(f"{column} | " for column in columns), "|---|---|---|---|---|---|" + "---|" * len(columns)]
    for precision, runs in results.items():
        by_name = {run.contender.name: run for run in runs}
        for run in runs:
            contender = run.contender
            others = theirs + [contender.name.replace("this trainer", f"this trainer at {before}")] * bool(before)
            is_new = not contender.is_trl and not contender.commit
            ratios = [f"{ratio(run, by_name[other])}, {run.peak_gib / by_name[other].peak_gib:.2f}"
                      if is_new and other in by_name else "" for other in others]
            share = statistics.median(run.measured) * FLOPS_A_TOKEN / statistics.median(rates)
            cells = [precision, contender.name, spread(run.measured, 0), f"{share:.0%}", f"{run.peak_gib:.2f}",
                     f"{run.start_s:.0f}", *ratios]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(run: Run, other: Run) -> str:
    """Of tokens a second, the median over the rounds, and the quarter and the three quarters of them."""
    values = [value / before for value, before in zip(run.measured, other.measured)]
    if len(values) < 4:
        return f"{statistics.median(values):.2f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def describe(rounds: int, rates: list[float]) -> str:
    return (f"SmolLM2-135M-Instruct, LoRA {RANK} on 7 projections, {ROWS_A_STEP} rows of about 510\ntokens a step; after "
            f"{NUM_STARTING} steps that do not count {rounds} rounds, in each a step of every contender while the others are "
            f"stopped:\nmedian (least to most), ratios with their middle half. bf16 matmuls of these shapes alone: "
            f"{spread([rate / 1e9 for rate in rates], 0)} GFLOP/s;\nthe share counts {FLOPS_A_TOKEN / 1e6:.0f} M operations a "
            f"token, 4 a weight.\n{machine('transformers', 'trl', 'peft')}")


def main() -> None:
    if sys.argv[1:2] == ["--trl-worker"]:
        model_dir, rows, precision, out, *settings = sys.argv[2:]
        train_with_trl(model_dir, rows, precision, settings, out)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each contender that count")
    parser.add_argument("--precision", action="append", choices=("float32", "bf16", "int8"),
                        help="default: float32 and bf16")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="contenders with this name alone")
    parser.add_argument("--against", default="", metavar="COMMIT", help="also this trainer at another commit")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of this trainer's runs")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected at least 1")
    sys.path.insert(0, str(REPO))
    results, rates = measure(arguments.precision or ["float32", "bf16"], arguments.rounds, arguments.only, arguments.against,
                             arguments.set)
    text = f"{describe(arguments.rounds, rates)}\n\n{table(results, rates)}"
    print(text)
    if arguments.write:
        write("measured", text)


if __name__ == "__main__":
    main()
