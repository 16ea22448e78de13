"""A fast path that computes wrong numbers is found, switched off and named; one that is right is taken."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from transformers import Qwen3_5MoeTextConfig, Qwen3Config

from loop import paths
from loop.config import load_config
from loop.distributed.groups import Ranks
from loop.paths import PATHS, Sizes, compare, prove, taken
from model import mixers, quant
from model.build import text_config
from model.devices import OFF, planning_for

CPU = torch.device("cpu")
MOE = Sizes.of(Qwen3_5MoeTextConfig(), 0).small()


@pytest.fixture(autouse=True)
def all_on():
    yield
    OFF.clear()


def scaled(function, factor):
    return lambda *arguments, **named: function(*arguments, **named) * factor


def zeros(function):
    return lambda *arguments, **named: torch.zeros_like(function(*arguments, **named))


def raises(function):
    def broken(*arguments, **named):
        raise RuntimeError("no kernel image is available for execution on the device")
    return broken


BREAK = {"raises": raises, "zeros": zeros, "off by 1 %": partial(scaled, factor=1.01), "right": partial(scaled, factor=1.0)}
EXPECTED = {"raises": "it raised RuntimeError: no kernel image", "zeros": "differ by 100.00%",
            "off by 1 %": "(differ by|are off by)", "right": "^$"}


@pytest.mark.parametrize("how", BREAK)
@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantization_that_computes_wrong_numbers_is_found(monkeypatch, how, base, dtype):
    if base == "nf4":
        monkeypatch.setattr(bnb, "dequantize_4bit", BREAK[how](bnb.dequantize_4bit))
    else:
        mul = torch.mul
        broken = BREAK[how](mul)
        monkeypatch.setattr(quant.torch, "mul", lambda *a, **k: broken(*a, **k) if "out" in k else mul(*a, **k))
    found = compare(base, MOE, dtype, CPU)
    assert bool(found["problem"]) == (how != "right"), found
    assert re.search(EXPECTED[how], found["problem"])


@pytest.mark.parametrize("how", BREAK)
def test_an_attention_that_computes_wrong_numbers_is_found(monkeypatch, how):
    """On a CPU that plays a GPU: the kernel for the whole stream is the reference, broken or not."""
    def stream(q, k, v, scaling, segments):
        return mixers.plain_attention(q, k, v, scaling, segments.lengths)

    monkeypatch.setattr(mixers, "varlen_attention", BREAK[how](stream))
    with planning_for("cuda"):
        found = compare("attention", MOE, torch.bfloat16, CPU)
    assert bool(found["problem"]) == (how != "right"), found


@pytest.mark.parametrize("name", ["cpu_attention", "int8", "nf4", "adamw8bit"])
@pytest.mark.parametrize("model", [Qwen3_5MoeTextConfig(), Qwen3Config()], ids=["35b", "4b"])
def test_the_paths_of_a_cpu_are_right(name, model):
    found = compare(name, Sizes.of(model, 0).small(), torch.bfloat16, CPU)
    assert not found["problem"] and found["error"] < PATHS[name].limit and abs(found["bias"]) < 1e-3


def config_of(write_config, *overrides):
    return load_config(write_config(), ["model.base=nf4", "train.optimizer=adamw8bit", *overrides])


def test_a_path_that_fails_is_off_for_the_run_and_named(write_config, tmp_path, tiny_llama, monkeypatch):
    config, said = config_of(write_config), []
    config.run_dir.mkdir(parents=True)
    assert taken(config, text_config(tiny_llama), CPU) == ["nf4", "adamw8bit"]
    prove(config, tiny_llama, Ranks(), said.append)
    assert not OFF and not said
    monkeypatch.setattr(bnb, "dequantize_4bit", scaled(bnb.dequantize_4bit, 1.01))
    prove(config, tiny_llama, Ranks(), said.append)
    assert OFF == {"nf4"}
    assert said[0].startswith("fast path nf4 is off for this run: its results ") and "by a table in plain torch" in said[0]
    report = json.loads((config.run_dir / "paths.json").read_text())
    assert report["paths"]["nf4"]["problem"] and not report["paths"]["adamw8bit"]["problem"]
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or report["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="train.fast_paths is require, but nf4: its results"):
        prove(config_of(write_config, "train.fast_paths=require"), tiny_llama, Ranks(), said.append)
    prove(config_of(write_config, "train.fast_paths=off"), tiny_llama, Ranks(), said.append)
    assert OFF == {"nf4", "adamw8bit"}
    assert said[-1] == "fast paths are off (train.fast_paths): nf4, adamw8bit"


def test_a_kernel_that_ends_the_gpus_context_ends_the_run_with_a_word(monkeypatch):
    def broken(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nand much more")

    monkeypatch.setattr(bnb, "dequantize_4bit", broken)
    with pytest.raises(ValueError, match="fast path nf4 ended with CUDA error: an illegal memory access was encountered: start "
                                         "again with train.fast_paths=off"):
        compare("nf4", MOE, torch.bfloat16, CPU)


def test_a_kernel_that_is_not_fit_for_the_card_is_off_in_plans_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(paths.delta_rule, "why_no_kernel", lambda generation: f"not on generation {generation}")
    assert paths.switch_off_unfit(Qwen3Config(), torch.device("cuda")) == "" and not OFF
    assert paths.switch_off_unfit(Qwen3_5MoeTextConfig(), torch.device("cuda")) == "not on generation 9"
    assert OFF == {"delta_rule"}


def test_a_path_that_fails_on_one_rank_is_off_on_all(write_config, tiny_llama, monkeypatch):
    config, said = config_of(write_config), []
    config.run_dir.mkdir(parents=True)
    ranks = Ranks()
    on_the_other = torch.tensor([float(name == "nf4") for name in PATHS])
    monkeypatch.setattr(ranks, "all_reduce", lambda tensor: tensor + on_the_other)
    prove(config, tiny_llama, ranks, said.append)
    assert OFF == {"nf4"} and "it failed on another rank" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_run_without_fast_paths_trains_the_same(write_config, run_train, monkeypatch, base):
    """Bit-equal weights: int8 and nf4 have the same values by both ways, so that only the optimizer could differ. Attention
    rounds otherwise, and is the reference here."""
    monkeypatch.setattr(mixers.CpuAttention, "apply", mixers.plain_attention)
    config = write_config(model__base=base, train__max_steps=3)
    fast = run_train(config, run="fast")
    plain = run_train(config, "train.fast_paths=off", run="plain")
    for mine, other in zip(plain, fast, strict=True):
        assert mine.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)


def test_every_path_has_a_place_where_it_is_switched_off():
    """A path that nothing asks for would be reported as switched off, and run on."""
    root = Path(paths.__file__).parents[1]
    sources = "".join(path.read_text() for folder in ("model", "loop") for path in (root / folder).glob("**/*.py")
                      if path.name != "paths.py")
    for name in PATHS:
        assert f'"{name}" in OFF' in sources or f'"{name}" not in OFF' in sources or (
            name == "adamw8bit" and "name not in OFF" in sources), name
