"""Says whether a model is still the one that was trained on: a short hash at once, and a checksum of each tensor as it loads.
Costs what the headers cost and 2.4 MB read for the hash, and a pass of CRC-32 over the bytes that are loaded: 0.15 s a GB."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from model.weights.checkpoint_files import Checkpoint, json_file
from model.weights.header import TensorInfo

NOTES = ("transformers_version", "_name_or_path")  # keys of config.json that change nothing that is computed
SAMPLED_TENSORS = 200
BLOCK_BYTES = 4096  # read at the beginning, in the middle and at the end of each sampled tensor


class Checksums:
    """The CRC-32 of each tensor's stored bytes, computed while a checkpoint is read, in whatever slices.

    Bytes that are read again count once. Made before the checkpoint is read, and by one thread at a time.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._read: dict[str, tuple[int, int]] = {}  # stored name -> the CRC-32 of the tensor's first bytes, how many bytes
        checkpoint.on_read = self._add

    def _add(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        checksum, num_bytes = self._read.get(info.name, (0, 0))
        if offset <= num_bytes < offset + len(data):
            self._read[info.name] = zlib.crc32(data[num_bytes - offset:], checksum), offset + len(data)

    def by_name(self) -> dict[str, int]:
        """The tensors that were read whole and from their beginning, by their names in the built model."""
        return {name: self._read[info.name][0] for name, info in sorted(_by_built_name(self._checkpoint).items())
                if self._read.get(info.name, (0, 0))[1] == info.end - info.start > 0}


def quick_identity(model_dir: Path) -> str:
    """16 hex digits: other settings, another name, dtype or shape of a tensor, and most other weights give others.

    Of the values only a few blocks are read: `Checksums` sees every bit. How the tensors are spread over shards is left out.

    Raises:
        CheckpointError: config.json or a header cannot be read.
    """
    tensors = _by_built_name(checkpoint := Checkpoint(model_dir))
    digest = hashlib.sha256(json.dumps(_computed(json_file(model_dir / "config.json")), sort_keys=True).encode())
    for name, info in sorted(tensors.items()):
        digest.update(repr((name, info.dtype, info.shape)).encode())
    names = sorted(tensors)
    count = min(len(names), SAMPLED_TENSORS)
    for number in range(count):  # the first and the last, and others evenly between them
        info = tensors[names[number * (len(names) - 1) // max(count - 1, 1)]]
        last = max(info.end - info.start - BLOCK_BYTES, 0)
        for offset in sorted({0, last // 2, last}):
            digest.update(checkpoint.read_bytes(info, offset, min(BLOCK_BYTES, info.end - info.start)))
    return digest.hexdigest()[:16]


def _by_built_name(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    return checkpoint.tensors | {f"{name}_scale_inv": info for name, info in checkpoint.scales.items()}


def _computed(config: Any) -> Any:
    """The configuration, and the ones inside it, without notes."""
    if isinstance(config, dict):
        return {key: _computed(value) for key, value in config.items() if key not in NOTES}
    return [_computed(value) for value in config] if isinstance(config, list) else config
