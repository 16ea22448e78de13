"""What the writer of shards writes is read by safetensors, whatever the order in which it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.weights.checkpoint_files import Checkpoint
from model.weights.writer import INDEX, ShardWriter


def test_values_written_in_any_order_are_read_in_the_order_of_the_tensors(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(6, 4).bfloat16(), "a": torch.randn(3), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 5)}
    codes = {torch.bfloat16: "BF16", torch.float32: "F32"}
    writer = ShardWriter(tmp_path, [(name, codes[t.dtype], tuple(t.shape)) for name, t in tensors.items()], 1000)
    writer.write("a", 0, tensors["a"])
    writer.write("b", 8, tensors["b"][2:])
    writer.write("b", 0, tensors["b"][:2])
    writer.write("scalar", 0, tensors["scalar"])
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert writer.total_bytes == 6 * 4 * 2 + 3 * 4 + 4 == sum(t.nbytes for t in tensors.values())
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [name for name in Checkpoint(tmp_path).tensors if name != "empty"] == ["b", "a", "scalar"]


@pytest.mark.parametrize("shard_bytes, shards", [(8, ["abc", "d", "e"]), (11, ["abc", "d", "e"]), (12, ["abcd", "e"])])
def test_a_shard_is_never_larger_unless_one_tensor_is(tmp_path: Path, shard_bytes: int, shards: list[str]) -> None:
    sizes = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 9}  # of 2 bytes
    ShardWriter(tmp_path, [(name, "BF16", (size,)) for name, size in sizes.items()], shard_bytes)
    files = [tmp_path / f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    assert [sorted(load_file(file)) for file in files] == [sorted(names) for names in shards]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {name: file.name for names, file in zip(shards, files) for name in names}
    assert index["metadata"] == {"total_size": 30}


def test_wider_numbers_never_follow_an_odd_number_of_narrow_ones(tmp_path: Path) -> None:
    """Whoever maps the file would have 4-byte numbers at addresses that 4 does not divide."""
    ShardWriter(tmp_path, [("odd", "BF16", (3,)), ("wide", "F32", (2,)), ("odd2", "BF16", (2,))], 1000)
    assert [sorted(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [["odd"], ["odd2", "wide"]]
