"""Damaged and hostile files: always an error that names the file, never a crash, a hang or a wrong tensor."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from model.weights.shards import Checkpoint, CheckpointError, Weight, stream, verify_manifest

TENSORS = {"a.weight": torch.arange(6).view(2, 3).bfloat16(), "b.weight": torch.arange(4).float()}
INDEX = "model.safetensors.index.json"


def write(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, its directory returned."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return file.parent


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read_all(directory: Path) -> dict[str, Tensor]:
    """Streams what TENSORS names and shapes, as a model that expects them would."""
    delivered = {name: torch.full(tensor.shape, torch.nan, dtype=torch.float64) for name, tensor in TENSORS.items()}

    def put_into(name: str) -> Any:
        def put(start: int, rows: Tensor) -> None:
            assert rows.dtype == TENSORS[name].dtype, "same size, another dtype: what the header says is what is read"
            delivered[name][start : start + len(rows)] = rows
        return put

    stream(Checkpoint(directory), [Weight(name, tuple(t.shape), put_into(name)) for name, t in TENSORS.items()])
    return delivered


@pytest.fixture
def small(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def check(file: Path) -> bool:
    """Whether the file is read; then every tensor must be right. Else the error must name the file or directory."""
    try:
        delivered = read_all(file.parent)
    except CheckpointError as error:
        assert str(file.parent) in str(error)
        return False
    assert all(torch.equal(delivered[name], tensor.double()) for name, tensor in TENSORS.items())
    return True


@pytest.mark.slow
def test_every_header_byte_changed(small: Path) -> None:
    """Each bit of each byte. What remains readable: the metadata's text, white space, BF16 <-> F16 said of others."""
    good, num_read = small.read_bytes(), 0
    for position in range(header_bytes(small)):
        for bit in range(8):
            small.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            num_read += check(small)
    metadata = len('{"format":"pt"}')
    assert 0 < num_read <= 8 * (metadata + 8), "more than the metadata's text and the padding was read as if unchanged"


@pytest.mark.slow
def test_every_cut(small: Path) -> None:
    good = small.read_bytes()
    for size in range(len(good)):
        small.write_bytes(good[:size])
        assert not check(small)
    for position in range(header_bytes(small)):  # one byte taken out
        small.write_bytes(good[:position] + good[position + 1 :])
        assert not check(small)
    small.write_bytes(good + b"\0")
    with pytest.raises(CheckpointError, match="1 bytes follow the last tensor"):
        read_all(small.parent)


@pytest.mark.parametrize("header, data, problem", [
    (b"", b"", "begins with"),
    (b"[]", b"", "begins with"),
    (b" {}", b"", "begins with"),
    (b'{"a":\xff}', b"", "JSON in UTF-8"),
    (b"{" + b'"a":{' * 100_000, b"", "JSON in UTF-8"),
    (b'{"a": ' + b"9" * 5000 + b"}", b"", "JSON in UTF-8"),
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', bytes(8), "key 'a' appears twice"),
    (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "key 'dtype' appears twice"),
    ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    ({"__metadata__": []}, b"", "__metadata__"),
    ({"a": []}, b"", "expected dtype, shape and data_offsets"),
    ({"a": {**entry(), "more": 1}}, bytes(8), "expected dtype, shape and data_offsets"),
    ({"a": entry(dtype="F31")}, bytes(8), "unknown dtype 'F31'"),
    ({"a": entry(dtype=[])}, bytes(8), "unknown dtype"),
    ({"a": entry(shape=[-2])}, bytes(8), "shape"),
    ({"a": entry(shape=[2.0])}, bytes(8), "shape"),
    ({"a": entry(shape=[True, 2])}, bytes(8), "shape"),
    ({"a": entry(shape=2)}, bytes(8), "shape"),
    ({"a": entry(shape=[1] * 65)}, bytes(8), "shape"),
    ({"a": entry(shape=[2**62, 4])}, bytes(8), "shape"),
    ({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}, b"", "shape"),  # 0 elements in 64 bits
    ({"a": entry(shape=[0, 2**63], offsets=[0, 0])}, b"", "shape"),
    ({"a": entry(shape=[3])}, bytes(8), "span 8 bytes, expected 12"),
    ({"a": entry(offsets=[8, 0])}, bytes(8), "data_offsets"),
    ({"a": entry(offsets=[-8, 0])}, bytes(8), "data_offsets"),
    ({"a": entry(offsets=[0, 8, 16])}, bytes(8), "data_offsets"),
    ({"a": entry(offsets=["0", "8"])}, bytes(8), "data_offsets"),
    ({"a": entry(offsets=[0, 8.0])}, bytes(8), "data_offsets"),
    ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "overlaps"),
    ({"a": entry(), "b": entry()}, bytes(8), "overlaps"),
    ({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17), "leaves a hole"),
    ({"a": entry(offsets=[1, 9])}, bytes(9), "leaves a hole"),
    ({"a": entry(), "b": entry(offsets=[8, 16])}, bytes(15), "tensor 'b' needs"),
    ({"a": entry(shape=[2**40], offsets=[0, 2**42])}, bytes(8), "was cut short"),
    ({"a": entry("I64", [1])}, bytes(8), "quantized already"),
    ({"a": entry("F8_E4M3", [8])}, bytes(8), "without 'a_scale_inv'"),
    ({"a": entry("F8_E4M3", [8]), "a_scale_inv": entry("F32", [1], [8, 12])}, bytes(12), "expected BF16 or F32"),
    ({"a": entry("F8_E4M3", [2, 4]), "a_scale_inv": entry("F32", [2, 1], [8, 16])}, bytes(16), r"F32 \(1, 1\)"),
    ({"a": entry("F8_E4M3", [2, 4]), "a_scale_inv": entry("F16", [1, 1], [8, 10])}, bytes(10), "expected BF16 or F32"),
    ({"a": entry(), "a_scale_inv": entry("F32", [2], [8, 16])}, bytes(16), "is a scale, but no FP8 tensor"),
    ({"model.a": entry(), "model.language_model.a": entry(offsets=[8, 16])}, bytes(16), "are both 'model.a'"),
    ({"\ud800": entry(dtype="\ud800")}, bytes(8), "unknown dtype"),
    ({"x" * 10_000: entry(shape=[3])}, bytes(8), r"xxx\.\.\."),
])
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, problem: str) -> None:
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=problem) as error:
        Checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("length, problem", [(2**64 - 1, "at most 100000000"), (100_000_001, "at most 100000000"),
                                             (100, "header of 100 bytes in a file of")])
def test_header_lengths(tmp_path: Path, length: int, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        Checkpoint(write(tmp_path / "model.safetensors", {}, length=length))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
OFFSET = st.integers(-2, 30) | st.integers()
ENTRY = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64"]) | JSON,
    "shape": st.lists(st.integers(-1, 5) | st.integers(), max_size=3) | JSON,
    "data_offsets": st.lists(OFFSET, min_size=2, max_size=2) | JSON})
NAME = st.sampled_from(["a.weight", "b.weight", "a.weight_scale_inv", "__metadata__"]) | st.text(max_size=5)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(NAME, ENTRY | JSON, max_size=4) | st.binary(max_size=40), data=st.binary(max_size=40))
def test_fuzzed_headers(tmp_path: Path, header: Any, data: bytes) -> None:
    directory = write(tmp_path / "model.safetensors", header, data)
    try:
        checkpoint = Checkpoint(directory)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
        return
    for name, info in checkpoint.tensors.items():
        rows = checkpoint.read_rows(name, 0, info.shape[0] if info.shape else 1)
        if info.dtype != "F8_E4M3":
            stored = (tmp_path / "model.safetensors").read_bytes()[info.start : info.end]
            assert bytes(rows.view(-1).view(torch.uint8).tolist()) == stored


# Directories and indexes


def write_index(directory: Path, weight_map: Any) -> Path:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for file, name in (("1.safetensors", "a.weight"), ("2.safetensors", "b.weight")):
        save_file({name: TENSORS[name]}, tmp_path / file)
    return write_index(tmp_path, {"a.weight": "1.safetensors", "b.weight": "2.safetensors"})


def test_shards_and_symbolic_links(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("blobs")
    os.rename(sharded / "1.safetensors", elsewhere / "blob")
    os.symlink(elsewhere / "blob", sharded / "1.safetensors")
    assert check(sharded / INDEX)


@pytest.mark.parametrize("weight_map, problem", [
    ({"a.weight": "1.safetensors", "b.weight": "3.safetensors"}, "1 are missing: '3.safetensors'"),
    ({"a.weight": "1.safetensors", "b.weight": "1.safetensors"}, "does not hold the tensor 'b.weight'"),
    ({"a.weight": "1.safetensors", "b.weight": "2.safetensors", "c": "2.safetensors"}, "does not hold the tensor 'c'"),
    ({"a.weight": "../x.safetensors"}, "expected a plain name"), ({"a.weight": "/etc/passwd"}, "expected a plain name"),
    ({"a.weight": ".."}, "expected a plain name"), ({"a.weight": ""}, "expected a plain name"),
    ({"a.weight": "a\0b"}, "expected a plain name"), ({"a.weight": 3}, "expected a plain name"),
    ({"a.weight": ["1.safetensors"]}, "expected a plain name"),
    ({}, "weight_map is"), (None, "weight_map is"), ([], "weight_map is")])
def test_hostile_index(sharded: Path, weight_map: Any, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as error:
        Checkpoint(write_index(sharded, weight_map))
    assert str(sharded) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}'])
def test_malformed_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint(sharded)


def test_same_tensor_in_two_shards(sharded: Path) -> None:
    save_file(TENSORS, sharded / "2.safetensors")
    with pytest.raises(CheckpointError, match="'a.weight' is also in 1.safetensors"):
        Checkpoint(sharded)


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither model.safetensors.index.json nor"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint(tmp_path / "absent")


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    """Opening a named pipe waits for a writer: that would be a hang."""
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        Checkpoint(tmp_path)


def test_file_descriptors_are_closed(sharded: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        Checkpoint(sharded)
    (sharded / "2.safetensors").write_bytes(b"")
    for _ in range(5):
        with pytest.raises(CheckpointError):
            Checkpoint(sharded)
    assert len(os.listdir("/proc/self/fd")) == before


# Reading


def test_short_reads_are_continued(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:3]], offset))
    assert check(small)


def test_read_errors_name_file_and_tensor(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(small.parent)

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=f"{small}: tensor '[ab].weight': reading at byte .* Input/output error"):
        stream(checkpoint, [Weight(name, tuple(t.shape), print) for name, t in TENSORS.items()])


def test_file_cut_while_it_is_read(small: Path) -> None:
    checkpoint = Checkpoint(small.parent)
    os.truncate(small, header_bytes(small) + 3)
    with pytest.raises(CheckpointError, match=f"{small}: tensor '[ab].weight': the file ends at byte"):
        stream(checkpoint, [Weight(name, tuple(t.shape), lambda *_: None) for name, t in TENSORS.items()])


# The manifest


def write_manifest(directory: Path) -> Path:
    manifest = {file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
                for file in directory.glob("*.safetensors*")}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_manifest_finds_every_damaged_byte(sharded: Path) -> None:
    assert verify_manifest(write_manifest(sharded)) is True
    file = sharded / "2.safetensors"
    good = file.read_bytes()
    for position in range(len(good)):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match=f"{file}: SHA-256"):
            verify_manifest(sharded)


def test_manifest_sizes_are_always_checked(sharded: Path) -> None:
    write_manifest(sharded)
    save_file({"b.weight": torch.zeros(5)}, sharded / "2.safetensors")
    for read in (Checkpoint, verify_manifest):
        with pytest.raises(CheckpointError, match="2.safetensors: .* bytes, expected .* by manifest.json"):
            read(sharded)


@pytest.mark.parametrize("manifest, problem", [
    ({}, "not named by manifest.json"), ({"../x": {"size": 1, "sha256": ""}}, "expected a plain name"),
    ({"1.safetensors": 3}, "expected {"), ({"1.safetensors": {"size": "3", "sha256": ""}}, "expected {")])
def test_hostile_manifest(sharded: Path, manifest: Any, problem: str) -> None:
    (sharded / "manifest.json").write_text(json.dumps(manifest))
    for read in (Checkpoint, verify_manifest):
        with pytest.raises(CheckpointError, match=problem):
            read(sharded)
