"""Measures the pipeline on two CPU processes of one thread each: against GPipe's bound, and against data parallel.
The product's own entry points, the same rows and model; each run is a fresh torchrun.

python bench/pipeline.py            # prints the table, about 5 minutes
python bench/pipeline.py --write    # also puts it into bench/README.md
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
from pathlib import Path
from typing import Any

from report import machine, write

REPO = Path(__file__).resolve().parent.parent
NUM_STAGES, NUM_MICROBATCHES, ROW_TOKENS = 2, 16, 512
LAYERS, HIDDEN = 8, 512
SETTINGS = {
    "run": "bench", "log": "/dev/null",
    "model": {"path": "model", "base": "bf16"},
    "lora": {"rank": 16, "alpha": 32, "target": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "sources": ["bench"], "max_tokens": ROW_TOKENS},
    # a row fills a microbatch: 16 of them go through the pipeline, or 8 through each of two ranks
    "train": {"epochs": 1, "rows_per_step": NUM_MICROBATCHES, "microbatch_tokens": ROW_TOKENS, "learning_rate": 1e-3,
              "optimizer": "adamw"},
    "eval": {"every": 1, "max_rows": 1},  # when stages were busy is recorded at evaluations
}
CONTENDERS = {
    "data parallel": ["train.py"],
    "gpipe": ["pipeline_train.py", "pipeline.schedule=gpipe", "pipeline.split=auto"],
    "1f1b": ["pipeline_train.py", "pipeline.schedule=1f1b", "pipeline.split=auto"],
}


def prepare(directory: Path, num_steps: int) -> None:
    """A dense model whose layers are alike, rows that are just as long as a microbatch, and the configuration."""
    from transformers import AutoTokenizer

    from model.tiny.write import write_tiny

    model = write_tiny(
        directory / "model", kind="qwen3", num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    )
    tokenizer, draw = AutoTokenizer.from_pretrained(model, trust_remote_code=False), random.Random(0)
    template = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    around = len(tokenizer(tokenizer.apply_chat_template(template, tokenize=False), add_special_tokens=False).input_ids)
    with open(directory / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(num_steps * NUM_MICROBATCHES):
            text = "".join(draw.choices("abcdefgh12345678 ", k=ROW_TOKENS - around - 8))
            messages = [{"role": "user", "content": text[128:]}, {"role": "assistant", "content": text[:128]}]
            file.write(json.dumps({"messages": messages, "metadata": {"source": "bench"}}) + "\n")
    (directory / "config.yaml").write_text(json.dumps(SETTINGS))  # JSON is YAML


def run(contender: str, directory: Path) -> list[dict[str, Any]]:
    """One run; what metrics.jsonl says of each step but the first.

    Raises:
        RuntimeError: it failed; its output is in the message.
    """
    script, *settings = CONTENDERS[contender]
    launcher = [sys.executable, "-m", "loop.distributed.launch", f"--nproc-per-node={NUM_STAGES}"]
    command = [*launcher, str(REPO / script), "--config", "config.yaml", "resume=never", "train.plan=false", *settings]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    lines = (directory / "checkpoints/bench/metrics.jsonl").read_text().splitlines()
    by_step: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, lines):
        by_step.setdefault(line["step"], {}).update(line)
    steps = [step for step in by_step.values() if "loss" in step]
    assert all(step["microbatches"] == NUM_MICROBATCHES for step in steps), "a row is not a microbatch"
    return steps[1:]


def measure(num_steps: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """All contenders in turn, the whole round repeated, so that what else happens on the machine hits all alike."""
    results: dict[str, list[dict[str, Any]]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), num_steps)
        for _ in range(repeats):
            for contender, steps in results.items():
                steps += run(contender, Path(directory))
                step_s = statistics.median(step["step_s"] for step in steps)
                print(f"{contender}: {step_s:.3f} s a step", file=sys.stderr, flush=True)
    return results


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over all steps; the bound is that of the same step's busiest stage."""
    factor = (NUM_MICROBATCHES + NUM_STAGES - 1) / NUM_MICROBATCHES
    data_parallel = statistics.median(step["step_s"] for step in results["data parallel"])
    lines = ["| | step, s | busy by stage, s | step / bound (<= 1.05) | step / data parallel (<= 1.25) |",
             "|---|---|---|---|---|", f"| data parallel, {NUM_STAGES} ranks | {data_parallel:.3f} | | | 1 |"]
    for schedule in ("gpipe", "1f1b"):
        steps = results[schedule]
        step_s = statistics.median(step["step_s"] for step in steps)
        busy = [statistics.median(step["stage_busy_s"][stage] for step in steps) for stage in range(NUM_STAGES)]
        of_bound = statistics.median(step["step_s"] / (max(step["stage_busy_s"]) * factor) for step in steps)
        lines.append(f"| {schedule}, {NUM_STAGES} stages | {step_s:.3f} | {', '.join(f'{s:.3f}' for s in busy)} | "
                     f"{of_bound:.3f} | {step_s / data_parallel:.3f} |")
    return "\n".join(lines)


def describe(num_steps: int, repeats: int) -> str:
    return (
        f"Qwen3 of {LAYERS} layers of {HIDDEN}, bf16, LoRA 16, recomputation by layer, {NUM_MICROBATCHES} microbatches of "
        f"{ROW_TOKENS} tokens a step, two processes of one thread; {repeats} runs of {num_steps - 1} steps each (the first is "
        f"not counted), medians. The bound is (M + S - 1) / M of what the busier stage computed in the step.\n"
        f"{machine()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each run; the first is not counted")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    arguments = parser.parse_args()
    if arguments.steps < 2 or arguments.repeats < 1:
        parser.error("expected at least 2 steps and 1 repeat")
    sys.path.insert(0, str(REPO))
    results = measure(arguments.steps, arguments.repeats)
    text = f"{describe(arguments.steps, arguments.repeats)}\n\n{table(results)}"
    print(text)
    if arguments.write:
        write("pipeline", text)


if __name__ == "__main__":
    main()
