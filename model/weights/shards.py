"""Streams a safetensors checkpoint, slice by slice, into the built model, in the same way for every published layout.
Costs 3 buffers of max(slice_bytes, one expert), and 1.1 KiB a column of the widest FP8 matrix: 24 to 36 MiB in all."""

from __future__ import annotations

import math
import mmap
import re
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.weights.checkpoint_files import READ_AS, Checkpoint, first_few, verify_manifest
from model.weights.header import CheckpointError, TensorInfo

__all__ = ["Checkpoint", "CheckpointError", "Experts", "TensorInfo", "Weight", "stream", "verify_manifest",
           "wanted_bytes"]

# R rows, E experts, I intermediate size, D hidden size

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERT_TENSOR = re.compile(r"(.*\.experts)\.(?:gate_up_proj|down_proj|\d+\.(?:gate|up|down)_proj\.weight)")
NUM_BUFFERS = 3  # one being put, one full and waiting, one being filled
ROWS_MULTIPLE = 128  # slices end at the ends of FP8 blocks and quantization blocks
ALIGNMENT = 64  # bytes


@dataclass
class Weight:
    """One tensor of the built model and where its rows go.

    `put(start, rows)` is called in the order of the rows, on the thread that calls `stream`; `rows` is a CPU tensor
    in the checkpoint's float dtype, [R, ...]. All but the last slice hold a multiple of 128 rows where 128 rows fit.
    """

    name: str
    shape: tuple[int, ...]
    put: Callable[[int, Tensor], Any]


@dataclass
class Experts:
    """The routed experts of one layer, by the name of their module: `model.layers.3.mlp.experts`.

    `put(e, gate_up_2ID, down_DI)` is called once for each expert, in the order in which the file holds them (0, 1,
    10, 100, ... where names were sorted), gate rows first.
    """

    name: str
    num_experts: int
    hidden: int
    intermediate: int
    put: Callable[[int, Tensor, Tensor], Any]


def stream(checkpoint: Checkpoint, wanted: Collection[Weight | Experts],
           progress: Callable[[int], Any] | None = None, slice_bytes: int = 8 * 2**20,
           all_names: Collection[str] | None = None, tied: bool = False) -> None:
    """Reads the wanted tensors, in the order of the files, and puts them; the next slices are read while one is put.

    Args:
        progress: called after each slice with the bytes read for it (`wanted_bytes` gives their sum).
        slice_bytes: how much is read ahead at a time; one expert, or one row, is read whole even if it is larger.
        all_names: the names in the state dict of the whole model, if `wanted` is only one stage of it; tensors of other
            stages are ignored. Experts count under their module's name or as `<module>.gate_up_proj`.
        tied: whether the head is the embedding. A checkpoint without `lm_head.weight` then gives the embedding in its
            place; a checkpoint with `lm_head.weight` must hold the embedding's values there. A model without a head
            among its names is always tied.

    A tensor that `put` keeps stays valid, but holds its whole buffer in memory: copy what is to be kept.

    Raises CheckpointError before anything is read if tensors are missing, unexpected or of another shape, and when a
    read fails. Exceptions of `put` pass through unchanged.
    """
    batches = list(_batches(_sorted_pieces(checkpoint, wanted, slice_bytes, all_names, tied), slice_bytes))
    buffer_bytes = max((offset + piece.num_bytes for batch in batches for offset, piece in batch), default=0)
    # Memory maps, not torch tensors: an unmapped buffer goes back to the system at once, a freed one perhaps never.
    buffers = [_map(buffer_bytes) for _ in batches[:NUM_BUFFERS]]
    idle_references = sys.getrefcount(buffers[0]) if buffers else 0

    def read(index: int) -> int:
        memory = buffers[index % NUM_BUFFERS]
        return sum(piece.read(checkpoint, memory, offset) for offset, piece in batches[index])

    reader = ThreadPoolExecutor(1, thread_name_prefix="shard-reader")
    try:
        reading: deque[Future[int]] = deque(reader.submit(read, index) for index in range(len(buffers)))
        for index, batch in enumerate(batches):
            num_read = reading.popleft().result()
            for offset, piece in batch:
                piece.put(*piece.outputs_in(buffers[index % NUM_BUFFERS], offset))
            if index + NUM_BUFFERS < len(batches):
                # Reading into a buffer of which put has kept a tensor would change that tensor.
                if sys.getrefcount(buffers[index % NUM_BUFFERS]) > idle_references:
                    buffers[index % NUM_BUFFERS] = _map(buffer_bytes)
                reading.append(reader.submit(read, index + NUM_BUFFERS))
            if progress is not None:
                progress(num_read)
    finally:
        reader.shutdown(cancel_futures=True)


def wanted_bytes(checkpoint: Checkpoint, wanted: Collection[Weight | Experts]) -> int:
    """The sum of the bytes that `stream` will report; FP8 scales, 1 byte in 8,000, are not counted."""
    infos = [checkpoint.tensors.get(name) for item in wanted for name in _sources(checkpoint, item, tied=True)]
    return sum(info.end - info.start for info in infos if info is not None)


@dataclass(frozen=True, slots=True)
class _Output:
    """One tensor for `put`: rows of one or more tensors of the checkpoint, one below the other."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[tuple[str, int, int], ...]  # name, first row, number of rows

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Piece:
    """The tensors for one call of `put`, and where their data begins."""

    put: Callable[..., Any]
    outputs: tuple[_Output, ...]
    position: tuple[Path, int]

    @property
    def num_bytes(self) -> int:
        return sum(_aligned(output.num_bytes) for output in self.outputs)

    def outputs_in(self, memory: mmap.mmap, offset: int) -> Iterator[Tensor]:
        for output in self.outputs:
            count = math.prod(output.shape)
            yield torch.frombuffer(memory, dtype=output.dtype, count=count, offset=offset).view(output.shape)
            offset += _aligned(output.num_bytes)

    def read(self, checkpoint: Checkpoint, memory: mmap.mmap, offset: int) -> int:
        num_read = 0
        for output, tensor in zip(self.outputs, self.outputs_in(memory, offset)):
            start, values = 0, tensor.view(-1)
            for name, first, num_rows in output.sources:
                shape = (num_rows, *checkpoint.tensors[name].shape[1:])
                part = values[start:start + math.prod(shape)].view(shape)
                num_read += checkpoint.read_into(name, first, part)
                start += part.numel()
        return num_read


def _sorted_pieces(checkpoint: Checkpoint, wanted: Collection[Weight | Experts], slice_bytes: int,
                   all_names: Collection[str] | None, tied: bool) -> list[_Piece]:
    """All pieces in the order in which they lie in the files; raises if any tensor does not fit."""
    own_names = {item.name for item in wanted}
    model_names = own_names if all_names is None else {*all_names, *own_names}
    tied = tied or HEAD not in model_names
    expected = {name: shape for item in wanted for name, shape in _sources(checkpoint, item, tied).items()}
    _check_fit(checkpoint, expected, own_names, model_names, tied)
    if tied and HEAD in checkpoint.tensors and EMBEDDING in expected:
        _check_tied(checkpoint)
    pieces = [piece for item in wanted for piece in (
        _weight_pieces(checkpoint, item, slice_bytes, tied) if isinstance(item, Weight)
        else _expert_pieces(checkpoint, item))]
    return sorted((piece for piece in pieces if piece.num_bytes), key=lambda piece: piece.position)


def _sources(checkpoint: Checkpoint, item: Weight | Experts, tied: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of the checkpoint that make up `item`, and their shapes."""
    if isinstance(item, Weight):
        is_alias = tied and item.name == HEAD and HEAD not in checkpoint.tensors
        return {EMBEDDING if is_alias else item.name: tuple(item.shape)}
    gate, down = (item.intermediate, item.hidden), (item.hidden, item.intermediate)
    if _is_fused(checkpoint, item):
        return {f"{item.name}.gate_up_proj": (item.num_experts, 2 * item.intermediate, item.hidden),
                f"{item.name}.down_proj": (item.num_experts, *down)}
    return {f"{item.name}.{e}.{projection}_proj.weight": shape for e in range(item.num_experts)
            for projection, shape in (("gate", gate), ("up", gate), ("down", down))}


def _is_fused(checkpoint: Checkpoint, item: Experts) -> bool:
    return f"{item.name}.gate_up_proj" in checkpoint.tensors or f"{item.name}.down_proj" in checkpoint.tensors


def _check_fit(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]], own_names: Collection[str],
               model_names: Collection[str], tied: bool) -> None:
    def is_known(name: str) -> bool:
        """Whether the tensor belongs to another stage, or is a head that repeats the embedding."""
        experts = EXPERT_TENSOR.fullmatch(name)
        module = experts[1] if experts else name
        if module in own_names:  # one expert too many, or a second layout of the same experts
            return False
        return (name in model_names or module in model_names or f"{module}.gate_up_proj" in model_names
                or name == HEAD and tied)

    tensors = checkpoint.tensors
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected and not is_known(name)]
    misshapen = [f"{name!r} in {tensors[name].file.name}: {tensors[name].shape}, expected {shape}"
                 for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    problems = [f"{len(missing)} tensors are missing: {first_few(missing)}"] if missing else []
    problems += [f"{len(unexpected)} tensors are unexpected: {first_few(unexpected)}"] if unexpected else []
    problems += [f"{len(misshapen)} tensors have another shape: {'; '.join(misshapen[:8])}"] if misshapen else []
    if problems:
        raise CheckpointError(f"{checkpoint.path}: {'. '.join(problems)}. Do config.json and the weights belong "
                              "together, and is the download complete?")


def _check_tied(checkpoint: Checkpoint) -> None:
    """Raises if the head differs from the embedding, since a tied model would silently compute without that head."""
    head, embedding = checkpoint.tensors[HEAD], checkpoint.tensors[EMBEDDING]
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    for start in range(0, head.shape[0] if same else 0, 2048):
        stop = min(start + 2048, head.shape[0])
        same = same and torch.equal(checkpoint.read_rows(HEAD, start, stop),
                                    checkpoint.read_rows(EMBEDDING, start, stop))
    if not same:
        raise CheckpointError(f"{head.file}: tensor {head.name!r} differs from {embedding.name!r}, but the model ties "
                              "them: set tie_word_embeddings to false in config.json")


def _weight_pieces(checkpoint: Checkpoint, weight: Weight, slice_bytes: int, tied: bool) -> Iterator[_Piece]:
    (name, shape), = _sources(checkpoint, weight, tied).items()
    info, dtype = checkpoint.tensors[name], READ_AS[checkpoint.tensors[name].dtype]
    num_rows, rest = (shape[0], shape[1:]) if shape else (1, ())
    step = max(slice_bytes // max(math.prod(rest) * dtype.itemsize, 1), 1)
    if step > ROWS_MULTIPLE:
        step -= step % ROWS_MULTIPLE
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start)
        offset = (info.end - info.start) // num_rows * start
        yield _Piece(partial(weight.put, start), (_Output(dtype, (count, *rest), ((name, start, count),)),),
                     (info.file, info.start + offset))


def _expert_pieces(checkpoint: Checkpoint, experts: Experts) -> Iterator[_Piece]:
    D, I = experts.hidden, experts.intermediate  # noqa: E741
    for e in range(experts.num_experts):
        if _is_fused(checkpoint, experts):
            gate_up = [(f"{experts.name}.gate_up_proj", e, 1)]
            down = [(f"{experts.name}.down_proj", e, 1)]
        else:
            gate_up = [(f"{experts.name}.{e}.{projection}_proj.weight", 0, I) for projection in ("gate", "up")]
            down = [(f"{experts.name}.{e}.down_proj.weight", 0, D)]
        infos = [checkpoint.tensors[name] for name, _, _ in gate_up + down]
        dtypes = [READ_AS[info.dtype] for info in infos]
        if len(set(dtypes)) > 1:
            raise CheckpointError(f"{infos[0].file}: {infos[0].name!r} is {infos[0].dtype}, the other projections of "
                                  f"that expert are {', '.join(info.dtype for info in infos[1:])}, expected one dtype")
        position = min((info.file, info.start + (info.end - info.start) // info.shape[0] * first)
                       for info, (_, first, _) in zip(infos, gate_up + down))
        yield _Piece(partial(experts.put, e), (_Output(dtypes[0], (2 * I, D), tuple(gate_up)),
                                               _Output(dtypes[0], (D, I), tuple(down))), position)


def _batches(pieces: list[_Piece], slice_bytes: int) -> Iterator[list[tuple[int, _Piece]]]:
    """Neighbouring pieces that fit one buffer together, each with its offset in the buffer."""
    batch: list[tuple[int, _Piece]] = []
    offset = 0
    for piece in pieces:
        if batch and offset + piece.num_bytes > slice_bytes:
            yield batch
            batch, offset = [], 0
        batch.append((offset, piece))
        offset += piece.num_bytes
    if batch:
        yield batch


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _map(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
