"""Counted work against independent formulas, against torch's profiler, and without values against with values."""

from collections import Counter as Tally

import pytest
import torch
from torch import library
from torch.profiler import ProfilerActivity, profile

from loop.config import load_config
from loop.memory.counter import Counter, note
from loop.pipeline.split import RowLengths, sublayer_costs
from loop.plan.pieces import Layer, Pieces
from model.build import build, skeleton, text_config
from model.mixers import Segments
from model.ops import work
from model.ops.work import Work, declare
from model.tiny.write import write_tiny

LENGTHS, SUPERVISED, RANK = (50, 30, 48), 64, 4
TOKENS = sum(LENGTHS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"llama": write_tiny(root / "llama", kind="llama", num_hidden_layers=3, hidden_size=64, intermediate_size=160),
            "moe": write_tiny(root / "moe", num_hidden_layers=2, full_attention_interval=2, hidden_size=128, num_experts=4,
                              num_experts_per_tok=2)}


@pytest.fixture
def make_pieces(models, write_config):
    def make(kind, *settings, device="cpu", card=None, lengths=LENGTHS):
        targets = "q_proj,v_proj,out_proj,down_proj" if kind == "moe" else "q_proj,k_proj,v_proj,o_proj,gate_proj,down_proj"
        config = load_config(write_config(), ["model.base=float32", f"lora.rank={RANK}", f"lora.target={targets}", *settings])
        return Pieces(config, models[kind], device, card, lengths, SUPERVISED)
    return make


def total(operations, purpose=None):
    chosen = [operation.work for operation in operations if purpose in (None, operation.purpose)]
    return Work(*map(sum, zip(*chosen, strict=True))) if chosen else Work(0, 0, 0)


def real_step(pieces, context):
    """The layers and the loss of a model with values, forward and backward, inside a context."""
    stage = build(pieces.model, pieces.config.model.base, pieces.config.lora, seed=0, device=CPU,
                  recompute=pieces.config.train.recompute)
    segments = Segments(torch.tensor([0, *LENGTHS]).cumsum(0).int(), LENGTHS)
    for parameter in stage.adapters().values():
        parameter.grad = torch.zeros_like(parameter)
    ids_1T, predict_N = torch.arange(TOKENS)[None], torch.arange(SUPERVISED)
    with context as running:
        x_1TD = stage(ids_1T, ids_1T[0], segments)
        (stage.losses(x_1TD, predict_N, predict_N).sum() / 2).backward()
    return stage.model, running


def counted(pieces, num_layers):
    layers = [layer for layer in pieces.layers(0, 2 * num_layers, 0)]
    return [*pieces.embedding(), *(operation for layer in layers for operation in pieces.layer(layer)), *pieces.loss()]


@pytest.mark.parametrize("recompute", [False, True])
def test_matmuls_are_those_of_the_formula_and_of_the_cuts_costs(make_pieces, recompute):
    pieces = make_pieces("llama", f"train.recompute={recompute}")
    operations = pieces.layer(Layer(2, recompute))
    shape = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 160), "up": (64, 160), "down": (160, 64)}
    sizes = {name: pieces_linear(pieces, name) for name in shape}
    base = (2 + 2 + 2 * recompute) * TOKENS * sum(i * o for i, o in sizes.values())
    lora = (2 + 4 + 2 * recompute) * TOKENS * RANK * sum(i + o for name, (i, o) in sizes.items() if name != "up")
    costs = sublayer_costs(pieces.model, pieces.config, RowLengths(TOKENS, TOKENS, 0, 0.5))
    # the layer's last product is not computed again; of its adapter's only the part that is saved is
    num_in, num_out = sizes["down"]
    base, lora = base - 2 * recompute * TOKENS * num_in * num_out, lora - 2 * recompute * TOKENS * RANK * num_out
    assert total(operations, "base matmul").flops == base
    assert total(operations, "LoRA").flops == lora
    assert sum(cost.flops for cost in costs[4:6]) * TOKENS - head(pieces) == base + lora, "the formula is that of the cuts"
    assert total(pieces.loss(), "loss").flops == head(pieces)


def pieces_linear(pieces, name):
    module = dict(skeleton(pieces.model, "float32").model.layers[2].named_modules())
    linear = module[("mlp." if name in ("gate", "up", "down") else "self_attn.") + f"{name}_proj"]
    return linear.in_features, linear.out_features


def head(pieces):
    return 2 * 2 * SUPERVISED * 64 * text_config(pieces.model).vocab_size


def test_attention_is_causal_in_each_row(make_pieces):
    shape = real_step(make_pieces("llama"), Counter())[0].config
    pairs = sum(length * (length + 1) / 2 for length in LENGTHS)
    once = 2 * pairs * shape.hidden_size
    for device, card in (("cpu", None), ("cuda", 12)):
        pieces = make_pieces("llama", "model.base=bf16", device=device, card=card)
        attention = [operation for operation in pieces.layer(Layer(2, False)) if operation.purpose == "attention"]
        assert total(attention).flops == 7 * once  # 2 matmuls forward, 5 backward
        calls = [operation for operation in attention if operation.work.flops]
        assert len(calls) == (2 if card else 2 * len(LENGTHS)), "one call for all rows on a card, one for each on a CPU"


@pytest.mark.parametrize("kind, settings", [
    ("llama", []), ("llama", ["train.recompute=true", "model.base=bf16"]), ("moe", ["model.base=nf4", "train.recompute=true"]),
])
def test_without_values_as_much_is_counted_as_with(make_pieces, kind, settings, monkeypatch):
    """But for the routing, which is even without values: with values it is made so."""
    from model.moe import routing

    pieces = make_pieces(kind, *settings)
    monkeypatch.setattr(routing, "ASSUMED", [routing.uniform_bounds])
    model, counter = real_step(pieces, Counter([RANK], LENGTHS))
    planned = counted(pieces, model.config.num_hidden_layers)
    real = [operation for operation in counter.operations]
    for purpose in {operation.purpose for operation in planned}:
        mine, theirs = total(planned, purpose), total(real, purpose)
        assert mine.flops == pytest.approx(theirs.flops, rel=1e-6), purpose
        assert mine.num_bytes == pytest.approx(theirs.num_bytes, rel=0.01), purpose
        assert mine.launches == pytest.approx(theirs.launches, rel=0.01, abs=2), purpose


@pytest.mark.parametrize("recompute", [False, True])
def test_launches_are_those_that_the_profiler_sees(make_pieces, recompute):
    pieces = make_pieces("llama", f"train.recompute={recompute}")
    model, profiler = real_step(pieces, profile(activities=[ProfilerActivity.CPU]))
    # sums of gradients are in place where no mode looks on; as many bytes
    seen = Tally(in_place(event.name) for event in profiler.events())
    planned = Tally(in_place(operation.name) for operation in counted(pieces, model.config.num_hidden_layers))
    assert not {name: (number, seen[name]) for name, number in planned.items() if number > seen[name]}, "counted and not run"
    for name in ("mm", "addmm_", "add_", "silu", "silu_backward", "linalg_vector_norm", "rsqrt_", "addcmul_", "embedding",
                 "exp_", "neg", "cat", "_scaled_dot_product_flash_attention_for_cpu",
                 "_scaled_dot_product_flash_attention_for_cpu_backward"):
        assert planned[f"aten::{name}"] == seen[f"aten::{name}"] > 0, name


def in_place(name):
    return {"aten::add": "aten::add_", "aten::index_put": "aten::_index_put_impl_"}.get(name, name)


def test_views_move_nothing_and_what_is_broadcast_is_read_once():
    x, row = torch.ones(8, 16), torch.ones(16)
    with Counter() as counter:
        x.view(16, 8).t()[3:].unsqueeze(0).expand(4, 5, 16)
        torch.empty(5)
    assert not counter.operations
    cases = {  # bytes of float32, read and written
        lambda: x + row.expand(8, 16): 128 + 16 + 128, lambda: x.mul_(2): 2 * 128, lambda: x.copy_(row): 16 + 128,
        lambda: x.fill_(1): 128, lambda: x[torch.tensor([1, 2])]: 2 * 32 + 4, lambda: torch.add(x, x, out=x): 3 * 128,
        lambda: x.index_add_(0, torch.tensor([0, 0]), torch.ones(2, 16)): None}
    for function, expected in cases.items():
        with Counter() as counter:
            function()
        moved = counter.operations[-1].work.num_bytes
        assert moved == (3 * 32 * 4 if expected is None else 4 * expected)


def test_an_operator_declares_its_work_and_its_purpose():
    with library._scoped_library("coach_test", "FRAGMENT") as operators:
        operators.define("twice(Tensor x) -> Tensor")
        operators.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        x = torch.ones(10)
        for declared, expected in ((None, Work(0, 80, 1)), (lambda arguments, results: Work(5, 7, 3), Work(5, 7, 3))):
            declare("coach_test::twice", "elementwise", declared)
            try:
                with Counter() as counter:
                    torch.ops.coach_test.twice(x)
                    note("delta rule", "a kernel", torch.bfloat16, Work(1, 2, 3))
            finally:
                del work.DECLARED["coach_test::twice"]
            first, second = counter.operations
            assert (first.purpose, first.work) == ("elementwise", expected)
            assert (second.purpose, second.work) == ("delta rule", Work(1, 2, 3))
