"""What the planner's shortcuts leave out changes nothing, and what it foresees is what a real step takes."""

import gc
from dataclasses import replace

import pytest
import torch

from loop.config import load_config
from loop.distributed.groups import Place
from loop.memory.peak import by_kind
from loop.plan.rehearsal import rehearse
from model.tiny.write import write_tiny

LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": write_tiny(root / "qwen3", kind="qwen3", scale=1 / 32, num_hidden_layers=LAYERS),
        "moe": write_tiny(root / "moe", scale=1 / 32, num_hidden_layers=LAYERS, full_attention_interval=2),
    }


@pytest.fixture
def config(write_config):
    def make(*overrides):
        return load_config(write_config(), ["model.base=nf4", "lora.target=q_proj,o_proj,down_proj", *overrides])
    return make


WHOLE, FIRST, CUT = Place(), Place(0, 2, 2, (LAYERS,)), Place(1, 2, 2, (LAYERS - 1,))  # CUT: through a layer


@pytest.mark.slow
@pytest.mark.parametrize("kind, place, num_microbatches, settings", [
    ("qwen3", WHOLE, 1, []),
    ("qwen3", FIRST, 4, []),
    ("qwen3", CUT, 4, ["pipeline.schedule=1f1b", "train.keep_layers=1"]),
    ("qwen3", WHOLE, 4, ["train.recompute=false"]),
    ("qwen3", FIRST, 4, ["train.recompute=false"]),
    ("moe", WHOLE, 4, []),
    ("moe", CUT, 4, ["pipeline.schedule=1f1b"]),
    ("moe", FIRST, 3, ["train.recompute=false"]),
], ids=str)
def test_one_layer_of_each_kind_shows_what_all_take(make_step, models, config, kind, place, num_microbatches, settings):
    step = replace(make_step([(64, 64), (128,), (40, 40, 48), (128,)][:num_microbatches]), step=2)  # 1 has no optimizer states
    plain, short = (
        rehearse(config(*settings), models[kind], place, "cuda", [step], all_layers=whole)[0] for whole in (True, False))
    assert short.num_bytes == pytest.approx(plain.num_bytes, rel=0.005)
    kinds = [{kind["name"]: kind["num_bytes"] for kind in by_kind(peak.largest)} for peak in (plain, short)]
    assert kinds[1] == pytest.approx(kinds[0], rel=0.005), "and what for"
    lines = [[(line.num_bytes, line.count, line.module, line.line) for line in peak.largest if line.category == "activations"
              and line.module != "model.layers.*"] for peak in (plain, short)]
    assert lines[1] == lines[0], "and on which lines; outputs of layers and gradients stand elsewhere"


@pytest.mark.parametrize("base, optimizer", [("nf4", "adamw8bit"), ("int8", "adamw"), ("float32", "adamw8bit")])
def test_nothing_without_values_is_left_behind(make_step, models, config, base, optimizer):
    def without_values():
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if type(thing).__name__ == "FakeTensor"}

    before = without_values()  # what another test compiled keeps some
    rehearse(config(f"model.base={base}", f"train.optimizer={optimizer}"), models["moe"], Place(), "cpu", [make_step([(30,)])])
    assert without_values() <= before
    assert torch.ones(1).item() == 1
