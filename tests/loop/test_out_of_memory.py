"""Memory that really runs out: the allocator of a rank is refused memory by the system, and the user is told what to do."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loop import out_of_memory
from loop.config import load_config
from loop.distributed.groups import Ranks
from loop.errors import is_out_of_memory
from loop.memory import failure
from loop.memory.phases import Memory
from loop.metrics import RunLog
from loop.planned import Plan
from model.tiny.write import write_tiny
from tests.processes import Run

ROOT = Path(__file__).parents[2]
LIMITED = Path(__file__).with_name("limited.py")
ON_CPU = ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
          "4000000 bytes. Error code 12 (Cannot allocate memory)")
ON_CUDA = ("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 31.36 GiB of which 512.00 MiB is "
           "free. Including non-PyTorch memory, this process has 30.80 GiB memory in use. Of the allocated memory 28.25 GiB is "
           "allocated by PyTorch, and 2.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
           "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.")


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory):
    """Small weights, large activations."""
    return write_tiny(
        tmp_path_factory.mktemp("wide") / "llama", kind="llama", num_hidden_layers=2, hidden_size=64, intermediate_size=4096,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )


@pytest.fixture
def wide_config(write_config, wide_llama, make_row, write_rows):
    """A step of 8 rows takes some 650 MiB in one microbatch of 4,096 tokens."""
    def write(**changes):
        rows = [make_row("Why?" * 100, f"It eyes {square}. " * 6, source="book") for square in ("e4", "e5", "d4", "d5") * 4]
        changes = {"train__microbatch_tokens": 4096, "train__recompute": False, "eval__max_rows": 2, **changes}
        return write_config(model__path=str(wide_llama), data__train=write_rows(rows), data__max_tokens=1024, **changes)

    return write


def run_limited(config, entry, mib, *arguments, ranks=1, limited_rank=0, launcher=False):
    """Runs train or pipeline_train with so many MiB to spare on one rank; returns what it said and its exit status, or those
    of all ranks where no launcher starts them."""
    limit = {"LIMIT_MIB": str(mib), "LIMIT_RANK": str(limited_rank)}
    if not launcher:
        run = Run(LIMITED, entry, "--config", config, *arguments, ranks=ranks, directory=config.parent, environment=limit)
        status = run.wait(240)
        assert "Traceback" not in run.said
        return run.said, status
    command = [sys.executable, "-m", "loop.distributed.launch", "--nproc-per-node", str(ranks), str(LIMITED),
               entry, "--config", str(config), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **limit}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=240)
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr, done.returncode


def read_report(tmp_path, rank=0):
    return json.loads((tmp_path / f"checkpoints/tiny/out-of-memory-rank-{rank}.json").read_text())


def left_behind(marker):
    """Processes with this in their command line."""
    lines = [path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    return [line for line in lines if marker in line]


def readable(path):
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


@pytest.mark.slow
def test_a_step_without_memory_says_where_for_what_and_what_to_change(wide_config, tmp_path):
    errors, status = run_limited(wide_config(), "train", 350, "train.memory_trace=1")
    assert status == [3], errors
    report = read_report(tmp_path)
    message = errors[errors.index("\nerror: ") + len("\nerror: "):].strip()
    assert message.startswith(report["message"])
    first = message.splitlines()[0]
    assert re.fullmatch(r"out of memory on rank 0, in the (forward|backward) of microbatch 0 of step 1: "
                        r"model/\w+\.py:\d+ \w+ asked for [\d.]+ MiB in model\.layers\.\d\.\S+", first), first
    rows = report["rows"]
    assert len(rows["lines"]) == len(rows["lengths"]) == 8 and set(rows["lines"]) <= set(range(1, 17))
    assert f"microbatch: {rows['tokens']:,} tokens, 8 rows, the longest of {max(rows['lengths'])}, " in message
    assert 3500 < sum(rows["lengths"]) <= rows["tokens"] <= 4096
    assert (report["step"], report["microbatch"], report["rank"]) == (1, 0, 0)
    assert report["held_bytes"]["activations"] > 100 * 2**20, "what the step that failed held, of a ledger"
    assert report["held_bytes"]["weights"] == pytest.approx(report["planned_gib"]["weights"] * 2**30)
    assert report["held_bytes"]["weights"] > 2**20 and report["planned_peak_gib"] > 0.5
    assert sum(report["planned_gib"].values()) == pytest.approx(report["planned_peak_gib"])

    peaks = {a["setting"]: a["peak_gib"] for a in report["advice"]}
    half = f"train.microbatch_tokens={-(-rows['tokens'] // 256) * 128}"
    assert peaks.keys() == {half, "train.recompute=true", "model.base=nf4", "train.optimizer=adamw8bit"}
    assert list(peaks.values()) == sorted(peaks.values()), "what saves most comes first"
    assert peaks[half] < 0.6 * report["planned_peak_gib"] and peaks["train.recompute=true"] < report["planned_peak_gib"]
    assert re.search(rf"{half} +0\.\d+ GiB\n", message) and "model.base=nf4" in message
    assert "adamw8bit" not in message, "it would save next to nothing"
    assert [path.rpartition("/")[2] for path in report["files"]] == ["out-of-memory-rank-0.html"]
    assert (tmp_path / report["files"][0]).stat().st_size > 10_000


@pytest.mark.slow
def test_one_rank_without_memory_ends_the_other(wide_config, tmp_path):
    errors, status = run_limited(wide_config(train__rows_per_step=16), "train", 300, ranks=2, limited_rank=1, launcher=True)
    assert status != 0
    assert "error: out of memory on rank 1, in the " in errors and "error: out of memory on rank 0" not in errors
    assert "was ended by" not in errors, "neither had to be"
    assert read_report(tmp_path, rank=1)["advice"] and not (tmp_path / "checkpoints/tiny/out-of-memory-rank-0.json").exists()
    deadline = time.monotonic() + 10
    while left_behind(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left_behind(str(tmp_path))


@pytest.mark.slow
def test_a_stage_without_memory_says_so_and_that_1f1b_would_help(wide_config, tmp_path):
    config = wide_config(train__microbatch_tokens=1024)
    errors, status = run_limited(config, "pipeline_train", 130, "--split", "2", ranks=2, limited_rank=1)
    assert status[1] == 3 and status[0] != 0
    assert re.search(r"error: out of memory on rank 1 \(stage 1\), in the forward of microbatch \d of step 1: "
                     r"\w+/\w+\.py:\d+ ", errors), errors
    report = read_report(tmp_path, rank=1)
    assert report["module"].startswith("model.layers.1.") and len(report["rows"]["lines"]) == 2
    peaks = {a["setting"]: a["peak_gib"] for a in report["advice"]}
    assert peaks["pipeline.schedule=1f1b"] < 0.6 * report["planned_peak_gib"]
    assert not left_behind(str(tmp_path))


def test_while_it_loads_there_are_no_rows_and_other_errors_pass(write_config, tmp_path, monkeypatch):
    config, ranks, memory = load_config(write_config()), Ranks(), Memory(torch.device("cpu"))
    rows = type("Rows", (), {"lengths": [100]})
    log = RunLog(tmp_path, str(tmp_path / "log"), ranks.device, enabled=True)
    known = (config, rows, rows, ranks, memory, Plan(config, ranks, log.planned))
    monkeypatch.setattr(sys, "executable", "/bin/false")  # a planner that fails
    with pytest.raises(out_of_memory.OutOfMemory) as raised:
        with out_of_memory.reporting(*known), memory.during("load"):
            torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(raised.value.__cause__)
    message = str(raised.value)
    assert message.startswith("out of memory on rank 0, loading the weights: tests/loop/test_out_of_memory.py:")
    assert "asked for 1.049e+06 GiB" in message and "microbatch:" not in message
    assert re.search(r"model.base=nf4 +not planned", message), "without numbers, but there"
    assert len(message.splitlines()) == 5, "nothing else would help there"
    assert read_report(tmp_path)["rows"] is None
    for other in (RuntimeError("shapes differ"), OSError(2, "No such file"), ValueError("no")):
        with pytest.raises(type(other), match=re.escape(str(other))):
            with out_of_memory.reporting(*known):
                raise other


def test_what_allocators_say_is_read():
    assert failure.sizes_in(ON_CPU) == {"asked": 4_000_000}
    assert failure.sizes_in(ON_CUDA) == {
        "asked": int(1.5 * 2**30), "card": int(31.36 * 2**30), "free": 2**29, "allocated": int(28.25 * 2**30),
        "reserved beyond that": 2**31}
    assert failure.sizes_in("Unable to allocate 2.00 MiB for an array with shape (262144,)") == {"asked": 2**21}
    assert failure.sizes_in("CUDA error: out of memory") == {}
    assert is_out_of_memory(RuntimeError(ON_CPU)) and is_out_of_memory(torch.OutOfMemoryError(ON_CUDA))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))


def test_only_what_bears_on_the_failure_is_tried_and_no_microbatch_is_shorter_than_a_row(write_config):
    config = load_config(write_config(train__recompute=False))

    def tried(phase, longest=100, num_stages=1):
        failed = failure.Failure(0, phase, None, None, "", "", {}, {})
        ranks = Ranks(0, num_stages, num_stages)
        return dict(change.split("=") for change in out_of_memory.possible_changes(config, ranks, failed, longest))

    for longest, tokens in ((100, "256"), (300, "384"), (512, None)):
        assert tried("forward", longest).get("train.microbatch_tokens") == tokens
    assert tried("load").keys() == {"model.base"}
    assert tried("eval").keys() == {"train.microbatch_tokens", "model.base", "train.optimizer"}
    assert tried("backward", num_stages=2)["pipeline.schedule"] == "1f1b"


def test_what_the_step_held_is_let_go():
    released = []

    class Held:
        def __del__(self):
            released.append(True)

    def fails():
        held = Held()  # noqa: F841
        torch.empty(2**50, dtype=torch.uint8)

    try:
        fails()
    except RuntimeError as error:
        error.__context__ = RuntimeError("of a schedule, in a circle with what it wraps")
        error.__context__.__cause__ = error
        memory = Memory(torch.device("cpu"))
        failure.read_failure(error, memory, rank=0)
        assert not released
        failure.free_step(error, memory)
        assert released
