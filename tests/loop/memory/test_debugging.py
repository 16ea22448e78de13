"""The patches of docs/debugging-memory.md, applied to a copy of the source: each run names the line that the page says."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.loop.memory.test_trace import line_of, read_report

PAGE = (ROOT / "docs/debugging-memory.md").read_text()
PATCHES = dict(zip(("leak", "graph", "weight"), re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL), strict=True))
SMALLER = {"loop/memory/growth.py": [("LEAST_BYTES = 2**18", "LEAST_BYTES = 2**12")]}  # this model's hidden states are


@pytest.fixture
def faulty(write_config, edited_copy, run_copy):
    """Trains two steps with a fault of the page; returns what was said of growth, the report of step 2, and the source."""

    def run(fault):
        copy = edited_copy(SMALLER)
        subprocess.run(["git", "apply", "-"], input=PATCHES[fault], text=True, cwd=copy, check=True)
        config = write_config(model__base="int8", train__max_steps=2, train__recompute=False, train__memory_trace=2,
                              train__microbatch_tokens=256)
        said = run_copy(copy, config).stdout
        (page,) = Path("checkpoints/tiny").glob("memory-step-2-rank-0.html")
        return [line for line in said.splitlines() if line.startswith("memory grows")], read_report(page), copy

    return run


@pytest.mark.slow
def test_a_leak(faulty):
    (said,), report, copy = faulty("leak")
    where = "held in a list, held by the global 'SEEN' of model.stages"
    made = line_of(copy, "model/stages.py", "return x_1TD + h_1TD")
    assert f"100 % of it made at {made} decoder_layer; {where}" in said
    (first, *_) = report["survivors"]
    assert first["line"].startswith(made) and first["remark"].startswith(where)


@pytest.mark.slow
def test_a_graph_that_is_kept(faulty):
    (said,), report, copy = faulty("graph")
    end = line_of(copy, "loop/accumulate.py", ".sum() / batch.num_supervised_tokens")
    assert f"held by a graph of autograd, perhaps that of what was made at {end} forward_backward" in said
    assert sum(row["num_bytes"] for row in report["piled_up"]) > 10 * 4096
    assert sum(row["num_bytes"] for row in report["survivors"]) <= 1024, "the list is gone by then"


@pytest.mark.slow
def test_a_dequantized_weight(faulty):
    said, report, copy = faulty("weight")
    place = line_of(copy, "model/matmul.py", "ctx.weights = ")
    kept = [row for row in report["at_peak"] if row["remark"] == "a dequantized weight, kept for the backward pass"]
    assert not said and kept and all(f"{place} forward" in row["line"] or f"{place} <listcomp>" in row["line"] for row in kept)
