"""Checks a machine before a run: its cards, every fast path at the model's sizes, links, memory and checkpoints.
Takes at most five minutes, and needs no weights.

python -m loop.check --config configs/4b.yaml [key=value ...] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Callable, Iterable

import torch

from loop.check.findings import Finding, table, verdict
from loop.check.kernels import kernels
from loop.check.layers import layers
from loop.check.links import links
from loop.check.machine import machine
from loop.check.saving import saving
from loop.config import Config, load_config
from loop.config.command_line import add_config_arguments
from loop.errors import run_command
from loop.paths import Sizes, device_name, switch_off_unfit, versions
from loop.rates import is_for_gpus, measure
from loop.run import find_model
from model.build import text_config

LINK_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loop.check", description="Does this machine compute right, and how fast?")
    parser.add_argument("--json", action="store_true", help="print the numbers alone")
    add_config_arguments(parser)
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    model_dir, _ = find_model(config.model.path)
    model = text_config(model_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_delta_rule = Sizes.of(model, 0).value_heads > 0
    switch_off_unfit(model, device)
    tokens = LINK_TOKENS if device.type == "cuda" else LINK_TOKENS // 16
    can_time = device.type == "cuda" or not is_for_gpus(model)
    parts: dict[str, Callable[[], Iterable[Finding]]] = {
        "the machine": lambda: machine(config, has_delta_rule),
        "kernels": lambda: kernels(config, model, device),
        "operations": lambda: [operations(config, model_dir, device)] if can_time else [],
        "links": lambda: links(torch.cuda.device_count() or 2, tokens, model.hidden_size),
        "the memory of a layer of each kind": lambda: layers(config, model_dir, device),
        "saving": lambda: [saving(config, model_dir)],
    }
    findings: list[Finding] = []
    for name, part in parts.items():
        started = time.perf_counter()
        print(f"checking {name} ...", end=" ", file=sys.stderr, flush=True)
        try:
            findings += part()
        except ValueError:
            raise
        except Exception as error:  # whatever a broken driver or kernel raises is what a check is for
            findings.append(Finding("did not end", name, "stopped by an error", f"{type(error).__name__}: {error}"))
        print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    said = verdict(findings, args.config, device.type == "cuda")
    report = {"config": args.config, "device": device_name(device), "versions": versions(), "verdict": said,
              "rates": next((finding.numbers for finding in findings if finding.part == "operations"), None),
              "findings": [asdict(finding) for finding in findings]}
    config.run_dir.mkdir(parents=True, exist_ok=True)
    path = config.run_dir / "check.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report) if args.json else f"{table(findings)}\n\n{said} The numbers are in {path}.")
    sys.exit(any(finding.problem for finding in findings))


def operations(config: Config, model_dir: Path, device: torch.device) -> Finding:
    """How fast the operations of a step run here, from which `loop.plan` and the run's own plan predict its time."""
    rates = measure(config, model_dir, device, [config.train.microbatch_tokens], torch.get_num_threads())
    tflops = ", ".join(f"{kind} {flops / 1e12:.3g}" for kind, (flops, _) in rates.by_kind.items()
                       if kind in ("base matmul", "attention forward", "attention backward"))
    words = f"TFLOP/s: {tflops}; {1e6 * rates.call_s:.1f} microseconds a call"
    return Finding("operations", "of a step", words, numbers=asdict(rates))


if __name__ == "__main__":
    run_command(main)
