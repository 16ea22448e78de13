"""Draws curves.png from metrics.jsonl and memory.png from memory.jsonl. Needs matplotlib (extra [plots]).
Takes 0.2 s, and more as a run grows; a process that does so beside a run takes 1 s of one core, at low priority, and 60 MB.

python -m loop.curves RUN_DIR allocated|resident PID [GIB ...]    # the process ends with process PID; planned peaks by rank
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import write_whole
from loop.distributed.launch import die_with_parent
from loop.line_file import MEMORY_FILE, METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NICENESS = 10
MAX_RANKS = 8  # that memory.png shows
SMOOTHED_FROM = 20  # steps; the mean of fewer is that of each
MAX_SOURCES = 8  # of held-out rows that curves.png shows one by one
KINDS = {"allocated": "memory of tensors on the GPU (as the allocator counts)",
         "resident": "memory of the whole process (resident size, tensors and all else)"}
PEAKS = {"allocated": "peak of tensors on a GPU, GiB", "resident": "peak memory, GiB"}
COLORS = {"forward": "tab:blue", "loss": "tab:green", "backward": "tab:orange", "update": "tab:purple"}


def main() -> None:
    run_dir, kind, parent, *planned_gib = sys.argv[1:]
    die_with_parent(signal.SIGKILL)
    if os.getppid() != int(parent):  # the run is gone already
        sys.exit(1)
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    print(draw_pictures(Path(run_dir), kind, [float(gib) for gib in planned_gib]))


def draw_pictures(run_dir: Path, kind: str, planned_gib: list[float]) -> str:
    """Draws both pictures of a run, and says why they could not be drawn, if so: whatever matplotlib raises ends no run."""
    try:
        draw_curves(read_metrics(run_dir / METRICS_FILE), run_dir / "curves.png", run_dir.name, kind)
        draw_memory(read_metrics(run_dir / MEMORY_FILE), run_dir / "memory.png", run_dir.name, kind, planned_gib)
    except ImportError:
        return "curves.png and memory.png are not drawn: matplotlib is missing (pip install matplotlib)"
    except Exception as error:
        found = error.strerror if isinstance(error, OSError) else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"{run_dir}: the pictures are not drawn: {found}"
    return ""


def draw_curves(records: list[dict[str, Any]], path: Path, title: str, kind: str) -> None:
    """Draws a panel each: training loss, held-out loss by source, learning rate, gradient norm, tokens/s, peak of memory.

    Args:
        kind: allocated | resident, what `peak_gib` is; it begins anew when a run is resumed.
    """
    from matplotlib.figure import Figure

    def points(key: str) -> tuple[list[int], list[float]]:
        chosen = [record for record in records if record.get(key) is not None]
        return [record["step"] for record in chosen], [record[key] for record in chosen]

    figure = Figure(figsize=(12, 6.4))
    panels = list(add_panels(figure, title, 2, 3, sharex=True).flat)
    loss, held_out, *others, memory = panels
    steps, losses = points("loss")
    is_smoothed = len(losses) >= SMOOTHED_FROM
    loss.plot(steps, losses, color="tab:blue", alpha=0.3 if is_smoothed else 1, linewidth=1, label="each step")
    if is_smoothed:
        loss.plot(steps, smoothed(losses), color="tab:blue", label="smoothed")
    loss.set_title("training loss per supervised token", y=1)
    held_out.plot(*points("eval_loss"), color="black", marker="o", markersize=4, label="all")
    by_source = [(record["step"], record["eval_loss_by_source"]) for record in records if "eval_loss_by_source" in record]
    sources = sorted({source for _, losses_by_source in by_source for source in losses_by_source})
    for source in sources if 1 < len(sources) <= MAX_SOURCES else ():
        own = [(step, losses[source]) for step, losses in by_source if source in losses]
        held_out.plot(*zip(*own), linewidth=1, label=source)
    held_out.set_title("held-out loss", y=1)
    is_resident = kind == "resident"
    if is_resident:
        memory.plot(*points("tensors_gib"), color="tab:red", label="tensors")
    for axis, (key, name, color) in zip((*others, memory), (
            ("lr", "learning rate", "tab:green"), ("grad_norm", "gradient norm", "tab:gray"),
            ("tokens_per_s", "tokens/s", "tab:purple"), ("peak_gib", PEAKS[kind], "tab:red"))):
        steps, values = points(key)
        axis.plot(steps, values, color=color, alpha=0.35 if axis is memory and is_resident else 1, label="process (resident)")
        axis.set_title(name, y=1)
        axis.set_ylim(0, 1.08 * max(values, default=1) or 1)
        axis.ticklabel_format(axis="y", scilimits=(-3, 4))
    for axis in panels:
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelbottom=True)
    for axis in [loss, held_out] + [memory] * is_resident:
        axis.legend(fontsize=9)
    replace_picture(figure, path)


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value and those around it, over a tenth of all values; of fewer at both ends."""
    half = len(values) // 20
    sums = [0.0, *accumulate(values)]
    spans = [(max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def add_panels(figure: Figure, title: str, num_rows: int, num_columns: int, legend: float = 0.0, **options: Any) -> Any:
    """Adds titles and panels, with margins in inches, `legend` of them below. Layouts that matplotlib computes take three
    times as long, and so do titles of panels without a `y`, which it moves out of the way of the ticks."""
    width, height = figure.get_size_inches()
    figure.suptitle(title, y=1 - 0.08 / height)
    figure.supxlabel("optimizer step", y=(0.08 + legend) / height)
    figure.subplots_adjust(left=0.7 / width, right=1 - 0.6 / width, bottom=(0.6 + legend) / height, top=1 - 0.65 / height,
                           wspace=0.25, hspace=0.3)
    return figure.subplots(num_rows, num_columns, **options)


def replace_picture(figure: Figure, path: Path) -> None:
    """Writes a picture whole, so that a viewer never reads half of it."""
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110))


def draw_memory(records: list[dict[str, Any]], path: Path, title: str, kind: str, planned_gib: list[float]) -> None:
    """Draws one panel a rank: the memory at the end of each phase of every step, and the highest since the process began.

    Args:
        kind: allocated | resident, for the title.
        planned_gib: peak by rank; empty where it is not known.
    """
    from matplotlib.figure import Figure

    num_ranks = 1 + max((r["rank"] for r in records), default=0)
    num_shown = min(num_ranks, MAX_RANKS)
    num_rows = 1 if num_shown <= 3 else 2
    num_columns = -(-num_shown // num_rows)
    figure = Figure(figsize=(8 if num_columns == 1 else 12, 1 + 3.2 * num_rows))
    some = "" if num_ranks == num_shown else f", the first {num_shown} of {num_ranks} ranks"
    panels = add_panels(figure, f"{title}: {KINDS[kind]}, in GiB{some}", num_rows, num_columns, legend=0.5,
                        sharex=True, sharey=True, squeeze=False).flat
    for rank, axis in enumerate(panels):
        if rank >= num_shown:
            axis.set_axis_off()
            continue
        draw_rank(axis, [r for r in records if r["rank"] == rank], planned_gib[rank : rank + 1])
        axis.set_title(f"rank {rank}", y=1, fontsize="medium")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelbottom=True)
    panels[0].set_ylim(bottom=0)  # shared by all panels; set after the last one is drawn, since it fixes the upper limit too
    # the first stages of a pipeline have no loss: the last panel has the labels of all phases
    lines = {label: handle for axis in list(panels)[::-1] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=4 if num_columns == 1 else 7,
                  fontsize=9, frameon=False)
    replace_picture(figure, path)


def draw_rank(axis: Any, records: list[dict[str, Any]], planned_gib: list[float]) -> None:
    """Draws one panel of memory.png."""
    lines: list[tuple[str, str, str, dict[str, Any]]] = [
        *((phase, "gib", f"end of {phase}", {"color": color, "alpha": 0.35, "linewidth": 1})
          for phase, color in COLORS.items() if phase != "update"),
        ("update", "gib", "end of step", {"color": COLORS["update"], "linewidth": 2}),
        ("update", "peak_gib", "highest since the process began", {"color": "black", "linewidth": 2}),
        ("eval", "gib", "end of evaluation",
         {"color": "dimgray", "linestyle": "", "marker": "o", "markersize": 4, "markerfacecolor": "none"}),
        *((phase, "gib", "", {"color": "black", "linestyle": "", "marker": "D", "markersize": 4})
          for phase in ("built", "loaded")),
    ]
    for phase, key, label, style in lines:
        points = [(record["step"], record[phase][key]) for record in records if phase in record]
        if points:
            axis.plot(*zip(*points), label=label, **{"marker": "." if len(points) <= 40 else None, **style})
        for point in points if not label else ():
            axis.annotate(phase, point, (6, {"built": -5, "loaded": 5}[phase]), textcoords="offset points", va="center",
                          fontsize=8, bbox={"color": "white", "pad": 1, "alpha": 0.85})
    for gib in planned_gib:
        axis.axhline(gib, color="tab:red", linestyle=":", label="planned peak")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
