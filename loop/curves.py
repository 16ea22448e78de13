"""Draws curves.png from metrics.jsonl and memory.png from memory.jsonl. Needs matplotlib (extra [plots])."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

MAX_RANKS = 8  # that memory.png shows
COLORS = {"forward": "tab:blue", "loss": "tab:green", "backward": "tab:orange", "update": "tab:purple"}


def draw_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
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
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Replaces the picture: whoever has it open sees the old one or the new one."""
    figure.savefig(path.with_suffix(".partial.png"), dpi=110)
    path.with_suffix(".partial.png").replace(path)


def draw_memory(records: list[dict[str, Any]], path: Path, title: str, kind: str, planned_gib: list[float]) -> None:
    """One panel a rank: its peak in each phase of every step, and what stayed at the step's end.

    Args:
        kind: allocated | resident. Of resident size the peak of a phase is not known: there each phase's end is drawn.
        planned_gib: peak by rank; nothing where it is not known.
    """
    num_ranks = 1 + max((r["rank"] for r in records), default=0)
    num_shown = min(num_ranks, MAX_RANKS)
    num_rows = 1 if num_shown <= 3 else 2
    num_columns = -(-num_shown // num_rows)
    figure = Figure(figsize=(8 if num_columns == 1 else 12, 0.8 + 3.2 * num_rows), layout="constrained")
    some = "" if num_ranks == num_shown else f", the first {num_shown} of {num_ranks} ranks"
    figure.suptitle(f"{title}: {kind} memory{some}")
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    for rank, axis in enumerate(panels.flat):
        if rank >= num_shown:
            axis.set_axis_off()
            continue
        draw_rank(axis, [r for r in records if r["rank"] == rank], kind, planned_gib[rank : rank + 1])
        axis.set_title(f"rank {rank}", fontsize="medium")
        if rank % num_columns == 0:
            axis.set_ylabel("GiB")
        if rank + num_columns >= num_shown:
            axis.set_xlabel("optimizer step")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.tick_params(labelbottom=True)
    panels[0, 0].set_ylim(bottom=0)  # of all: not before the highest is drawn
    # the last stage of a pipeline has all phases
    lines = {label: handle for axis in panels.flat[::-1] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4 if num_columns == 1 else 7,
                  fontsize=9, frameon=False)
    save(figure, path)


def draw_rank(axis: Any, records: list[dict[str, Any]], kind: str, planned_gib: list[float]) -> None:
    """One panel of memory.png."""

    def line(phase: str, key: str, label: str, **style: Any) -> None:
        points = [(r["step"], r[phase][key]) for r in records if phase in r]
        if points:
            axis.plot(*zip(*points), label=label, **{"marker": "." if len(points) <= 40 else None, **style})

    key, what = ("gib", "end of") if kind == "resident" else ("peak_gib", "peak in")
    for phase, color in COLORS.items():
        line(phase, key, f"{what} {phase}", color=color, alpha=0.8)
    if kind == "resident":
        line("update", "peak_gib", "highest so far", color="tab:gray", linestyle="--")
    else:
        line("update", "gib", "after the step", color="black", linestyle="--")
    line("eval", key, f"{what} evaluation", color="dimgray", linestyle="", marker="o", markersize=4, markerfacecolor="none")
    for phase in ("built", "loaded"):
        for step, gib in [(r["step"], r[phase]["gib"]) for r in records if phase in r]:
            axis.plot(step, gib, "D", color="black", markersize=4)
            axis.annotate(phase, (step, gib), (6, 0), textcoords="offset points", va="center", fontsize=8,
                          bbox={"color": "white", "pad": 1, "alpha": 0.85})
    for gib in planned_gib:
        axis.axhline(gib, color="tab:red", linestyle=":", label="planned peak")
    axis.grid(alpha=0.3)
