"""Adds a trained adapter to the weights of its base model, streamed slice by slice into new safetensors files.
Costs a few slices of the checkpoint, for each thread one matrix in float32, and what they need of the adapter."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.build import build_empty
from model.config import LoraConfig
from model.lora import to_peft_name
from model.moe.expert_weights import MATRICES
from model.moe.experts import Adapter, FrozenExperts
from model.quant import FrozenLinear
from model.stages import Stage
from model.weights.checkpoint_files import FP8, IGNORED, READ_AS, Checkpoint, json_file
from model.weights.shards import EXPERT_TENSOR, HEAD, Experts, Weight, stream, wanted_bytes
from model.weights.writer import INDEX, ShardWriter, as_json

# R rows of a matrix, O output features, I input features or intermediate size, D hidden size, K rank

SHARD_BYTES = 5 * 10**9
MOST_THREADS = 4  # each holds a matrix of up to 0.2 GB
CODES = {dtype: code for code, dtype in READ_AS.items() if code != FP8}  # dtypes as a header spells them
SETTINGS = (".json", ".jinja", ".txt")
# written anew, true of the base's own files only, or written by whoever knows how training rendered a prompt
NOT_COPIED = ("config.json", "manifest.json", INDEX, "chat_template.json", "chat_template.jinja")


class AdapterFile(Mapping[str, Tensor]):
    """The tensors of an adapter's file, each mapped into memory only while it is used: with experts they are gigabytes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with safe_open(file, "pt") as opened:
            self.names = list(opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def merge(model_dir: Path, out: Path, adapter: Mapping[str, Tensor], lora: LoraConfig, *, as_trained: str | None,
          dtype: torch.dtype, progress: Callable[[int, int], object] | None = None) -> None:
    """Writes the model with W + alpha / rank * B A in place of each adapted W, computed in float32 and rounded once.

    The tensors keep the base's layout, names and order. What is not adapted is copied byte for byte, in its own dtype:
    embeddings, norms, gates, `model.visual.*`, `mtp.*`. Only FP8 becomes bf16. config.json names `dtype`: loaders convert
    tensors of another dtype to it, as training did.

    Args:
        out: an existing, empty directory. It gets shards of at most 5 GB, their index where there are several, config.json
            and the base's other settings; who makes the directory appear syncs them.
        adapter: by peft's names; an `AdapterFile` where it is large.
        as_trained: None to merge into W as published, or a key of `quant.LINEARS`: to merge into what W dequantizes to (here,
            on the CPU) in a model with that base. All linears and experts are then dequantized, adapted or not.
        dtype: of the merged or dequantized tensors: torch.bfloat16, or torch.float32 for comparisons.
        progress: called after each slice with the bytes of this slice and the bytes of all slices.

    Raises:
        ValueError: the adapter does not fit the model, the base cannot be read (CheckpointError) or a file not be written.
    """
    checkpoint = Checkpoint(model_dir, whole=True)
    stage, weights = build_empty(model_dir, as_trained or "bf16", lora, seed=0, device=torch.device("meta"), recompute=False)
    check_adapter(adapter, {to_peft_name(name): tuple(p.shape) for name, p in stage.adapters().items()})
    try:
        merging = Merging(checkpoint, out, stage, adapter, lora.alpha / lora.rank, as_trained, dtype)
        wanted = [merging.takes(item) for item in weights.wanted if item.name != HEAD or not weights.tied]
        wanted += [Weight(name, info.shape, partial(merging.put_rows, name)) for name, info in checkpoint.tensors.items()
                   if IGNORED.match(name) or name == HEAD and weights.tied]  # what training does not build
        total = wanted_bytes(checkpoint, wanted)
        with merging.threads():
            stream(checkpoint, wanted, tied=weights.tied,
                   progress=(lambda num_bytes: progress(num_bytes, total)) if progress else None)
        write_settings(model_dir, out, dtype)
    except OSError as error:  # a full disk names no file
        raise ValueError(f"{out}: could not be written ({error})") from error


def merged_bytes(model_dir: Path, dtype: torch.dtype) -> int:
    """The most bytes of weights that `merge` may write; fewer where not everything is adapted and `dtype` is the larger."""
    return sum(math.prod(info.shape) * max(READ_AS[info.dtype].itemsize, dtype.itemsize)
               for info in Checkpoint(model_dir, whole=True).tensors.values())


def check_adapter(adapter: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises:
        ValueError: a tensor has no place in the model or another shape, or one is missing.
    """
    found = {name: tuple(adapter[name].shape) for name in adapter}
    wrong = [f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
             for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(f"the adapter does not fit the model in {len(wrong)} tensors: {'; '.join(wrong[:8])}. Was it trained "
                         "on this model, and with these settings of lora?")


class Merging:
    """Takes the slices of the base in the order in which they are read; threads of its own merge and write them."""

    def __init__(self, checkpoint: Checkpoint, out: Path, stage: Stage, adapter: Mapping[str, Tensor], scaling: float,
                 as_trained: str | None, dtype: torch.dtype) -> None:
        self.checkpoint, self.scaling, self.as_trained = checkpoint, scaling, as_trained
        self.adapter, self.tensor = set(adapter), lru_cache(maxsize=8)(adapter.__getitem__)
        self.compute_dtype = stage.model.dtype
        # an adapter holds what it is added to as its `base`
        self.changed = {name.removesuffix(".base") for name, module in stage.model.named_modules()
                        if isinstance(module, (FrozenLinear, FrozenExperts)) and (as_trained or name.endswith(".base"))}
        self.dtypes = {name: dtype if module_of(name) in self.changed else READ_AS[info.dtype]
                       for name, info in checkpoint.tensors.items()}
        self.writer = ShardWriter(out, [(info.name, CODES[self.dtypes[name]], info.shape)
                                        for name, info in checkpoint.tensors.items()], SHARD_BYTES)
        self.rows: list[Tensor] = []  # of the linear that is being read, where it is quantized as a whole
        self.running: deque[Future[None]] = deque()

    # Read

    def takes(self, item: Weight | Experts) -> Weight | Experts:
        """The same tensors, put here."""
        if isinstance(item, Experts):
            return replace(item, put=partial(self.put_expert, item))
        return replace(item, put=partial(self.put_rows, item.name))

    # Copies are put aside, since the loader maps new memory in place of a buffer of which a part is kept: that takes longer.

    def put_expert(self, experts: Experts, e: int, gate_up_2ID: Tensor, down_DI: Tensor) -> None:
        self.submit(self.merge_expert, experts, e, gate_up_2ID.clone(), down_DI.clone())

    def put_rows(self, name: str, start: int, rows: Tensor) -> None:
        self.rows.append(rows.clone())
        if (self.as_trained is None or module_of(name) not in self.changed
                or start + len(rows) == self.checkpoint.tensors[name].shape[0]):
            self.submit(self.merge_rows, name, start + len(rows) - sum(map(len, self.rows)), self.rows)
            self.rows = []

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        self.running.append(self.pool.submit(work, *arguments))
        if len(self.running) > self.num_threads:  # so that no more than one slice waits
            self.running.popleft().result()

    @contextmanager
    def threads(self) -> Iterator[None]:
        """While the context lasts there are threads, and torch uses no others."""
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.num_threads = min(torch_threads, MOST_THREADS)
        self.pool = ThreadPoolExecutor(self.num_threads)
        try:
            yield
            for future in self.running:
                future.result()
        finally:
            self.pool.shutdown(cancel_futures=True)
            torch.set_num_threads(torch_threads)

    # Merged

    def merge_rows(self, name: str, start: int, rows: list[Tensor]) -> None:
        merged = rows[0] if len(rows) == 1 else torch.cat(rows)
        if module_of(name) in self.changed:
            merged = self.merged(module_of(name), merged, start)
        self.write(name, start, merged)

    def merge_expert(self, experts: Experts, e: int, gate_up_2ID: Tensor, down_DI: Tensor) -> None:
        # in peft's names the adapter of gate_up_proj belongs to a base_layer, see moe/experts.py
        for parts, module, matrix_OI in ((("gate", "up"), f"{experts.name}.base_layer", gate_up_2ID),
                                         (("down",), experts.name, down_DI)):
            if experts.name in self.changed:
                matrix_OI = self.merged(module, matrix_OI, expert=e, num_experts=experts.num_experts)
            fused = f"{experts.name}.{'_'.join(parts)}_proj"
            if fused in self.dtypes:
                self.write(fused, e, matrix_OI[None])
                continue
            for part, rows_RI in zip(parts, matrix_OI.chunk(len(parts))):
                self.write(f"{experts.name}.{e}.{part}_proj.weight", 0, rows_RI)

    def merged(self, module: str, rows_RI: Tensor, start: int = 0, expert: int = 0, num_experts: int = 1) -> Tensor:
        """Rows `start` and on of a matrix, as training held them, plus what the adapter adds to them."""
        if self.as_trained is not None:
            frozen = MATRICES[self.as_trained]((1, *rows_RI.shape), self.compute_dtype, "cpu")
            frozen.put(0, rows_RI)
            rows_RI = frozen.dequantize(0, 1)[0]
        names = [to_peft_name(f"{module}.lora_{factor}") for factor in "AB"]
        if names[0] not in self.adapter:
            return rows_RI
        a, b = (self.tensor(name).detach().float() for name in names)
        lora, group = Adapter(a, b, self.scaling, num_experts, with_grads=False), slice(expert, expert + 1)
        b_RK = lora.b_GOR(b, group)[0, start : start + len(rows_RI)]
        return rows_RI.float().addmm_(b_RK, lora.a_GRI(a, group)[0], alpha=self.scaling)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        info = self.checkpoint.tensors[name]
        self.writer.write(info.name, start * (rows.numel() // len(rows)), rows.to(self.dtypes[name]))


def module_of(name: str) -> str:
    """The module of a linear's weight or of an expert's tensor."""
    experts = EXPERT_TENSOR.fullmatch(name)
    return experts[1] if experts else name.removesuffix(".weight")


def write_settings(model_dir: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes config.json for the merged weights, and copies the base's other settings and its license, but no code."""
    config = json_file(model_dir / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
            part["torch_dtype" if "torch_dtype" in part else "dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_bytes(as_json(config))
    for file in model_dir.iterdir():
        is_settings = file.suffix in SETTINGS and file.name not in NOT_COPIED
        if file.is_file() and (is_settings or file.name.startswith(("LICENSE", "NOTICE"))):
            (out / file.name).write_bytes(file.read_bytes())
