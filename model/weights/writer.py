"""Writes safetensors shards: each tensor has its place from the start, and any thread may fill in any part of it.
Costs about 0.5 KiB a tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.weights.header import ITEM_BYTES

INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Creates the shards of a checkpoint in their final size, with their headers, and where there are several their index.

    Args:
        tensors: name, dtype as a header spells it, and shape of each, in the order in which they are stored.
        shard_bytes: the most that a shard may hold, unless a single tensor is larger.
    """

    def __init__(self, directory: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], shard_bytes: int) -> None:
        shards: list[dict[str, Any]] = [{}]  # the headers
        position = self.total_bytes = 0
        for name, dtype, shape in tensors:
            num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
            # a new shard also where 4-byte numbers would follow an odd number of 2-byte ones: readers want them aligned
            if shards[-1] and (position + num_bytes > shard_bytes or position % ITEM_BYTES[dtype]):
                shards.append({})
                position = 0
            shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + num_bytes]}
            position += num_bytes
            self.total_bytes += num_bytes
        self.files = [directory / f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        if len(shards) == 1:
            self.files = [directory / "model.safetensors"]
        self.places: dict[str, tuple[Path, int]] = {}
        for file, shard in zip(self.files, shards):
            data_start = write_header(file, shard)
            self.places |= {name: (file, data_start + entry["data_offsets"][0]) for name, entry in shard.items()}
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.total_bytes},
                     "weight_map": {name: file.name for name, (file, _) in self.places.items()}}
            (directory / INDEX).write_bytes(as_json(index))

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Writes values from the tensor's number `first` on, counted as if it were flat; they have its dtype."""
        file, offset = self.places[name]
        with open(file, "r+b") as opened:
            opened.seek(offset + first * values.itemsize)
            opened.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_header(file: Path, tensors: dict[str, Any]) -> int:
    """Writes the header of a new file, which gets its final size; returns where its data begins."""
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    data_start = 8 + len(header)
    with open(file, "wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(data_start + max(entry["data_offsets"][1] for entry in tensors.values()))
    return data_start


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
