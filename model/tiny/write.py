"""Writes a random checkpoint of a real architecture, in a published layout, at any scale: for tests without real weights.
Costs one slice of 2 M weights, about 40 MB, for each writing thread, whatever the size of the model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.tiny.shapes import Stored, checkpoint_tensors, text_config, wrapped_config
from model.tiny.tokenizer import write_tokenizer
from model.weights.header import ITEM_BYTES
from model.weights.writer import ShardWriter, as_json

# R rows, C columns, B blocks

KINDS = ("qwen3_5_moe", "qwen3_moe", "qwen3", "llama")
LAYOUTS = ("fused", "per-expert", "fp8")
DEFAULT_SCALE = 1 / 32
SLICE_WEIGHTS = 2 * 2**20
SHARD_BYTES = 4 * 2**30
MIN_SHARDS = 4
FP8_BLOCK = 128
FP8_MAX = 448.0
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def write_tiny(out: str | Path, kind: str = "qwen3_5_moe", layout: str = "fused", scale: float = DEFAULT_SCALE,
               tokenizer: str | Path | None = None, seed: int = 0, **overrides: Any) -> Path:
    """Writes config, index, shards and tokenizer into `out`, which must not hold a checkpoint yet.

    Args:
        kind: a `model_type`; dense kinds have no experts, so "fused" and "per-expert" are the same for them.
        scale: fraction of the true widths and of the number of experts; 1 is the real model.
        tokenizer: a directory whose tokenizer is copied; by default one of 256 bytes and the ChatML tokens is written.
        overrides: fields of the text model's config, such as `num_hidden_layers=4, hidden_size=128`.

    The same seed gives the same weights in every layout, rounded to FP8 in fp8.
    """
    if kind not in KINDS or layout not in LAYOUTS or not 0 < scale <= 1:
        raise ValueError(f"kind {kind!r}, layout {layout!r}, scale {scale}; expected one of {', '.join(KINDS)}, one of "
                         f"{', '.join(LAYOUTS)} and 0 < scale <= 1")
    out = Path(out)
    if any(out.glob("*.safetensors*")):
        raise ValueError(f"{out}: holds a checkpoint already; choose another directory or delete it")
    out.mkdir(parents=True, exist_ok=True)
    num_tokens, stop_ids = write_tokenizer(out, kind, tokenizer)
    text = text_config(kind, scale, num_tokens)
    text["eos_token_id"] = stop_ids[0] if stop_ids else None
    unknown = overrides.keys() - text.keys()
    if unknown:
        raise ValueError(f"no such fields in the config of {kind}: {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(text)}")
    text.update(overrides)
    if kind == "qwen3_5_moe" and "layer_types" not in overrides:
        text["layer_types"] = ["linear_attention" if (layer + 1) % text["full_attention_interval"] else
                               "full_attention" for layer in range(text["num_hidden_layers"])]
    tensors = list(checkpoint_tensors(kind, text, is_fused=layout == "fused"))
    config = wrapped_config(text) if kind == "qwen3_5_moe" else text
    if layout == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": [tensor.name.removesuffix(".weight") for tensor in tensors
                                       if tensor.name.endswith(".weight") and not tensor.is_linear]}
    (out / "config.json").write_bytes(as_json(config))
    (out / "generation_config.json").write_bytes(as_json({
        "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": stop_ids,
        "pad_token_id": text["eos_token_id"]}))
    _write_shards(out, tensors, is_fp8=layout == "fp8", seed=seed)
    return out


def _write_shards(out: Path, tensors: list[Stored], is_fp8: bool, seed: int) -> None:
    """Writes all headers, then draws and writes the tensors, in as many threads as torch uses."""
    stored: list[tuple[str, str, tuple[int, ...]]] = []  # name, dtype, shape
    for tensor in tensors:
        if is_fp8 and tensor.is_linear:
            stored.append((tensor.name, "F8_E4M3", tensor.shape))
            stored.append((f"{tensor.name}_scale_inv", "BF16", tuple(-(-size // FP8_BLOCK) for size in tensor.shape)))
        else:
            stored.append((tensor.name, tensor.dtype, tensor.shape))
    total_bytes = sum(math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in stored)
    writer = ShardWriter(out, stored, min(SHARD_BYTES, -(-total_bytes // MIN_SHARDS)))
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            for _ in pool.map(partial(_write_tensor, writer=writer, is_fp8=is_fp8, seed=seed), tensors):
                pass
    finally:
        torch.set_num_threads(num_threads)  # else the initializer's 1 would hold for all later threads


def _write_tensor(tensor: Stored, writer: ShardWriter, is_fp8: bool, seed: int) -> None:
    names = [tensor.name, f"{tensor.name}_scale_inv"] if is_fp8 and tensor.is_linear else [tensor.name]
    written = [0] * len(names)
    for values in _slices(tensor, seed):
        parts = quantize_fp8(values) if len(names) == 2 else (values.to(DTYPES[tensor.dtype]),)
        for i, part in enumerate(parts):
            writer.write(names[i], written[i], part)
            written[i] += part.numel()


def _slices(tensor: Stored, seed: int) -> Iterator[Tensor]:
    """The weights, rounded to bf16, in 2-D slices of a multiple of 128 rows, each drawn with its own seed."""
    names = tensor.matrices or (tensor.name,)
    num_columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    num_rows = torch.Size(tensor.shape).numel() // num_columns // len(names)
    step = max(SLICE_WEIGHTS // num_columns // FP8_BLOCK, 1) * FP8_BLOCK
    for name in names:
        for start in range(0, num_rows, step):
            digest = hashlib.sha256(f"{seed} {name} {start}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            values = torch.randn(min(step, num_rows - start), num_columns, generator=generator)
            yield values.mul_(tensor.std).add_(tensor.mean).bfloat16()


def quantize_fp8(values_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (F8_E4M3) and scales (BF16), one for each 128 x 128 block; a weight is its code times its scale."""
    num_rows, num_columns = values_RC.shape
    padded = F.pad(values_RC.float(), (0, -num_columns % FP8_BLOCK, 0, -num_rows % FP8_BLOCK))
    blocks = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
    scale_BB = (blocks.abs().amax(dim=(1, 3)) / FP8_MAX).clamp_min(1e-12).bfloat16()
    codes = (blocks / scale_BB.float()[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:num_rows, :num_columns], scale_BB
