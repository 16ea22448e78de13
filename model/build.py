"""Builds one rank's model: meta skeleton -> its stage's modules -> empty quantized modules -> adapters -> streamed weights.
Peaks at the quantized model plus a few slices of the checkpoint; the model never exists in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from model.architectures import LINEARS as SUPPORTED
from model.architectures import read_config
from model.config import LoraConfig, check_keep_layers, check_targets
from model.lora import add_adapters
from model.moe.experts import FrozenExperts
from model.ops.fused import fuse
from model.quant import LINEARS, FrozenLinear
from model.stages import Stage
from model.weights.identity import Checksums
from model.weights.shards import Checkpoint, Experts, Weight, stream, verify_manifest, wanted_bytes

# linears with one output, or one a head, that gate other modules: neither quantized nor adapted
GATES = ("in_proj_a", "in_proj_b", "shared_expert_gate")
FEED_FORWARD = ("post_attention_layernorm", "mlp")  # modules of a layer's second sublayer; all others belong to the first


@dataclass(frozen=True)
class Weights:
    """The weights that a newly built stage still has to load, and where each of them goes."""

    wanted: list[Weight | Experts]
    all_names: set[str]  # parameters of the whole model
    tied: bool  # whether head and embedding are the same tensor

    def load(self, model_dir: Path, progress: Callable[[int, int], object] | None = None) -> dict[str, int]:
        """Streams the weights from the safetensors files into the stage.

        Args:
            progress: called after each slice with the bytes of this slice and the bytes of all slices.

        Returns:
            the CRC-32 of each tensor of the checkpoint that was read, of its bytes as they are stored.

        Raises:
            CheckpointError: the checkpoint does not fit its config.json; a `ValueError`.
        """
        checkpoint = Checkpoint(model_dir)
        verify_manifest(model_dir)  # only if there is a manifest; reads the files once more
        checksums = Checksums(checkpoint)
        total = wanted_bytes(checkpoint, self.wanted)
        stream(
            checkpoint, self.wanted, all_names=self.all_names, tied=self.tied,
            progress=(lambda num_bytes: progress(num_bytes, total)) if progress else None,
        )
        return checksums.by_name()


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
    """Builds the model, or one stage of it, on one device; returns the stage and the weights it still has to load.

    Args:
        model_dir: config.json and safetensors files.
        base: a key of `quant.LINEARS`.
        seed: of the adapters' initial values.
        recompute, keep_layers: see stages.py.
        first, stop: the stage's sublayers (see stages.py), all by default. No other sublayer is built or read. If
            embedding and head are tied but on different stages, each stage has its own copy.

    Raises:
        ValueError: an unsupported architecture, an unknown LoRA target, or more keep_layers than the stage has layers.
    """
    model = skeleton(model_dir, base)
    check_targets(lora, linear_names(model), has_experts=bool(expert_names(model)))
    all_names = {name for name, _ in model.named_parameters()}
    stop = 2 * model.config.num_hidden_layers if stop is None else stop
    check_keep_layers(keep_layers, first, stop)
    drop_others(model, first, stop)
    linears, experts = linear_names(model), expert_names(model)
    compute_dtype = model.dtype
    wanted: list[Weight | Experts] = [swap_experts(model, name, base, compute_dtype, device) for name in experts]
    for name in linears:
        wanted += swap_linear(model, name, base, compute_dtype, device)
    wanted += materialize_rest(model, device)
    add_adapters(model, lora, seed, device)
    fuse(model)
    weights = Weights(wanted, all_names, model.config.tie_word_embeddings)
    return Stage(model, first, stop, recompute, keep_layers).train(), weights


def skeleton(model_dir: Path, base: str) -> Any:
    """The transformers text model on the meta device: all modules, no memory.

    Raises:
        ValueError: config.json is missing or names an architecture that is not supported.
    """
    config = text_config(model_dir)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32 if base == "float32" else torch.bfloat16, trust_remote_code=False)
    except Exception as error:  # an unknown hidden_act is a KeyError, an unknown rope_type an AttributeError, and so on
        raise ValueError(
            f"{config_file(model_dir)}: transformers cannot build the model: {one_line(error)}"
        ) from error


def text_config(model_dir: Path) -> Any:
    """The text model's configuration, from a model directory or from a config.json.

    Raises:
        ValueError: as in `skeleton`.
    """
    file = config_file(model_dir)
    read_config(file)
    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False).get_text_config()
    except Exception as error:  # those of transformers for a wrong value have no class in common
        raise ValueError(f"{file}: transformers cannot read it: {one_line(error)}") from error
    if config.model_type not in SUPPORTED:
        raise ValueError(f"{file}: model_type {config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}")
    return config


def config_file(model: Path) -> Path:
    """The config.json of a model directory; a file is one itself."""
    return model if model.suffix == ".json" else model / "config.json"


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def linear_names(model: Any) -> list[str]:
    """The names of all linears that are quantized; LoRA targets are chosen among them."""
    return [name for name, module in model.model.named_modules(prefix="model")
            if isinstance(module, nn.Linear) and not name.endswith(GATES)]


def expert_names(model: Any) -> list[str]:
    """The names of the modules that hold a layer's routed experts."""
    return [name for name, _ in model.model.named_modules(prefix="model") if name.endswith(".mlp.experts")]


def drop_others(model: Any, first: int, stop: int) -> None:
    """Removes the modules of all sublayers except `first` to `stop`; the remaining modules keep their names."""
    for number, layer in enumerate(model.model.layers):
        for name, _ in list(layer.named_children()):
            if not first <= 2 * number + (name in FEED_FORWARD) < stop:
                delattr(layer, name)
    if first > 0:
        del model.model.embed_tokens
    if stop < 2 * model.config.num_hidden_layers:
        del model.model.norm, model.lm_head


def swap_linear(model: nn.Module, name: str, base: str, dtype: torch.dtype, device: torch.device) -> list[Weight]:
    """Replaces one `nn.Linear` by an empty frozen one; returns the weights to load into it."""
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
    """Replaces the routed experts of one layer by empty frozen ones; returns the weights to load into them."""
    config = model.config
    if config.hidden_act != "silu":
        raise ValueError(f"config.json: hidden_act is {config.hidden_act!r}, expected 'silu' for routed experts")
    parent, _, last = name.rpartition(".")
    sizes = (config.num_experts, config.hidden_size, config.moe_intermediate_size)
    new = FrozenExperts(*sizes, base, dtype, device)
    setattr(model.get_submodule(parent), last, new)
    return Experts(name, *sizes, new.put)


def materialize_rest(model: Any, device: torch.device) -> list[Weight]:
    """Allocates all other parameters, frozen: embedding, norms, gates, head; tied embedding and head stay one tensor."""
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
