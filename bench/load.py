"""Measures loading a mixture-of-experts checkpoint: memory and time of the streaming nf4 build, beside transformers'.
Each measurement is a fresh process; the table has the medians. The checkpoint is random, about 1.7 GB, and written once.

python bench/load.py                      # prints the table, about 6 minutes on 2 cores
python bench/load.py --repeats 1 --layout fp8 --base int8
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

# the true widths of Qwen3.5-35B-A3B's experts; fewer of them, fewer layers, and a small rest
SHAPE = {"num_hidden_layers": 4, "hidden_size": 2048, "num_experts": 64, "num_experts_per_tok": 8,
         "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
SUBJECTS = ("ours", "read", "quantize", "transformers")
MB, MIB = 1e6, 2**20


# In a fresh process


def measure(subject: str, checkpoint: Path, base: str) -> dict[str, float]:
    """Seconds; in bytes the model, and the peak RSS above the interpreter's of loading, and of loading and reading it."""
    load = {"ours": partial(build_ours, base=base), "read": read_alone, "quantize": partial(quantize_alone, base=base),
            "transformers": build_transformers}[subject]
    import_all()
    gc.collect()
    interpreter = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.perf_counter()
    model = load(checkpoint)
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "peak": status_bytes("VmHWM") - interpreter, "resident": resident_bytes(model)}
    if subject in ("ours", "transformers"):
        touch(model)
        result["peak_used"] = status_bytes("VmHWM") - interpreter
    return result


def touch(model: Any) -> None:
    """Reads a number of every page: what transformers holds as a map of the file counts only once it is read."""
    for parameter in model.parameters():
        parameter.detach().flatten()[::512].sum()


def import_all() -> None:
    """What belongs to the interpreter: the libraries, and the code of the architecture."""
    import torch  # noqa: F401
    from transformers import BitsAndBytesConfig, Qwen3_5MoeForCausalLM  # noqa: F401

    import model.build  # noqa: F401


def build_ours(checkpoint: Path, base: str) -> Any:
    import torch

    from model.build import build
    from model.config import LoraConfig

    return build(checkpoint, base, LoraConfig(1, 1, ("q_proj",)), seed=0, device=torch.device("cpu"), recompute=True)


def quantize_alone(checkpoint: Path, base: str) -> Any:
    """The same build, fed from memory: each call of put gets the same numbers, which lie there."""
    import torch

    import model.build
    from model.weights.shards import Experts

    numbers = torch.randn(16 * MIB // 2).bfloat16()

    def feed(_: Any, wanted: Any, **__: Any) -> None:
        def rows(*shape: int) -> torch.Tensor:
            return numbers[: torch.Size(shape).numel()].view(shape)

        for item in wanted:
            if isinstance(item, Experts):
                for e in range(item.num_experts):
                    item.put(e, rows(2 * item.intermediate, item.hidden), rows(item.hidden, item.intermediate))
            else:
                count = item.shape[0] if len(item.shape) == 1 else max(4 * MIB // torch.Size(item.shape[1:]).numel(), 1)
                for start in range(0, item.shape[0], count):
                    item.put(start, rows(min(count, item.shape[0] - start), *item.shape[1:]))

    model.build.stream = feed  # type: ignore[assignment]
    return build_ours(checkpoint, base)


def read_alone(checkpoint: Path) -> None:
    """Every tensor, 8 MiB at a time, put nowhere."""
    from model.weights.shards import Checkpoint

    opened = Checkpoint(checkpoint)
    for name, info in opened.tensors.items():
        num_rows = info.shape[0]
        count = max(int(8 * MIB * num_rows // (info.end - info.start)), 1)
        for start in range(0, num_rows, count):
            opened.read_rows(name, start, min(start + count, num_rows))


def build_transformers(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu", trust_remote_code=False)


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: this needs Linux")


def resident_bytes(model: Any) -> int:
    """All storages that parameters, buffers and quantization states hold, each once."""
    import torch

    if model is None:
        return 0
    storages = {}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif type(value).__name__ == "QuantState":
            for part in vars(value).values():
                add(part)

    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            add(value)
            add(getattr(value, "quant_state", None))
    return sum(storages.values())


# The table


def run(subjects: list[str], checkpoint: Path, base: str, repeats: int) -> dict[str, dict[str, float]]:
    """Medians over fresh processes, the subjects in turn, so that a busy minute of the machine meets them all."""
    results: dict[str, list[dict[str, float]]] = {subject: [] for subject in subjects}
    for subject in subjects * repeats:
        command = [sys.executable, __file__, "--measure", subject, "--checkpoint", str(checkpoint), "--base", base]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
        if done.returncode:
            raise SystemExit(f"{subject}: failed\n{done.stderr[-3000:]}")
        results[subject].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"  {subject}: {json.dumps(results[subject][-1])}", file=sys.stderr)
    return {subject: {key: statistics.median(each[key] for each in of_subject) for key in of_subject[0]}
            for subject, of_subject in results.items()}


def prepare(layout: str) -> Path:
    from model.tiny.write import write_tiny

    checkpoint = Path(tempfile.gettempdir()) / f"chess-coach-trainer-bench-{os.getuid()}" / layout
    if not (checkpoint / "complete").exists():
        print(f"writing {checkpoint}", file=sys.stderr)
        write_tiny(checkpoint, layout=layout, **SHAPE)
        (checkpoint / "complete").touch()
    return checkpoint


def bf16_bytes(checkpoint: Path) -> int:
    from model.weights.shards import Checkpoint

    return sum(2 * _numel(info.shape) for info in Checkpoint(checkpoint).tensors.values())


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * _numel(shape[1:]) if shape else 1


def table(results: dict[str, dict[str, float]], bf16: int, base: str) -> str:
    def line(name: str, result: dict[str, float]) -> str:
        return (f"| {name} | {result['resident'] / MB:,.0f} MB | {result['resident'] / bf16:.3f} | "
                f"{result['peak'] / MB:,.0f} MB | {(result['peak'] - result['resident']) / MIB:,.0f} MiB | "
                f"{result['peak_used'] / MB:,.0f} MB | {result['seconds']:.1f} s |")

    lines = ["| | model | of its BF16 bytes | peak RSS while loading | beyond the model | once all were read | time |",
             "|---|---|---|---|---|---|---|", line(f"streamed into {base}", results["ours"])]
    if "transformers" in results:
        lines.append(line("transformers, load_in_4bit", results["transformers"]))
    slower = max(results[subject]["seconds"] for subject in ("read", "quantize"))
    lines += ["", f"Reading alone takes {results['read']['seconds']:.1f} s, quantizing alone "
                  f"{results['quantize']['seconds']:.1f} s: streaming reaches {slower / results['ours']['seconds']:.0%} of "
                  "the slower one's speed."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layout", choices=("fused", "per-expert", "fp8"), default="fused")
    parser.add_argument("--base", choices=("nf4", "int8", "bf16"), default="nf4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", nargs="*", choices=SUBJECTS[3:], default=[], help="what not to measure")
    parser.add_argument("--measure", choices=SUBJECTS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.checkpoint, options.base)))
        return
    checkpoint = prepare(options.layout)
    bf16 = bf16_bytes(checkpoint)
    subjects = [subject for subject in SUBJECTS if subject not in options.skip]
    results = run(subjects, checkpoint, options.base, options.repeats)
    print(f"\n{bf16 / MB:,.0f} MB in BF16, {options.layout} layout, {os.cpu_count()} cores, medians of {options.repeats}\n")
    print(table(results, bf16, options.base))


if __name__ == "__main__":
    main()
