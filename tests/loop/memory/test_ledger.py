"""The ledger against what torch's allocator itself reports, and what it says of who made what."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from loop import accumulate
from loop.memory.ledger import Ledger
from loop.memory.peak import Peak
from loop.memory.phases import Memory, weight_tensors
from model.build import build
from model.config import LoraConfig
from model.tiny.write import write_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"qwen3": write_tiny(root / "qwen3", kind="qwen3", num_hidden_layers=4),
            "moe": write_tiny(root / "moe", num_hidden_layers=4, full_attention_interval=2, hidden_size=128)}


def allocator_peak(run):
    """The most bytes that the CPU allocator handed out while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, num_bytes in sorted(events, key=lambda event: event[0]):
        now += num_bytes
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
@pytest.mark.parametrize("base, recompute", [("float32", True), ("nf4", False), ("int8", True)])
def test_it_counts_what_the_allocator_counts(make_step, models, kind, base, recompute):
    config = LoraConfig(rank=4, alpha=8, target=("q_proj", "down_proj", "o_proj"))
    stage = build(Path(models[kind]), base, config, seed=0, device=CPU, recompute=recompute)
    adapters = list(stage.adapters().values())
    step, memory = make_step([(150, 50, 56), (256,)]), Memory(CPU)

    def run():
        accumulate.forward_backward(stage, memory, step)
        for parameter in adapters:
            parameter.grad = None

    ledger = Ledger()
    ledger.hold("weights", weight_tensors(stage.model))
    ledger.hold("adapters", adapters)
    before = ledger.current
    # what an operation takes inside itself the allocator sees, and the ledger does not: a copy in logsumexp, say
    run()  # whatever is made once
    with ledger:
        run()
    assert ledger.peak - before == pytest.approx(allocator_peak(run), rel=0.03)


class Inner(nn.Module):
    def forward(self, x):
        return (x @ x).relu()


def test_it_names_phase_module_and_line():
    model = nn.Sequential(Inner(), Inner())
    x = torch.randn(64, 64, requires_grad=True)
    ledger = Ledger()
    ledger.watch(model)
    memory = Memory(CPU, ledger)
    with ledger:
        with memory.during("forward", 3):
            y = model(x)
        with memory.during("backward", 3):
            y.sum().backward()
    line = inspect.getsourcelines(Inner.forward)[1] + 1
    first, *_ = [a for a in ledger.allocations if a.num_bytes == 4 * 64 * 64]
    assert (first.module, ledger.phases[first.phase].name, ledger.phases[first.phase].microbatch) == ("0", "forward", 3)
    assert first.line.startswith(f"tests/loop/memory/test_ledger.py:{line} forward")
    backward = [a for a in ledger.allocations if a.node.startswith("Mm")]
    assert backward and all(a.line.startswith(f"backward of tests/loop/memory/test_ledger.py:{line} forward") for a in backward)
    assert {a.module for a in backward} == {"0", "1"}
    peak = Peak.of(ledger, 0, ledger.clock)
    assert sum(peak.held.values()) == peak.num_bytes == ledger.peak
    assert peak.most["activations"] >= 2 * 4 * 64 * 64, "what both layers keep"


def test_what_dies_is_forgotten_and_what_grows_is_noticed():
    ledger = Ledger()
    with ledger:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(10, dtype=torch.uint8)
        b.resize_(500)
        view = a[10:]
        del a
        assert ledger.current == 1500
        del view
        assert ledger.current == 500
        torch.empty(7, device="meta")
    assert ledger.current == 500 and ledger.peak == 1500


def test_now_says_what_is_held_in_any_line_of_the_loop(make_step, models):
    """As a user asks while reading the loop: by category, exact to the byte, and in a step that would not be counted too."""
    stage = build(Path(models["qwen3"]), "int8", LoraConfig(4, 8, ("q_proj",)), seed=0, device=CPU, recompute=False)
    memory, step = Memory(CPU), make_step([(256,)])
    adapters = list(stage.adapters().values())
    memory.attach(stage.model, adapters, torch.optim.AdamW(adapters))
    memory.num_steps = 5  # no step is counted any more that is as large as those before
    memory.may_be_largest(step)
    with memory.step(step):
        first = memory.now()
    assert "other" not in first and first["resident"] > first["weights"] > 0 and first["gradients"] == 0
    assert first["adapters"] == sum(4 * p.numel() for p in adapters)
    with memory.step(step):
        before = memory.now()
        _, x_1TD = accumulate.hidden_states(stage, step.microbatches[0])
        middle = memory.now()
        assert middle["other"] - before["other"] > 4 * x_1TD.nbytes, "four layers keep their inputs and more"
        loss = stage.losses(x_1TD, step.microbatches[0].predict_N, step.microbatches[0].labels_N).sum()
        del x_1TD
        loss.backward()
        last = memory.now()
    assert last["gradients"] == last["adapters"] and last["other"] < before["other"] + 4096 < middle["other"]
    with memory.step(step):
        assert "other" in memory.now()
    with memory.step(step):  # asked for in the step before
        pass
    with memory.step(step):
        assert memory.ledger is None
