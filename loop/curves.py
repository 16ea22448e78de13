"""Draws curves.png from metrics.jsonl. Needs matplotlib (extra [plots])."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss with held-out loss, learning rate with gradient norm, tokens per second with peak memory."""
    steps = [record for record in records if "loss" in record]
    evals = [record for record in records if "eval_loss" in record]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, rate, speed = figure.subplots(1, 3)

    def line(axis: Any, key: str, label: str, color: str, **style: Any) -> None:
        axis.plot([r["step"] for r in steps], [r[key] for r in steps], color=color, label=label, **style)
        axis.set_xlabel("optimizer step")

    line(loss, "loss", "train", "tab:blue", alpha=0.6)
    loss.plot([r["step"] for r in evals], [r["eval_loss"] for r in evals], "o-", color="tab:orange", label="held out")
    loss.set_title("loss per supervised token")
    loss.grid(alpha=0.3)
    loss.legend()

    line(rate, "lr", "learning rate", "tab:green")
    rate.set_title("learning rate (green), gradient norm (grey)")
    line(rate.twinx(), "grad_norm", "gradient norm", "tab:gray", alpha=0.6)

    line(speed, "tokens_per_s", "tokens/s", "tab:purple")
    speed.set_ylim(bottom=0)
    speed.set_title("tokens/s (purple), peak GiB (red)")
    memory = speed.twinx()
    line(memory, "peak_gib", "peak GiB", "tab:red")
    memory.set_ylim(bottom=0)
    figure.savefig(path.with_suffix(".partial.png"), dpi=110)
    path.with_suffix(".partial.png").replace(path)
