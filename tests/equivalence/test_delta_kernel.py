"""The delta rule by a kernel over the whole stream: equal to each row alone, chosen by this project alone, and foreseen.

The kernel needs a GPU; a stand-in takes its place, which computes each row with transformers' reference.
"""

import inspect
import json
import sys
import textwrap

import pytest
import torch
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_chunk_gated_delta_rule

from loop.config import load_config
from loop.distributed.groups import Place
from loop.memory.phases import GIB
from loop.plan.rehearsal import rehearse
from model import delta_rule
from model.delta_rule import CausalConvolution, StreamConvolution, rule_in_batches, rule_over_stream, why_no_kernel
from model.devices import OFF
from model.mixers import Segments
from model.tiny.write import write_tiny
from tests.processes import Run

KEY_HEADS, VALUE_HEADS, SIZE, WIDTH = 2, 4, 16, 4
CHANNELS = (2 * KEY_HEADS + VALUE_HEADS) * SIZE


def segments(lengths):
    return Segments(torch.tensor((0, *lengths)).cumsum(0).int(), lengths)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def stand_in(q, k, v, g, beta, where):
    """What flash-linear-attention computes, row by row."""
    q, k = (x.repeat_interleave(VALUE_HEADS // KEY_HEADS, dim=2) for x in (q, k))
    rows = zip(*(x.split(where.lengths, dim=1) for x in (q, k, v, g, beta)))
    reference = inspect.unwrap(torch_chunk_gated_delta_rule)
    return torch.cat([reference(q, k, v, g=g, beta=b, use_qk_l2norm_in_kernel=True)[0] for q, k, v, g, b in rows], dim=1)


@pytest.mark.parametrize("lengths", [(70, 13, 37, 29), (1, 2, 3, 4, 5), (2, 90), (1, 1, 1), (40,)])
def test_the_stream_is_convolved_as_each_row_alone(lengths):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 1, WIDTH), torch.randn(1, sum(lengths), 24, requires_grad=True)
    dy = torch.randn_like(x)
    expected = torch.cat([CausalConvolution.apply(row, weight) for row in x.split(lengths, dim=1)], dim=1)
    found = StreamConvolution.apply(x, weight, segments(lengths).cu_seqlens_R1)
    assert relative(found, expected) < 1e-6
    assert relative(*(torch.autograd.grad(y, x, dy)[0] for y in (found, expected))) < 1e-6


@pytest.mark.parametrize("lengths", [(70, 13, 37, 29), (3, 1, 130)])
def test_a_kernel_over_the_stream_equals_batches_of_rows(monkeypatch, lengths):
    torch.manual_seed(0)
    monkeypatch.setattr(delta_rule, "kernel", stand_in)
    tokens = sum(lengths)
    inputs = [torch.randn(1, tokens, CHANNELS), -torch.rand(1, tokens, VALUE_HEADS), torch.rand(1, tokens, VALUE_HEADS)]
    inputs = [x.requires_grad_() for x in inputs]
    given = (*inputs, torch.randn(CHANNELS, 1, WIDTH), KEY_HEADS, SIZE, segments(lengths))
    found, expected = rule_over_stream(*given), rule_in_batches(*given)
    do = torch.randn_like(found)
    assert relative(found, expected) < 1e-6
    for mine, other in zip(*(torch.autograd.grad(o, inputs, do) for o in (found, expected))):
        assert relative(mine, other) < 1e-5


# Which implementation runs


def installed(monkeypatch, fla, triton):
    versions = {"fla-core": fla, "triton": triton}
    monkeypatch.setattr(delta_rule, "version", versions.__getitem__)
    why_no_kernel.cache_clear()


@pytest.mark.parametrize("fla, triton, generation, reason", [
    ("0.6.0", "3.7.1", 9, ""), ("0.6.0", "3.7.0", 9, "Triton 3.7.0 computes wrong gradients on this card"),
    ("0.6.0", "3.4.0", 9, "Triton 3.4.0 computes"), ("0.6.0", "3.3.1", 9, ""), ("0.6.0", "3.5.0", 12, ""),
    ("0.5.9", "3.7.1", 12, "flash-linear-attention is 0.5.9, at least 0.6.0 is needed"), ("0.7.0", "3.8.0", None, "")])
def test_a_pair_of_card_and_triton_that_computes_wrong_numbers_is_refused(monkeypatch, fla, triton, generation, reason):
    installed(monkeypatch, fla, triton)
    assert why_no_kernel(generation).startswith(reason) and bool(why_no_kernel(generation)) == bool(reason)
    why_no_kernel.cache_clear()


def test_another_function_in_the_kernels_place_is_not_called(monkeypatch):
    import types

    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = lambda *args, **kwargs: pytest.fail("called")
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    with pytest.raises(AssertionError, match="another function took the kernel's place"):
        delta_rule.kernel(*[torch.zeros(1, 4, 1, 1)] * 3, *[torch.zeros(1, 4, 1)] * 2, segments((4,)))


def write_stand_in(directory):
    """A package that looks like flash-linear-attention to whoever imports it, and cannot compute on a CPU."""
    for name, number in (("fla_core", "0.6.0"), ("flash_linear_attention", "0.6.0"), ("triton", "3.7.1")):
        info = directory / f"{name}-{number}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {number}\n")
    broken = textwrap.dedent("""
        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            def kernel(*args, **kwargs):
                raise RuntimeError("a kernel for GPUs was called on a CPU")
            kernel.__module__ = __name__
            return kernel
    """)
    for package in ("fla", "fla/ops", "fla/ops/gated_delta_rule", "fla/modules"):
        (directory / package).mkdir(exist_ok=True)
        (directory / package / "__init__.py").write_text(("__version__ = '0.6.0'\n" if package == "fla" else "") + broken)


@pytest.mark.slow
def test_where_it_is_installed_a_cpu_computes_as_before_and_nothing_of_transformers_is_replaced(
        write_config, read_metrics, run_train, tmp_path):
    model = write_tiny(tmp_path / "moe", num_hidden_layers=4, full_attention_interval=2)
    config = write_config(model__path=str(model), model__base="nf4", train__max_steps=2, eval__max_rows=4)
    expected = run_train(config, run="without")
    write_stand_in(tmp_path / "installed")
    script = tmp_path / "with_it.py"
    script.write_text(textwrap.dedent(f"""
        import json, sys
        sys.path.insert(0, {str(tmp_path / "installed")!r})
        import train
        from model.delta_rule import why_no_kernel
        from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling
        assert not why_no_kernel(None), why_no_kernel(None)
        before = {{name: id(value) for name, value in vars(modeling).items()}}
        sys.argv = ["train.py", "--config", {str(config)!r}, "run=with"]
        train.main()
        from loop.plan import __main__ as plan
        sys.argv = ["plan", "--config", {str(config)!r}, "--split", "none", "--device", "cuda", "--json"]
        plan.main()
        assert {{name: id(value) for name, value in vars(modeling).items()}} == before
    """))
    done = Run(script, directory=tmp_path)
    assert done.wait() == [0], done.said
    assert read_metrics(tmp_path / "checkpoints/with") == expected
    assert json.loads(done.stdout.splitlines()[-1])["ranks"][0]["peak_gib"] > 0


@pytest.mark.slow
def test_the_plan_for_a_gpu_takes_the_kernels_memory(write_config, make_step, tmp_path, monkeypatch):
    """Other memory than the plain rule's, but of the same order; and the plain rule's where the path is off."""
    model = write_tiny(tmp_path / "moe", num_hidden_layers=2, full_attention_interval=2, linear_num_key_heads=4,
                       linear_num_value_heads=8, linear_key_head_dim=64, linear_value_head_dim=64)
    config, step = load_config(write_config(), ["model.base=nf4"]), make_step([(900, 1148)])
    plain = rehearse(config, model, Place(), "cuda", [step])[0]
    installed(monkeypatch, "0.6.0", "3.7.1")
    kernel = rehearse(config, model, Place(), "cuda", [step])[0]
    OFF.add("delta_rule")
    try:
        off = rehearse(config, model, Place(), "cuda", [step])[0]
    finally:
        OFF.clear()
        why_no_kernel.cache_clear()
    assert off.num_bytes == plain.num_bytes != kernel.num_bytes
    assert 0 < kernel.num_bytes < 1.5 * plain.num_bytes < GIB
