"""Another model under the same name is noticed: one flipped bit by its tensor's checksum, other settings by the short hash."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.build import build_empty
from model.config import LoraConfig
from model.tiny.write import write_tiny
from model.weights.identity import Checksums, quick_identity
from model.weights.shards import Checkpoint, CheckpointError, TensorInfo, Weight, stream

SMALL = {"num_hidden_layers": 4, "vocab_size": 512}
LAYOUTS = ("fused", "per-expert", "fp8", "tied")
PLACES = {  # a tensor of each kind, as the built model names it
    "fused": ["model.embed_tokens.weight", "lm_head.weight", "model.layers.3.self_attn.o_proj.weight",
              "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.experts.gate_up_proj",
              "model.layers.2.mlp.experts.down_proj", "model.layers.0.linear_attn.A_log"],
    "per-expert": ["model.layers.2.mlp.experts.31.up_proj.weight", "model.layers.0.mlp.experts.7.down_proj.weight"],
    "fp8": ["model.layers.2.mlp.experts.31.up_proj.weight", "model.layers.2.mlp.experts.31.up_proj.weight_scale_inv",
            "model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight_scale_inv"],
    "tied": ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    models = {layout: write_tiny(root / layout, layout=layout, scale=1 / 8, **SMALL) for layout in LAYOUTS[:3]}
    return models | {"tied": write_tiny(root / "tied", kind="llama", **SMALL)}


def load(model_dir: Path, bounds: tuple[int, ...] = (0, 8)) -> dict[str, int]:
    """What loading reports, over all stages."""
    checksums: dict[str, int] = {}
    for first, stop in zip(bounds, bounds[1:]):
        _, weights = build_empty(model_dir, "bf16", LoraConfig(2, 4, ("o_proj",)), seed=0, device=torch.device("cpu"),
                                 recompute=False, first=first, stop=stop)
        for name, checksum in weights.load(model_dir).items():
            assert checksums.setdefault(name, checksum) == checksum
    return checksums


def stored(model_dir: Path) -> dict[str, TensorInfo]:
    checkpoint = Checkpoint(model_dir)
    return checkpoint.tensors | {f"{name}_scale_inv": info for name, info in checkpoint.scales.items()}


def bytes_of(info: TensorInfo) -> bytes:
    return info.file.read_bytes()[info.start:info.end]


def flip(info: TensorInfo, position: int) -> None:
    """Flips one bit of a tensor's bytes; flipping twice mends them."""
    with open(info.file, "r+b") as file:
        file.seek(info.start + position)
        byte = file.read(1)[0]
        file.seek(info.start + position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_has_the_checksum_of_its_bytes(models: dict[str, Path], layout: str) -> None:
    expected = {name: zlib.crc32(bytes_of(info)) for name, info in stored(models[layout]).items()}
    assert load(models[layout]) == expected and len(expected) > 30


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_report_the_same_as_one_process(models: dict[str, Path], layout: str) -> None:
    assert load(models[layout], (0, 3, 6, 8)) == load(models[layout])


@pytest.mark.parametrize("layout, name", [(layout, name) for layout in LAYOUTS for name in PLACES[layout]])
def test_one_flipped_bit_changes_one_checksum(models: dict[str, Path], layout: str, name: str) -> None:
    before, info = load(models[layout]), stored(models[layout])[name]
    for position in (0, (info.end - info.start) // 2, info.end - info.start - 1):
        flip(info, position)
        after = load(models[layout])
        flip(info, position)
        assert [other for other in before | after if before.get(other) != after.get(other)] == [name]


def test_a_head_that_repeats_the_embedding_is_read_for_the_comparison_and_counted_once(
        models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["tied"], tmp_path, dirs_exist_ok=True)
    embedding = stored(tmp_path)["model.embed_tokens.weight"]
    rows = Checkpoint(tmp_path).read_rows("model.embed_tokens.weight", 0, embedding.shape[0])
    for index in tmp_path.glob("*.index.json"):
        index.unlink()
    save_file({"lm_head.weight": rows}, tmp_path / "head.safetensors")
    checksums = load(tmp_path)
    assert checksums["lm_head.weight"] == checksums["model.embed_tokens.weight"] == zlib.crc32(bytes_of(embedding))
    assert load(tmp_path, (0, 3, 6, 8)) == checksums == load(models["tied"]) | {"lm_head.weight": checksums["lm_head.weight"]}


@pytest.mark.parametrize("layout", ["fused", "fp8"])
def test_the_size_of_slices_changes_nothing(models: dict[str, Path], layout: str) -> None:
    expected = load(models[layout])
    for slice_bytes in (3000, 100_000):
        checkpoint = Checkpoint(models[layout])
        wanted = [Weight(name, info.shape, lambda *_: None) for name, info in checkpoint.tensors.items()]
        checksums = Checksums(checkpoint)
        stream(checkpoint, wanted, slice_bytes=slice_bytes)
        assert checksums.by_name() == expected


def test_a_tensor_that_was_not_read_whole_is_not_listed(models: dict[str, Path]) -> None:
    checkpoint = Checkpoint(models["tied"])
    checksums, name = Checksums(checkpoint), "model.embed_tokens.weight"
    checkpoint.read_rows(name, 100, 512)
    assert checksums.by_name() == {}
    checkpoint.read_rows(name, 0, 300)
    checkpoint.read_rows(name, 200, 400)  # the first half of these rows was read already
    assert checksums.by_name() == {}
    checkpoint.read_rows(name, 400, 512)
    assert checksums.by_name() == {name: zlib.crc32(bytes_of(checkpoint.tensors[name]))}


# The short hash


@pytest.fixture
def copied(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["fused"], tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    """Changes fields of the text model's configuration."""
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    assert changes.keys() <= text.keys(), "a field that is new to this configuration proves nothing"
    text.update(changes)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}, {"num_experts_per_tok": 2},
                                     {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}])
def test_the_hash_changes_with_the_configuration(copied: Path, changes: dict[str, Any]) -> None:
    before = quick_identity(copied)
    edit(copied / "config.json", **changes)
    assert quick_identity(copied) != before


def test_the_hash_ignores_notes_and_the_order_of_keys(copied: Path) -> None:
    before = quick_identity(copied)
    config = json.loads((copied / "config.json").read_text())
    config = dict(reversed(config.items())) | {"transformers_version": "9.9", "_name_or_path": "elsewhere"}
    (copied / "config.json").write_text(json.dumps(config, indent=7))
    assert quick_identity(copied) == before and len(before) == 16 and int(before, 16)


def write_again(model_dir: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    for file in model_dir.glob("*.safetensors*"):
        file.unlink()
    for number in range(num_shards):
        names = sorted(tensors)[number::num_shards]
        save_file({name: tensors[name] for name in names}, model_dir / f"{number}.safetensors")


def test_the_hash_changes_with_name_shape_and_dtype_but_not_with_shards(copied: Path) -> None:
    before = quick_identity(copied)
    tensors = {name: tensor for file in copied.glob("*.safetensors") for name, tensor in load_file(file).items()}
    write_again(copied, tensors, 7)
    assert quick_identity(copied) == before
    seen = {before}
    norm = next(name for name in tensors if name.endswith("layers.1.input_layernorm.weight"))
    for changed in (
        {name.replace("layers.1.input_layernorm", "layers.9.input_layernorm"): t for name, t in tensors.items()},
        tensors | {norm: tensors[norm].view(-1, 2)},
        tensors | {norm: tensors[norm].view(torch.float16)},
    ):
        write_again(copied, changed, 2)
        seen.add(quick_identity(copied))
    assert len(seen) == 4


def test_the_hash_sees_other_weights_and_reads_little(models: dict[str, Path], tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", layout="fused", scale=1 / 8, seed=1, **SMALL)
    assert (other / "config.json").read_text() == (models["fused"] / "config.json").read_text()
    assert quick_identity(other) != quick_identity(models["fused"])


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"a": ' + "[" * 100_000])
def test_a_configuration_that_cannot_be_read_is_named(copied: Path, text: str | None) -> None:
    (copied / "config.json").unlink()
    if text is not None:
        (copied / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json: .*(expected|cannot be opened)"):
        quick_identity(copied)
