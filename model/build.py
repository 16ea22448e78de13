"""Builds the model of one rank: meta skeleton -> this stage's modules -> quantized shells -> stream weights -> adapters.
Peaks at the quantized model plus a few slices of it; nothing is materialized in full precision first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from model.delta_rule import use_reference_on_cpu
from model.experts import FrozenExperts
from model.fused import fuse
from model.lora import LoraConfig, add_adapters, check_targets
from model.mixers import PACKED
from model.quant import LINEARS, FrozenLinear
from model.shards import Checkpoint, Experts, Weight, stream, verify_manifest, wanted_bytes
from model.stages import Stage


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, and how they are stored while they train."""

    path: str  # a directory, or a repository on the Hugging Face hub
    base: Literal["int8", "nf4", "bf16", "float32"]  # storage of the frozen linears; float32 also computes in float32


SUPPORTED = ("llama", "qwen3", "qwen3_5_moe_text")  # model_type of the text model
NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads")  # in config.json
# linears with a handful of outputs, which gate what others compute: they stay as they are, and are not adapted
GATES = ("in_proj_a", "in_proj_b", "shared_expert_gate")
FEED_FORWARD = ("post_attention_layernorm", "mlp")  # of a layer's second sublayer; its other modules are the first's


@dataclass(frozen=True)
class Weights:
    """What a stage that was just built still lacks: its weights, and where they go."""

    wanted: list[Weight | Experts]
    all_names: set[str]  # of the whole model
    tied: bool

    def load(self, model_dir: Path, progress: Callable[[int, int], object] | None = None) -> None:
        """Streams them from the safetensors files.

        Args:
            progress: called with the bytes of each slice once it is read, and with the bytes of all of them.

        Raises:
            CheckpointError: a `ValueError`; the checkpoint does not fit its config.json.
        """
        checkpoint = Checkpoint(model_dir)
        verify_manifest(model_dir)  # where there is one: costs one more read of the files
        total = wanted_bytes(checkpoint, self.wanted)
        stream(
            checkpoint, self.wanted, all_names=self.all_names, tied=self.tied,
            progress=(lambda num_bytes: progress(num_bytes, total)) if progress else None,
        )


def build(
    model_dir: Path, base: str, lora: LoraConfig, *, seed: int, device: torch.device, recompute: bool,
    progress: Callable[[int, int], object] | None = None, first: int = 0, stop: int | None = None,
) -> Stage:
    """Builds and loads the model, or one stage of it: `build_empty`, then `Weights.load`."""
    stage, weights = build_empty(model_dir, base, lora, seed=seed, device=device, recompute=recompute, first=first, stop=stop)
    weights.load(model_dir, progress)
    return stage


def build_empty(
    model_dir: Path, base: str, lora: LoraConfig, *, seed: int, device: torch.device, recompute: bool,
    keep_layers: int = 0, first: int = 0, stop: int | None = None,
) -> tuple[Stage, Weights]:
    """Builds the model, or one stage of it, on one device, and says which weights it is to be given.

    Args:
        model_dir: config.json and safetensors files.
        base: a key of `quant.LINEARS`.
        seed: decides the adapters' first values.
        recompute, keep_layers: see stages.py.
        first, stop: the sublayers of the stage (see stages.py), all by default. Nothing else is built or read; where
            embedding and head are tied, and on different stages, each has its own.

    Raises:
        ValueError: an unsupported architecture, or an unknown LoRA target.
    """
    model = skeleton(model_dir, base)
    check_targets(lora, linear_names(model), has_experts=bool(expert_names(model)))
    all_names = {name for name, _ in model.named_parameters()}
    stop = 2 * model.config.num_hidden_layers if stop is None else stop
    if keep_layers > (stop + 1) // 2 - first // 2:
        raise ValueError(f"train.keep_layers is {keep_layers}, but the stage has {(stop + 1) // 2 - first // 2} layers")
    drop_others(model, first, stop)
    linears, experts = linear_names(model), expert_names(model)
    compute_dtype = model.dtype
    wanted: list[Weight | Experts] = [swap_experts(model, name, base, compute_dtype, device) for name in experts]
    for name in linears:
        wanted += swap_linear(model, name, base, compute_dtype, device)
    wanted += materialize_rest(model, device)
    add_adapters(model, lora, seed, device)
    fuse(model)
    if device.type == "cpu":
        use_reference_on_cpu(model)
    weights = Weights(wanted, all_names, model.config.tie_word_embeddings)
    return Stage(model, first, stop, recompute, keep_layers).train(), weights


def skeleton(model_dir: Path, base: str) -> Any:
    """The transformers text model on the meta device: all modules, no memory.

    Raises:
        ValueError: config.json is missing or names an architecture that is not supported.
    """
    config = text_config(model_dir)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=PACKED, dtype=torch.float32 if base == "float32" else torch.bfloat16
        )


def text_config(model_dir: Path) -> Any:
    """The text model's configuration, from a directory or from the file itself.

    Raises:
        ValueError: as `skeleton`.
    """
    file = model_dir / "config.json" if model_dir.suffix != ".json" else model_dir
    if not file.is_file():
        raise ValueError(f"{model_dir}/config.json: not found. Expected a directory with config.json and *.safetensors files")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    text = found.get("text_config", found) if isinstance(found, dict) else {}
    missing = [key for key in ("model_type", *NEEDED) if key not in text]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing. Expected the config.json of a Hugging Face model")
    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True).get_text_config()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: transformers cannot read it: {str(error).splitlines()[0]}") from None
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{model_dir}/config.json: model_type {config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}"
        )
    return config


def linear_names(model: Any) -> list[str]:
    """The linears that are quantized, and adapted where they are targets."""
    return [name for name, module in model.model.named_modules(prefix="model")
            if isinstance(module, nn.Linear) and not name.endswith(GATES)]


def expert_names(model: Any) -> list[str]:
    """The modules that hold the routed experts of a layer."""
    return [name for name, _ in model.model.named_modules(prefix="model") if name.endswith(".mlp.experts")]


def drop_others(model: Any, first: int, stop: int) -> None:
    """Removes all modules but those of sublayers `first` to `stop`; the others keep their names."""
    for number, layer in enumerate(model.model.layers):
        for name, _ in list(layer.named_children()):
            if not first <= 2 * number + (name in FEED_FORWARD) < stop:
                delattr(layer, name)
    if first > 0:
        del model.model.embed_tokens
    if stop < 2 * model.config.num_hidden_layers:
        del model.model.norm, model.lm_head


def swap_linear(model: nn.Module, name: str, base: str, dtype: torch.dtype, device: torch.device) -> list[Weight]:
    """Replaces one `nn.Linear` by an empty frozen one, and says where its tensors go."""
    parent, _, last = name.rpartition(".")
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new: FrozenLinear = LINEARS[base](old.in_features, old.out_features, dtype, device)
    setattr(model.get_submodule(parent), last, new)
    weights = [Weight(f"{name}.weight", (old.out_features, old.in_features), new.put)]
    if old.bias is not None:
        new.bias = torch.empty(old.out_features, dtype=dtype, device=device)
        weights.append(Weight(f"{name}.bias", (old.out_features,), partial(copy_rows, new.bias)))
    return weights


def swap_experts(model: Any, name: str, base: str, dtype: torch.dtype, device: torch.device) -> Experts:
    """Replaces the routed experts of one layer by empty frozen ones, and says where their tensors go."""
    config = model.config
    if config.hidden_act != "silu":
        raise ValueError(f"config.json: hidden_act is {config.hidden_act!r}, expected 'silu' for routed experts")
    parent, _, last = name.rpartition(".")
    sizes = (config.num_experts, config.hidden_size, config.moe_intermediate_size)
    new = FrozenExperts(*sizes, base, dtype, device)
    setattr(model.get_submodule(parent), last, new)
    return Experts(name, *sizes, new.put)


def materialize_rest(model: Any, device: torch.device) -> list[Weight]:
    """Gives every remaining parameter its memory, frozen: embeddings, norms, gates, head; tied ones stay one tensor."""
    wanted = []
    tied = model.config.tie_word_embeddings
    for name, parameter in list(model.named_parameters()):
        empty = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, empty)
        wanted.append(Weight(name, tuple(empty.shape), partial(copy_rows, empty.data)))
    if tied and hasattr(model, "lm_head") and hasattr(model.model, "embed_tokens"):
        model.lm_head.weight = model.model.embed_tokens.weight
    # rotary tables are computed, not loaded
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return wanted


def copy_rows(parameter: Tensor, start: int, rows: Tensor) -> None:
    parameter[start : start + len(rows)] = rows
