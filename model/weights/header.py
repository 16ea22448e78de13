"""Reads and checks the header of one safetensors file: which tensor lies where.
Costs the header itself (a few MB for the largest models); no tensor data is read.

Format: 8 bytes little-endian length, that many bytes of JSON, then the data, without gaps
(https://huggingface.co/docs/safetensors). Everything is checked before it is used: a damaged or hostile file raises
a `CheckpointError` that names the file, and never causes a crash or a wrong tensor.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}
UNREADABLE = "the file is damaged: download or write it again"
DAMAGED = "the file is damaged or not a safetensors file: download or write it again"


class CheckpointError(ValueError):
    """A checkpoint cannot be read; says which file and tensor, what was found, what was expected and what to do."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    name: str
    file: Path
    dtype: str  # as the header spells it: "BF16", "F32", "F8_E4M3", ...
    shape: tuple[int, ...]
    start: int  # absolute offsets into `file`, in bytes
    end: int


def open_file(file: Path) -> tuple[int, int]:
    """Opens a regular file (symbolic links are followed) for reading; returns its descriptor and its size in bytes."""
    try:
        # Checked before it is opened, because opening a named pipe would wait forever.
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise CheckpointError(f"{file}: expected a regular file, found something else")
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        return fd, os.fstat(fd).st_size
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: cannot be opened ({error}); is the download complete?") from error


def read_exactly(fd: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fills `buffer` from `offset` of the file; continues short reads. `what` names file and tensor in errors."""
    num_read = 0
    while num_read < len(buffer):
        try:
            count = os.preadv(fd, [buffer[num_read:]], offset + num_read)
        except OSError as error:
            raise CheckpointError(f"{what}: reading at byte {offset + num_read} failed: {error}") from error
        if count == 0:
            raise CheckpointError(f"{what}: the file ends at byte {offset + num_read}, expected it to reach "
                                  f"{offset + len(buffer)}; it was cut while being read")
        num_read += count


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """Parses a JSON object strictly: UTF-8, no duplicate keys, no nesting beyond Python's recursion limit."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{what}: the key {short(twice)} appears twice; {UNREADABLE}")
        return parsed

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{what}: expected JSON in UTF-8, found {short(str(error))}; {UNREADABLE}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{what}: expected a JSON object, found {short(parsed)}; {UNREADABLE}")
    return parsed


def read_header(fd: int, file: Path, file_bytes: int) -> list[TensorInfo]:
    """Reads and checks the header of an open safetensors file; returns the tensors in the order of their offsets."""
    if file_bytes < 8:
        raise CheckpointError(f"{file}: {file_bytes} bytes, expected at least the 8 of a header length; {DAMAGED}")
    length = bytearray(8)
    read_exactly(fd, memoryview(length), 0, str(file))
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} allowed; {DAMAGED}")
    data_start = 8 + header_bytes
    if data_start > file_bytes:
        raise CheckpointError(f"{file}: header of {header_bytes} bytes in a file of {file_bytes}; {DAMAGED}")
    header = bytearray(header_bytes)
    read_exactly(fd, memoryview(header), 8, str(file))
    if header[:1] != b"{":
        raise CheckpointError(f"{file}: header begins with {bytes(header[:1])!r}, expected b'{{'; {DAMAGED}")
    entries = parse_json_object(bytes(header), f"{file}: header")

    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is {short(metadata)}, expected strings by name; {DAMAGED}")
    tensors = [_tensor(name, entry, file, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_layout(tensors, file, data_start, file_bytes)
    return tensors


def _tensor(name: str, entry: Any, file: Path, data_start: int) -> TensorInfo:
    what = f"{file}: tensor {short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: {short(entry)}, expected dtype, shape and data_offsets; {DAMAGED}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f'{what}: unknown dtype {short(dtype)}, expected one of {", ".join(ITEM_BYTES)}')
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= 2**63:
        raise CheckpointError(f"{what}: shape {short(shape)}, expected a list of sizes; {DAMAGED}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what}: data_offsets {short(offsets)}, expected [start, end]; {DAMAGED}")
    start, end = offsets
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != num_bytes:
        raise CheckpointError(f"{what}: data_offsets span {end - start} bytes, expected {num_bytes} for {dtype} "
                              f"{shape}; {DAMAGED}")
    return TensorInfo(name, file, dtype, tuple(shape), data_start + start, data_start + end)


def _naturals(values: Any) -> bool:
    """Whether `values` is a list of integers >= 0 that fit 63 bits (True and 1.0 are not integers here)."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(tensors: list[TensorInfo], file: Path, data_start: int, file_bytes: int) -> None:
    """The data must be covered exactly: no overlap, no hole, nothing after the last tensor, nothing cut off."""
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the one before it" if tensor.start < position else "leaves a hole before it"
            raise CheckpointError(f"{file}: tensor {short(tensor.name)} begins at byte {tensor.start}, expected "
                                  f"{position}: it {kind}; {DAMAGED}")
        position = tensor.end
    if position > file_bytes:
        last = next(tensor for tensor in tensors if tensor.end > file_bytes)
        raise CheckpointError(f"{file}: {file_bytes} bytes, but tensor {short(last.name)} needs {last.end} and the "
                              f"header {position} in all: the file was cut short; download it again")
    if position < file_bytes:
        raise CheckpointError(f"{file}: {file_bytes - position} bytes follow the last tensor, expected none; {DAMAGED}")


def short(value: Any) -> str:
    """`repr` of a value found in a file, cut to 200 characters for an error message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
