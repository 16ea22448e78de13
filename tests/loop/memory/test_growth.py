"""What microbatches leave behind is found, with its line and who holds it; what a step needs is not."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch

from loop import accumulate
from loop.config import load_config
from loop.distributed.groups import Place
from loop.memory import growth, phases
from loop.memory.phases import Memory
from loop.plan import rehearsal
from model.build import build
from model.config import LoraConfig
from model.tiny.write import write_tiny

CPU, MIB = torch.device("cpu"), 2**20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"qwen3": write_tiny(root / "qwen3", kind="qwen3", num_hidden_layers=4),
            "moe": write_tiny(root / "moe", num_hidden_layers=4, full_attention_interval=2, hidden_size=128)}


@pytest.fixture
def take_steps(make_step, models):
    """Two steps of these microbatches; returns what was said of each."""

    def take(edit="none", kind="qwen3", base="float32", recompute=True, keep_layers=0, num_microbatches=4, trace_step=None):
        stage = build(models[kind], base, LoraConfig(4, 8, ("q_proj", "down_proj", "o_proj")), seed=0, device=CPU,
                      recompute=recompute)
        stage.recomputed = range(len(stage.recomputed) - keep_layers)
        memory, adapters = Memory(CPU, trace_step=trace_step), list(stage.adapters().values())
        memory.attach(stage.model, adapters)
        step, said = make_step([(150, 50, 56), (256,), (100, 156), (256,)][:num_microbatches]), []
        for _ in range(2):
            with memory.step(step):
                forward_backward(stage, memory, step, edit)
            said.append(memory.growth.news())
            for parameter in adapters:
                parameter.grad = None
        return memory, said

    return take


def forward_backward(stage, memory, batch, edit):
    """That of accumulate.py, as a user might edit it."""
    losses, kept = [], []
    for number, microbatch in enumerate(batch.microbatches):
        with memory.during("forward", number):
            on_device, x_1TD = accumulate.hidden_states(stage, microbatch)
            if edit == "large":
                kept.append(torch.zeros(MIB, dtype=torch.uint8))
        with memory.during("loss", number):
            loss = stage.losses(x_1TD, on_device.predict_N, on_device.labels_N).sum()
            del x_1TD
        if edit != "late":
            with memory.during("backward", number):
                loss.backward(retain_graph=edit == "retained")
        if edit == "between":
            kept += [torch.ones(MIB, dtype=torch.uint8)]
        losses.append(loss if edit in ("undetached", "retained", "late") else loss.detach())
    if edit == "late":
        torch.stack(losses).sum().backward()


def line_of(text):
    lines, first = inspect.getsourcelines(forward_backward)
    (number,) = [number for number, line in enumerate(lines, first) if text in line]
    return f"tests/loop/memory/test_growth.py:{number} forward_backward"


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
@pytest.mark.parametrize("base, recompute, keep_layers", [("float32", True, 0), ("nf4", True, 2), ("int8", False, 0)])
def test_the_loop_as_it_is_leaves_nothing_but_losses(take_steps, monkeypatch, kind, base, recompute, keep_layers):
    monkeypatch.setattr(growth, "LEAST_BYTES", 64)
    for edit in ("none", "undetached"):  # the backward pass frees what the graph had saved
        _, said = take_steps(edit, kind, base, recompute, keep_layers)
        assert said == ["", ""]


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_a_mebibyte_a_microbatch_is_found_with_its_line_and_said_once(take_steps, num_microbatches):
    memory, said = take_steps("large", num_microbatches=num_microbatches)
    line = line_of("kept.append")
    assert said == ["", "memory grows by 1.0 MiB with every microbatch of step 1, 100 % of it made at " + line + "; held in a "
                    "list, held by a local variable or a graph (docs/debugging-memory.md)"]
    assert memory.growth.found.num_bytes == MIB + 4 and memory.growth.news() == ""


def test_what_is_made_between_two_microbatches_is_found_as_well(take_steps):
    memory, said = take_steps("between")
    assert said[0] == "" and "grows by 1.0 MiB" in said[1] and line_of("torch.ones") in said[1]
    assert "held by a local variable" in said[1]


@pytest.mark.parametrize("edit", ["retained", "late"])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_graph_that_is_kept_is_found_with_its_end(take_steps, edit, recompute):
    memory, (first, second) = take_steps(edit, recompute=recompute)
    assert first == "" and "made at model/" in second
    assert re.search(f"held by a graph of autograd, perhaps that of what was made at {re.escape(line_of('.sum()' + chr(10)))}",
                     second), second


def test_a_traced_step_names_the_line_at_once_and_shows_it_on_its_page(take_steps):
    memory, said = take_steps("large", trace_step=1)
    assert line_of("kept.append") in said[0] and said[1] == ""
    (row, *others) = memory.traced.piled_up
    assert (row.num_bytes, row.count, row.phase) == (MIB, 1, "forward") and all(other.num_bytes < 64 for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_pipeline_holds_for_its_schedule_is_no_growth(write_config, make_step, models, monkeypatch, schedule, rank):
    ledgers = []
    monkeypatch.setattr(rehearsal, "Ledger", lambda *args, **options: ledgers.append(phases.Ledger(*args, **options))
                        or ledgers[0])
    config = load_config(write_config(), ["model.base=nf4", "lora.target=q_proj,o_proj,down_proj", "train.recompute=false",
                                          f"pipeline.schedule={schedule}"])
    rehearsal.rehearse(config, models["qwen3"], Place(rank, 2, 2, (4,)), "cpu", [make_step([(256,)] * 4)], all_layers=True)
    assert sum(line.num_bytes for line in growth.piled_up(ledgers[0])) < 64


class CountedMemory(Memory):
    """On CUDA, whose allocator says these bytes one after the other."""

    def __init__(self, said):
        super().__init__(torch.device("cuda"))
        self.said = iter(said)

    def read(self):
        return next(self.said), 0


@pytest.mark.parametrize("starts, found", [
    ([0, 90, 90, 90], 0), ([0, 90, 92, 94], 2), ([0, 90, 92, 92], 0), ([0, 90], 0), ([5], 0), ([], 0)])
def test_on_a_gpu_the_allocator_tells(monkeypatch, starts, found):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    memory = CountedMemory(number * MIB for start in starts for number in (start, 0))  # at a forward's start and at its end
    batch = SimpleNamespace(step=7, microbatches=[None] * len(starts))
    with memory.step(batch):
        for number in range(len(starts)):
            with memory.during("forward", number):
                pass
    assert memory.growth.needs_lines == bool(found)
    assert not found or memory.growth.found == growth.Growth(7, found * MIB)
