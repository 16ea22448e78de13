"""A recomputed layer leaves out what nobody reads: NaN in its place changes no bit of any gradient."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import matmul, stages
from model.build import build
from model.config import LoraConfig
from model.mixers import Segments
from model.moe import experts as experts_module
from model.stages import Stage
from model.tiny.write import write_tiny

CPU, LENGTHS = torch.device("cpu"), (40, 9, 15)
# whole models, and stages that begin or end inside a layer
PLACES = [("llama", 0, None), ("qwen3", 0, None), ("qwen3", 1, 3),
          ("moe", 0, None), ("moe", 0, 3), ("moe", 0, 7), ("moe", 3, 6)]
EXTRA = {"llama": {}, "qwen3": {}, "qwen3_moe": {}, "moe": {"moe_intermediate_size": 64}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write_tiny(root / kind, kind="qwen3_5_moe" if kind == "moe" else kind, num_hidden_layers=4, **extra)
            for kind, extra in EXTRA.items()}


def make(model: Path, first: int = 0, stop: int | None = None, base: str = "int8", recompute: bool = True,
         target: tuple[str, ...] = ("q_proj", "o_proj", "out_proj", "up_proj", "down_proj")) -> Stage:
    kind = model.name
    target = tuple(name for name in target if kind == "moe" or name != "out_proj")
    lora = LoraConfig(4, 8, target[:2] if kind == "qwen3_moe" else target, experts=kind.endswith("moe"))
    stage = build(model, base, lora, seed=0, device=CPU, recompute=recompute, first=first, stop=stop)
    for number, parameter in enumerate(stage.adapters().values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return stage


def step(stage: Stage) -> list[Tensor]:
    """The output, and the gradients of the adapters and, where the stage does not embed, of its input."""
    torch.manual_seed(5)
    num_tokens, width = sum(LENGTHS), stage.model.config.hidden_size
    ids, states = torch.randint(200, (1, num_tokens)), torch.randn(1, num_tokens, width).bfloat16()
    x = ids if stage.is_first else states.requires_grad_()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    y = stage(x, torch.cat([torch.arange(n) for n in LENGTHS]), Segments(bounds, LENGTHS))
    inputs = [*stage.adapters().values(), *([] if stage.is_first else [x])]
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.randn_like(y))]


def put_nan(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Fills what is not computed with NaN; returns a list that will hold its shapes."""
    shapes: list[tuple[int, ...]] = []

    def not_computed(like: Tensor, *shape: int) -> Tensor:
        shapes.append(shape)
        return like.new_full((), torch.nan).expand(shape)

    for module in (matmul, experts_module):
        monkeypatch.setattr(module, "not_computed", not_computed)
    return shapes


@pytest.mark.parametrize("kind, first, stop", PLACES)
def test_gradients_are_those_of_a_full_recomputation(
        models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, first: int, stop: int | None) -> None:
    stage = make(models[kind], first, stop)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "unread", nullcontext)
        expected = step(stage)
    shapes = put_nan(monkeypatch)
    for found, truth in zip(step(stage), expected, strict=True):
        assert torch.equal(found, truth) and not truth.isnan().any()
    assert shapes == [(sum(LENGTHS), stage.model.config.hidden_size)] * len(stage.recomputed)


def test_an_output_that_is_kept_must_not_be_left_out(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the shared expert is a factor of a product. This is what the test above would show."""
    stage = make(models["moe"])
    put_nan(monkeypatch)
    monkeypatch.setattr(stages, "last_summand", lambda layer, feed_forward: layer.mlp.shared_expert.down_proj.base)
    assert any(gradient.isnan().any() for gradient in step(stage)[1:])


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    calls: list[None] = []
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **named: (calls.append(None), original(*args, **named))[1])
    return calls


def test_how_often_weights_are_dequantized_and_experts_run(
        models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, recomputed and backward pass dequantize each linear; the last one of a layer is not recomputed."""
    stage = make(models["qwen3"])
    mlp = stage.model.model.layers[1].mlp
    down, up = (counted(monkeypatch, linear.base, "dequantize") for linear in (mlp.down_proj, mlp.up_proj))
    step(stage)
    assert (len(down), len(up)) == (2, 3)

    stage = make(models["moe"])
    experts = stage.model.model.layers[1].mlp.experts.base
    experts.tokens_E = torch.zeros(experts.num_experts, dtype=torch.int64)
    spans, products = (counted(monkeypatch, *of) for of in (
        (experts.down_proj, "dequantize"), (experts_module.Projection, "forward")))
    step(stage)
    skipping = len(spans), len(products)
    assert experts.tokens_E.sum() == sum(LENGTHS) * stage.model.config.num_experts_per_tok, "counted once"
    spans.clear(), products.clear()
    monkeypatch.setattr(stages, "unread", nullcontext)
    step(stage)
    assert (len(spans), len(products)) == (skipping[0] * 3 // 2, skipping[1] * 3 // 2), "three runs of the experts, not two"
