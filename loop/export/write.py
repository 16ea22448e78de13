"""Writes an adapter or a merged model, with tokenizer and template, into a directory that appears whole or not at all.
Costs the adapter in memory, or what model/merge.py costs."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Literal

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data.files import make_readable, partial_of, sync
from data.template import FILES, write_tokenizer
from loop.checkpoint import ADAPTER, ADAPTER_CONFIG, write_json
from loop.run import Trained
from model.config import base_name
from model.lora import PEFT_PREFIX, peft_config
from model.merge import AdapterFile, merge, merged_bytes
from model.weights.checkpoint_files import json_file

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
QUANTIZED = ("int8", "nf4")
SPARE_BYTES = 100 * 10**6  # for the tokenizer and the file system's own needs


@dataclass(frozen=True)
class Form:
    """What is exported."""

    kind: Literal["peft", "vllm", "merged"]  # an adapter for one of these loaders, or base and adapter in one
    base_weights: Literal["original", "as-trained"] = "original"  # merged into these as published, or as quantized for training
    dtype: Literal["bf16", "float32"] = "float32"  # of merged weights


@contextmanager
def appearing(out: Path, num_bytes: int) -> Iterator[Path]:
    """A directory to write into, which becomes `out` when the block has ended without an error. A process that is killed
    leaves it under its other name, and the next export to `out` removes it.

    Raises:
        ValueError: `out` exists, another process writes it, or fewer than `num_bytes` are free.
    """
    if out.exists():
        raise ValueError(f"{out}: is there already, and is not overwritten. Choose another directory")
    partial = partial_of(out)
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another process writes it. Wait for it, or choose another directory") from None
    try:
        for leftover in partial.iterdir():
            leftover.unlink()
        for leftover in out.parent.glob(f".{partial.name}-*"):  # what a killed proof had put on the disk
            shutil.rmtree(leftover)
        free = shutil.disk_usage(partial).free
        if free < num_bytes + SPARE_BYTES:
            raise ValueError(f"{out}: takes {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Make room, or choose a "
                             "directory on another disk")
        yield partial
        for file in sorted(partial.iterdir()):
            make_readable(file)
            sync(file)
        sync(partial)
        partial.rename(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def needed_bytes(trained: Trained, form: Form) -> int:
    return merged_bytes(trained.model_dir, DTYPES[form.dtype]) if form.kind == "merged" else trained.adapter.stat().st_size


def write(trained: Trained, form: Form, directory: Path) -> None:
    """Writes all but the proof into an empty directory."""
    if form.kind == "merged":
        write_merged(trained, form, directory)
    else:
        write_adapter(trained, form.kind == "vllm", directory)
    saved = [trained.path / name for name in FILES]
    if all(file.is_file() for file in saved):  # as they were in training, whatever the model's publisher has changed since
        for file in saved:
            shutil.copyfile(file, directory / file.name)
    else:
        write_tokenizer(trained.chat, directory)


def write_merged(trained: Trained, form: Form, directory: Path) -> None:
    base, lora = trained.config.model.base, trained.config.lora
    with tqdm(desc="merging", unit="B", unit_scale=True) as bar:

        def progress(num_bytes: int, total: int) -> None:
            bar.total = total
            bar.update(num_bytes)

        merge(trained.model_dir, directory, AdapterFile(trained.adapter), lora,
              as_trained=base if form.base_weights == "as-trained" and base in QUANTIZED else None,
              dtype=DTYPES[form.dtype], progress=progress)


def write_adapter(trained: Trained, for_vllm: bool, directory: Path) -> None:
    """Writes the adapter by the names that its loader looks for.

    transformers builds the text model alone, as training did: `model.layers`. vLLM builds what config.json names: the whole
    model with its vision tower, where the text model is `model.language_model`. Both take names they do not know for
    adapters of nothing, and say no word.

    Raises:
        ValueError: vLLM knows no adapter of routed experts in the text model alone.
    """
    lora, config = trained.config.lora, json_file(trained.model_dir / "config.json")
    model_type = config.get("text_config", config)["model_type"]
    write_json(directory / ADAPTER_CONFIG, peft_config(lora, base_name(trained.config.model.path), model_type))
    is_wrapped = any(name.endswith("ForConditionalGeneration") for name in config.get("architectures") or ())
    if not (for_vllm and is_wrapped):
        if for_vllm and lora.experts:
            raise ValueError(f"{trained.model_dir}: vLLM takes adapters of routed experts for a ...ForConditionalGeneration "
                             f"only, and config.json names {config.get('architectures')}. Take --format merged")
        shutil.copyfile(trained.adapter, directory / ADAPTER)
        return
    inner, outer = f"{PEFT_PREFIX}model.", f"{PEFT_PREFIX}model.language_model."
    tensors = {name.replace(inner, outer, 1): tensor for name, tensor in load_file(trained.adapter).items()}
    save_file(tensors, directory / ADAPTER, {"format": "pt"})
