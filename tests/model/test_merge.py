"""A merged model is what training computed: equal to peft and to the trainer in every layout, all else the base's bytes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import model.merge
from model.build import build
from model.config import LoraConfig
from model.lora import to_peft_name
from model.merge import AdapterFile, merge, merged_bytes
from model.mixers import Segments
from model.moe.expert_weights import ExpertMatrices, PlainMatrices
from model.quant import FrozenLinear, PlainLinear
from model.stages import Stage
from model.tiny.write import write_tiny
from model.weights.checkpoint_files import Checkpoint
from model.weights.header import CheckpointError
from model.weights.shards import stream

CPU = torch.device("cpu")
DENSE = ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # v_proj is quantized, but has no adapter
LINEAR_ATTENTION = ("in_proj_qkv", "in_proj_z", "out_proj")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama", "num_hidden_layers": 2},
    "qwen3": {"kind": "qwen3", "num_hidden_layers": 2},
    "fused": {"num_hidden_layers": 4, "moe_intermediate_size": 64},
    "per-expert": {"layout": "per-expert", "num_hidden_layers": 4, "moe_intermediate_size": 64},
    "fp8": {"layout": "fp8", "num_hidden_layers": 4, "moe_intermediate_size": 64},
}
MOE = ("fused", "per-expert", "fp8")
CASES = [("llama", False), ("qwen3", False), *((layout, experts) for layout in MOE for experts in (False, True))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_tiny(root / name, **shape) for name, shape in SHAPES.items()}


def settings(base: str, experts: bool = False) -> LoraConfig:
    return LoraConfig(rank=4, alpha=8, target=DENSE + (LINEAR_ATTENTION if base in MOE else ()), experts=experts)


def train(model_dir: Path, lora: LoraConfig, stored: str = "float32") -> Stage:
    """The trainer's model, with adapters as after some training."""
    stage = build(model_dir, stored, lora, seed=0, device=CPU, recompute=False)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(stage.adapters().items())):
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    return stage.eval()


def adapter_of(stage: Stage) -> dict[str, Tensor]:
    return {to_peft_name(name): parameter.detach().clone() for name, parameter in stage.adapters().items()}


def merged(model_dir: Path, out: Path, stage: Stage, lora: LoraConfig, as_trained: str | None = None,
           dtype: torch.dtype = torch.float32) -> Path:
    out.mkdir()
    merge(model_dir, out, adapter_of(stage), lora, as_trained=as_trained, dtype=dtype)
    return out


def load(directory: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, experts_implementation="eager", trust_remote_code=False).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids_T = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
    if isinstance(model, Stage):
        h_1TD = model(ids_T[None], torch.arange(40), Segments(torch.tensor([0, 40]).int(), (40,)))
        return model.model.lm_head(model.model.model.norm(h_1TD))[0]
    return model(ids_T[None]).logits[0]


def difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# What is computed


@pytest.mark.parametrize("base, experts", CASES)
def test_logits_are_those_of_the_trainer(bases: dict[str, Path], tmp_path: Path, base: str, experts: bool) -> None:
    lora = settings(base, experts)
    stage = train(bases[base], lora)
    found = logits(load(merged(bases[base], tmp_path / "out", stage, lora)))
    assert difference(found, logits(stage)) < 1e-5
    assert difference(found, logits(load(bases[base], torch.bfloat16).float())) > 0.01


@pytest.mark.parametrize("base, experts", CASES)
def test_weights_and_logits_are_those_of_peft(bases: dict[str, Path], tmp_path: Path, base: str, experts: bool) -> None:
    lora = settings(base, experts)
    stage = train(bases[base], lora)
    # FP8 is read as bf16, here as in training
    theirs = peft.get_peft_model(load(bases[base], torch.bfloat16).float(), peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target),
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None))
    adapter = adapter_of(stage)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(adapter.pop(name.replace(".default", "")))
    assert adapter == {}
    model = load(merged(bases[base], tmp_path / "out", stage, lora))
    assert difference(logits(model), logits(theirs)) < 1e-5
    for name, parameter in theirs.merge_and_unload().named_parameters():
        assert (model.get_parameter(name) - parameter).abs().max() < 1e-6, name


@pytest.mark.parametrize("stored", ["int8", "nf4"])
@pytest.mark.parametrize("base", ["llama", *MOE])
def test_as_trained_is_what_the_quantized_base_dequantizes_to(
        bases: dict[str, Path], tmp_path: Path, base: str, stored: str) -> None:
    lora = settings(base, experts=base in MOE)
    held = train(bases[base], lora, stored)
    stage = train(bases[base], lora)  # computes in float32
    out = merged(bases[base], tmp_path / "out", held, lora, stored)
    original = logits(stage)
    with torch.no_grad():
        for mine, quantized in zip(stage.model.modules(), held.model.modules()):
            if isinstance(mine, PlainLinear) and isinstance(quantized, FrozenLinear):
                mine.weight.copy_(quantized.dequantize())
            if isinstance(mine, PlainMatrices) and isinstance(quantized, ExpertMatrices):
                mine.weight_EOI.copy_(quantized.dequantize(0, mine.shape_EOI[0]))
    found = logits(load(out))
    assert difference(found, logits(stage)) < 1e-5
    assert difference(found, original) > 1e-3


@pytest.mark.parametrize("stored", ["int8", "nf4"])
@pytest.mark.parametrize("base", ["llama", *MOE])
def test_as_trained_with_an_adapter_of_zeros_has_the_bits_that_training_holds(
        bases: dict[str, Path], tmp_path: Path, base: str, stored: str) -> None:
    lora = settings(base, experts=base in MOE)
    held = build(bases[base], stored, lora, seed=0, device=CPU, recompute=False)
    model = load(merged(bases[base], tmp_path / "out", held, lora, stored, torch.bfloat16), torch.bfloat16)
    num_equal = 0
    for name, module in held.model.named_modules():
        name = name.replace(".base", "")
        if isinstance(module, FrozenLinear):
            assert torch.equal(model.get_parameter(f"{name}.weight"), module.dequantize()), name
        elif isinstance(module, ExpertMatrices):
            assert torch.equal(model.get_parameter(name), module.dequantize(0, module.shape_EOI[0])), name
        num_equal += isinstance(module, (FrozenLinear, ExpertMatrices))
    assert num_equal == (2 * 7 if base == "llama" else 3 * 3 + 4 + 4 * 3 + 4 * 2)


def test_each_weight_is_rounded_once(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = settings("llama")
    stage = train(bases["llama"], lora)
    exact = load_file(merged(bases["llama"], tmp_path / "exact", stage, lora) / "model.safetensors")
    rounded = load_file(merged(bases["llama"], tmp_path / "rounded", stage, lora, None, torch.bfloat16) / "model.safetensors")
    for name, tensor in exact.items():
        assert rounded[name].dtype == torch.bfloat16 and torch.equal(rounded[name], tensor.bfloat16()), name
        assert (tensor.dtype == torch.float32) == any(f"{target}.weight" in name for target in DENSE)


@pytest.mark.parametrize("as_trained", [None, "nf4"])
@pytest.mark.parametrize("base", ["llama", "fp8"])
def test_neither_slices_nor_threads_change_a_weight(
        bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, as_trained: str | None) -> None:
    lora = settings(base, experts=base in MOE)
    stage = train(bases[base], lora)
    whole = load_file(merged(bases[base], tmp_path / "whole", stage, lora, as_trained) / "model.safetensors")
    monkeypatch.setattr(model.merge, "stream", partial(stream, slice_bytes=5000))
    torch.set_num_threads(3)
    try:
        sliced = load_file(merged(bases[base], tmp_path / "sliced", stage, lora, as_trained) / "model.safetensors")
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(1)
    assert whole.keys() == sliced.keys()
    for name, tensor in whole.items():
        assert (tensor.float() - sliced[name].float()).abs().max() < 1e-6, name


def test_two_experts_that_changed_places_are_noticed(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = settings("fused", experts=True)
    out = merged(bases["fused"], tmp_path / "out", train(bases["fused"], lora), lora)
    right, tensors = logits(load(out)), load_file(out / "model.safetensors")
    down = tensors["model.language_model.layers.1.mlp.experts.down_proj"]
    down[[0, 1]] = down[[1, 0]]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert difference(logits(load(out)), right) > 1e-3


# What is written


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("base", ["llama", *MOE])
def test_everything_else_is_the_base_byte_for_byte(
        bases: dict[str, Path], tmp_path: Path, base: str, experts: bool) -> None:
    lora = settings(base, experts and base in MOE)
    stage = train(bases[base], lora)
    out = merged(bases[base], tmp_path / "out", stage, lora, None, torch.bfloat16)
    before, after = Checkpoint(bases[base], whole=True), Checkpoint(out, whole=True)
    assert [info.name for info in before.tensors.values()] == [info.name for info in after.tensors.values()]
    assert not after.scales and "quantization_config" not in json.loads((out / "config.json").read_text())
    num_same = 0
    for name, info in before.tensors.items():
        found = after.tensors[name]
        assert found.shape == info.shape
        is_adapted = (to_peft_name(f"{name.removesuffix('.weight')}.lora_A") in adapter_of(stage)
                      or ".mlp.experts." in name and lora.experts)
        if info.dtype == "F8_E4M3":
            same = torch.equal(after.read_rows(name, 0, info.shape[0]), before.read_rows(name, 0, info.shape[0]))
        else:
            assert found.dtype == info.dtype
            num_bytes = info.end - info.start
            same = after.read_bytes(found, 0, num_bytes) == before.read_bytes(info, 0, num_bytes)
        assert same != is_adapted, name
        num_same += same
    kept = [name for name in after.tensors if name.startswith(("mtp.", "model.visual."))]
    assert len(kept) == (8 if base in MOE else 0) and num_same > 5


def test_shards_hold_at_most_so_many_bytes(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = settings("per-expert")
    stage = train(bases["per-expert"], lora)
    whole = merged(bases["per-expert"], tmp_path / "whole", stage, lora)
    assert [file.name for file in whole.glob("*.safetensors*")] == ["model.safetensors"]
    monkeypatch.setattr(model.merge, "SHARD_BYTES", 200_000)
    out = merged(bases["per-expert"], tmp_path / "out", stage, lora)
    files = sorted(out.glob("*.safetensors"))
    count = len(files)
    assert count > 3 and [file.name for file in files] == [
        f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = [load_file(file) for file in files]
    assert all(sum(t.nbytes for t in shard.values()) <= 200_000 for shard in tensors)
    assert index["weight_map"] == {name: file.name for file, shard in zip(files, tensors) for name in shard}
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in tensors for t in shard.values())
    assert index["metadata"]["total_size"] <= merged_bytes(bases["per-expert"], torch.float32)
    assert torch.equal(logits(load(out)), logits(load(whole)))


def test_settings_are_copied_but_no_code_and_no_template(bases: dict[str, Path], tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", kind="llama", num_hidden_layers=2)
    for name in ("modeling.py", "pytorch_model.bin", "chat_template.jinja", "chat_template.json", "LICENSE", "merges.txt"):
        (base / name).write_text("{}")
    (base / "preprocessor_config.json").symlink_to(base / "generation_config.json")  # as in the cache of the hub
    lora = settings("llama")
    out = merged(base, tmp_path / "out", train(base, lora), lora)
    assert sorted(file.name for file in out.iterdir()) == [
        "LICENSE", "config.json", "generation_config.json", "merges.txt", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json"]
    assert (out / "preprocessor_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert not (out / "preprocessor_config.json").is_symlink()
    before, after = (json.loads((directory / "config.json").read_text()) for directory in (base, out))
    assert after == {**before, "dtype": "float32"} and before["dtype"] == "bfloat16"
    assert load(out, "auto").dtype == torch.float32


def test_an_adapter_is_read_from_its_file_as_from_memory(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = settings("fused", experts=True)
    stage = train(bases["fused"], lora)
    save_file(adapter_of(stage), tmp_path / "adapter.safetensors")
    (tmp_path / "file").mkdir()
    done: list[tuple[int, int]] = []
    merge(bases["fused"], tmp_path / "file", AdapterFile(tmp_path / "adapter.safetensors"), lora, as_trained=None,
          dtype=torch.bfloat16, progress=lambda num_bytes, total: done.append((num_bytes, total)))
    memory = merged(bases["fused"], tmp_path / "memory", stage, lora, None, torch.bfloat16)
    assert (tmp_path / "file/model.safetensors").read_bytes() == (memory / "model.safetensors").read_bytes()
    assert sum(num_bytes for num_bytes, _ in done) == done[0][1] == merged_bytes(bases["fused"], torch.bfloat16)


# What fails


def test_a_damaged_base_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = settings("fused")
    stage = train(bases["fused"], lora)
    base = write_tiny(tmp_path / "base", **SHAPES["fused"])
    shard = sorted(base.glob("*.safetensors"))[1]
    with open(shard, "r+b") as opened:
        opened.truncate(shard.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=f"{shard.name}: .* the file was cut short"):
        merged(base, tmp_path / "cut", stage, lora)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"1 are missing: '{shard.name}'"):
        merged(base, tmp_path / "missing", stage, lora)


def test_every_tensor_of_the_adapter_needs_its_place(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = settings("per-expert", experts=True)
    adapter = adapter_of(train(bases["per-expert"], lora))
    down = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    other = "base_model.model.model.language_model.layers.0.mlp.experts.lora_A.weight"
    changes: list[tuple[dict[str, Tensor], str]] = [
        ({name: tensor for name, tensor in adapter.items() if name != down},
         rf"1 tensors: {down} is missing, expected \(\d+, 64\)"),
        ({**adapter, other: adapter[down]}, rf"{other} is \(\d+, 64\), expected no such tensor"),
        ({**adapter, down: adapter[down][:, :-1]}, rf"{down} is \(\d+, 63\), expected \(\d+, 64\)"),
    ]
    for changed, message in changes:
        with pytest.raises(ValueError, match=message):
            merge(bases["per-expert"], tmp_path, changed, lora, as_trained=None, dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = settings("llama")
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=f"{tmp_path}: could not be written .*No space left"):
        merge(bases["llama"], tmp_path, adapter_of(train(bases["llama"], lora)), lora, as_trained=None, dtype=torch.bfloat16)
