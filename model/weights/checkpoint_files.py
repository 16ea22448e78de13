"""Opens a model directory: finds the tensors in its safetensors files and reads rows of them straight from the disk.
Costs about 0.5 KiB a tensor; dequantizing FP8 rows takes another 1.1 KiB a column."""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.weights.header import (
    CheckpointError,
    TensorInfo,
    open_file,
    parse_json_object,
    read_exactly,
    read_header,
    short,
)

# R rows, C columns, B blocks

# The checkpoint of a multimodal model holds the text model under this prefix; only the text model is built.
PREFIXES = {"model.language_model.": "model."}
IGNORED = re.compile(r"model\.visual\.|mtp\.|.*\.rotary_emb\.inv_freq$")

FP8 = "F8_E4M3"
FP8_BLOCK = 128  # rows and columns that share one scale
# From two neighbouring codes to their two float32 values, as one 8-byte number: 10 times as fast as a cast.
FP8_PAIRS = (torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float8_e4m3fn).float()
             .view(torch.float64))
# The dtype in which each stored dtype of a weight is read.
READ_AS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
           FP8: torch.bfloat16}


class Checkpoint:
    """The tensors of one model directory under the names of the built model, every header read and checked.

    Reads `model.safetensors.index.json` and the shards it names, else `model.safetensors`, else every
    `*.safetensors`. If there is a `manifest.json`, the files must have the sizes that it gives; `verify_manifest` checks
    their bytes. Reading rows is thread-safe, since no file position is kept.

    Args:
        whole: also open the tensors that only other parts of the model need, such as its vision tower, which are not built.

    Raises CheckpointError, which names the file.
    """

    def __init__(self, path: str | Path, whole: bool = False) -> None:
        self.path = Path(path)
        self.on_read: Callable[[TensorInfo, int, memoryview], object] | None = None  # called with what was read, and where
        self._descriptors: dict[Path, int] = {}
        weakref.finalize(self, _close, self._descriptors)
        named_by_index, files = _shards(self.path)
        manifest = _manifest(self.path)
        stored: dict[str, TensorInfo] = {}
        for file in files:
            self._descriptors[file], num_bytes = open_file(file)
            if manifest is not None:
                _check_size(file, num_bytes, manifest)
            for tensor in read_header(self._descriptors[file], file, num_bytes):
                other = stored.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise CheckpointError(f"{file}: tensor {short(tensor.name)} is also in {other.file.name}, expected "
                                          "in one shard only; download both again")
        for name, file in named_by_index.items():
            if name not in stored or stored[name].file != file:
                raise CheckpointError(f"{file}: does not hold the tensor {short(name)} that the index promises; index "
                                      "and shards are not of one checkpoint, download them again")
        named = _built_names(tensor for tensor in stored.values() if whole or not IGNORED.match(tensor.name))
        self.scales = {name.removesuffix("_scale_inv"): info for name, info in named.items()
                       if name.endswith("_scale_inv")}
        self.tensors = {name: info for name, info in named.items() if not name.endswith("_scale_inv")}
        self._check_dtypes()

    def _check_dtypes(self) -> None:
        for name, info in self.tensors.items():
            scale = self.scales.get(name)
            if info.dtype not in READ_AS:
                raise CheckpointError(f"{_where(info)} is {info.dtype}, expected one of {', '.join(READ_AS)}: is the "
                                      "model quantized already? Take the BF16 or the FP8 repository")
            if info.dtype != FP8:
                continue
            if scale is None:
                raise CheckpointError(f"{_where(info)} is FP8 without {short(info.name + '_scale_inv')}, expected one "
                                      f"scale a block of {FP8_BLOCK} x {FP8_BLOCK}; is a shard missing?")
            blocks = tuple(-(-size // FP8_BLOCK) for size in info.shape)
            if len(info.shape) != 2 or scale.shape != blocks or scale.dtype not in ("BF16", "F32"):
                raise CheckpointError(f"{_where(scale)} is {scale.dtype} {scale.shape}, expected BF16 or F32 {blocks} "
                                      f"for an FP8 matrix of {info.shape}")
        for name, scale in self.scales.items():
            if name not in self.tensors or self.tensors[name].dtype != FP8:
                raise CheckpointError(f"{_where(scale)} is a scale, but no FP8 tensor {short(name)} belongs to it; is "
                                      "a shard missing?")

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` along dim 0, as a new CPU tensor in the stored dtype (FP8: dequantized to bf16)."""
        info = self.tensors[name]
        rows = torch.empty((stop - start, *info.shape[1:]), dtype=READ_AS[info.dtype], device="cpu")
        self.read_into(name, start, rows)
        return rows

    def read_into(self, name: str, start: int, rows: Tensor) -> int:
        """Fills `rows`, contiguous and of the dtype that `read_rows` returns; returns their stored bytes."""
        info = self.tensors[name]
        assert 0 <= start and start + len(rows) <= (info.shape[0] if info.shape else 1)
        if info.dtype == FP8:
            return self._dequantize_into(info, self.scales[name], start, rows)
        return self._read(info, start * (rows.nbytes // max(len(rows), 1)), rows)

    def _dequantize_into(self, info: TensorInfo, scale: TensorInfo, start: int, rows_RC: Tensor) -> int:
        """Multiplies in float32 and rounds to bf16, one block of rows at a time, so that temporaries stay in the cache."""
        num_columns, stop = info.shape[1], start + len(rows_RC)
        first, last = start // FP8_BLOCK, -(-stop // FP8_BLOCK)
        scale_BB = torch.empty((last - first, scale.shape[1]), dtype=READ_AS[scale.dtype], device="cpu")
        self._read(scale, first * (scale_BB.nbytes // max(len(scale_BB), 1)), scale_BB)
        for block, scale_B in enumerate(scale_BB, first):
            top, bottom = max(block * FP8_BLOCK, start), min((block + 1) * FP8_BLOCK, stop)
            num_codes = (bottom - top) * num_columns
            codes = torch.zeros(num_codes + num_codes % 2, dtype=torch.uint8, device="cpu")
            self._read(info, top * num_columns, codes[:num_codes])
            values = FP8_PAIRS.index_select(0, codes.view(torch.uint16).int()).view(torch.float32)
            values_RC = values[:num_codes].view(-1, num_columns)
            values_RC *= scale_B.float().repeat_interleave(FP8_BLOCK)[:num_columns]
            rows_RC[top - start:bottom - start] = values_RC
        return rows_RC.numel()

    def _read(self, info: TensorInfo, offset: int, out: Tensor) -> int:
        buffer = out.view(-1).view(torch.uint8).numpy().data
        read_exactly(self._descriptors[info.file], buffer, info.start + offset, _where(info))
        if self.on_read is not None:
            self.on_read(info, offset, buffer)
        return len(buffer)

    def read_bytes(self, info: TensorInfo, offset: int, num_bytes: int) -> bytes:
        """Bytes of a tensor as they are stored, from `offset` in the tensor."""
        data = bytearray(num_bytes)
        read_exactly(self._descriptors[info.file], memoryview(data), info.start + offset, _where(info))
        return bytes(data)


def verify_manifest(path: str | Path, progress: Callable[[int], Any] | None = None) -> bool:
    """Hashes every file that `manifest.json` ({file: {"size", "sha256"}}) names; False where there is no manifest.

    Reads everything once (SHA-256 hashes 0.5 to 2 GB/s). Raises CheckpointError for the first file that
    differs, and for a shard that the manifest does not name.
    """
    path = Path(path)
    manifest = _manifest(path)
    if manifest is None:
        return False
    for file in (*_shards(path)[1], *(path / name for name in manifest)):
        _check_size(file, None, manifest)
    buffer = memoryview(bytearray(2**20))
    for name, (num_bytes, expected) in manifest.items():
        descriptor, found_bytes = open_file(path / name)
        with os.fdopen(descriptor, "rb", buffering=0):
            _check_size(path / name, found_bytes, manifest)
            digest = hashlib.sha256()
            for start in range(0, num_bytes, len(buffer)):
                part = buffer[:num_bytes - start]
                read_exactly(descriptor, part, start, str(path / name))
                digest.update(part)
                if progress is not None:
                    progress(len(part))
        if digest.hexdigest() != expected:
            raise CheckpointError(f"{path / name}: SHA-256 {digest.hexdigest()}, expected {expected} by manifest.json: "
                                  "its bytes are damaged, download it again")
    return True


def _shards(path: Path) -> tuple[dict[str, Path], list[Path]]:
    """The file in which the index promises each tensor (empty without an index), and the files to read."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory, expected one with config.json and *.safetensors")
    if not index.exists():
        files = [single] if single.exists() else sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path}: neither {index.name} nor a *.safetensors file in it; is the download "
                                  "complete?")
        return {}, files
    weight_map = json_file(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {short(weight_map)}, expected the file of each tensor")
    for name in weight_map.values():
        _check_file_name(name, index)
    files = [path / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise CheckpointError(f"{index}: names {len(files)} shards, {len(absent)} are missing: {first_few(absent)}; "
                              "finish the download")
    return {name: path / file for name, file in weight_map.items()}, files


def _manifest(path: Path) -> dict[str, tuple[int, str]] | None:
    """Size and SHA-256 of each file that manifest.json names."""
    file = path / "manifest.json"
    if not file.exists():
        return None
    manifest = {}
    for name, entry in json_file(file).items():
        _check_file_name(name, file)
        size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(sha256, str):
            raise CheckpointError(f'{file}: {short(name)} is {short(entry)}, expected {{"size": ..., "sha256": ...}}')
        manifest[name] = (size, sha256)
    return manifest


def _check_size(file: Path, num_bytes: int | None, manifest: dict[str, tuple[int, str]]) -> None:
    if file.name not in manifest:
        raise CheckpointError(f"{file}: not named by manifest.json beside it, expected every shard to be")
    if num_bytes is not None and num_bytes != manifest[file.name][0]:
        raise CheckpointError(f"{file}: {num_bytes} bytes, expected {manifest[file.name][0]} by manifest.json; "
                              "download it again")


def _check_file_name(name: Any, file: Path) -> None:
    """Raises unless the name is plain: no checkpoint may cause reads outside its own directory."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise CheckpointError(f"{file}: names the file {short(name)}, expected a plain name in the same directory")


def json_file(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds, read strictly (see `parse_json_object`)."""
    descriptor, num_bytes = open_file(file)
    data = bytearray(num_bytes)
    try:
        read_exactly(descriptor, memoryview(data), 0, str(file))
    finally:
        os.close(descriptor)
    return parse_json_object(bytes(data), str(file))


def _built_names(stored: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    named: dict[str, TensorInfo] = {}
    for info in stored:
        name = info.name
        for prefix, built in PREFIXES.items():
            if name.startswith(prefix):
                name = built + name.removeprefix(prefix)
        other = named.setdefault(name, info)
        if other is not info:
            raise CheckpointError(f"{_where(info)} and {short(other.name)} in {other.file.name} are both {short(name)}")
    return named


def _where(info: TensorInfo) -> str:
    return f"{info.file}: tensor {short(info.name)}"


def first_few(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    first = ", ".join(short(name) for name in list(names)[:8])
    return first if len(names) <= 8 else f"{first} and {len(names) - 8} more"


def _close(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
