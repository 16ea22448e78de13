"""Measures a merge of a checkpoint shaped like Qwen3.5-35B-A3B: memory and time, beside plainly reading and writing its bytes.
Each measurement is a fresh process, the subjects in turn, files read from the disk; the table has the medians. Needs 25 GB.

python bench/merge.py                     # prints the table; --layout per-expert, --directory ON_ANOTHER_DISK
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj", "up_proj", "down_proj")
SUBJECTS = ("copy", "original", "nf4")
GB, BLOCK = 1e9, 8 * 2**20


# In a fresh process


def measure(subject: str, base: Path, out: Path) -> dict[str, float]:
    import torch

    from data.files import sync
    from model.config import LoraConfig
    from model.merge import AdapterFile, merge

    for file in base.iterdir():  # so that every subject reads from the disk
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started, cpu_started = time.perf_counter(), time.process_time()
    if subject == "copy":
        for file in sorted(base.glob("*.safetensors")):
            copy(file, out / file.name)
    else:
        merge(base, out, AdapterFile(base.parent / "adapter_model.safetensors"), LoraConfig(8, 16, TARGETS, experts=True),
              as_trained=None if subject == "original" else subject, dtype=torch.bfloat16)
        for file in out.iterdir():
            sync(file)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak * 1024 / GB, "written_gb": written / GB,
            "load": os.getloadavg()[0]}


def copy(source: Path, target: Path) -> None:
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as written:
        while block := read.read(BLOCK):
            written.write(block)
        os.fsync(written.fileno())


# The table


def prepare(directory: Path, layout: str, num_layers: int) -> Path:
    """Writes the base, of the true widths, numbers of experts and vocabulary, and adapters of rank 8, also of the experts."""
    import torch
    from safetensors.torch import save_file

    from model.build import build_empty
    from model.config import LoraConfig
    from model.lora import to_peft_name
    from model.tiny.write import write_tiny

    base = write_tiny(directory / "base", layout=layout, scale=1, num_hidden_layers=num_layers)
    stage, _ = build_empty(base, "bf16", LoraConfig(8, 16, TARGETS, experts=True), seed=0, device=torch.device("meta"),
                           recompute=False)
    save_file({to_peft_name(name): torch.randn(p.shape) * 0.01 for name, p in stage.adapters().items()},
              directory / "adapter_model.safetensors")
    return base


def run(base: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {subject: [] for subject in SUBJECTS}
    for subject in SUBJECTS * repeats:
        out = base.parent / "out"
        out.mkdir()
        command = [sys.executable, __file__, "--measure", subject, "--directory", str(base.parent)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
        shutil.rmtree(out)
        if done.returncode:
            raise SystemExit(f"{subject}: failed\n{done.stderr[-3000:]}")
        results[subject].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"  {subject}: {json.dumps(results[subject][-1])}", file=sys.stderr)
    return results


def table(results: dict[str, list[dict[str, float]]]) -> str:
    def median(subject: str, key: str) -> float:
        return statistics.median(result[key] for result in results[subject])

    names = {"copy": "read and written, synced", "original": "merged into the weights as published",
             "nf4": "merged into what nf4 dequantizes to"}
    lines = ["| | written | seconds | x reading and writing | CPU seconds | peak memory |", "|---|---|---|---|---|---|"]
    for subject, name in names.items():
        seconds, peaks = ([result[key] for result in results[subject]] for key in ("seconds", "peak_gb"))
        times = median(subject, "seconds") / median("copy", "seconds")
        lines.append(f"| {name} | {median(subject, 'written_gb'):.1f} GB | {median(subject, 'seconds'):.0f} "
                     f"({min(seconds):.0f} to {max(seconds):.0f}) | {times:.2f} | {median(subject, 'cpu_seconds'):.0f} | "
                     f"{max(peaks):.2f} GB |")
    loads = [result["load"] for each in results.values() for result in each]
    return "\n".join([*lines, "", f"Load of the machine after each run: {min(loads):.1f} to {max(loads):.1f}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layout", choices=("fused", "per-expert"), default="fused")
    parser.add_argument("--layers", type=int, default=6, help="1.7 GB each, beside 2 GB for embedding and head; at least 4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the files go, the system's temporary directory by default")
    parser.add_argument("--measure", choices=SUBJECTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.directory / "base", options.directory / "out")))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        print(f"writing the base into {directory}", file=sys.stderr)
        base = prepare(Path(directory), options.layout, options.layers)
        results = run(base, options.repeats)
    print(f"\n{options.layers} layers, {options.layout} layout, {os.cpu_count()} cores, medians of {options.repeats}\n")
    print(table(results))


if __name__ == "__main__":
    main()
