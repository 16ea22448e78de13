"""Which models can be trained: their types, the linears of each, and the sizes that a config.json may have.
Imports no torch and reads only config.json, so that a model that cannot be trained is named at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
LINEARS = {  # by model_type of the text model: the last part of the names of all linears that are quantized
    "llama": ATTENTION + FEED_FORWARD,
    "qwen3": ATTENTION + FEED_FORWARD,
    "qwen3_moe": ATTENTION,
    "qwen3_5_moe_text": ATTENTION + ("in_proj_qkv", "in_proj_z", "out_proj") + FEED_FORWARD,
}
WITH_EXPERTS = ("qwen3_moe", "qwen3_5_moe_text")
NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads")
# the largest value of each size: several times that of any published model, and small enough to be counted without overflow
SIZES = {
    "hidden_size": 65_536, "num_hidden_layers": 1_000, "vocab_size": 4_000_000, "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024, "head_dim": 4_096, "intermediate_size": 1_000_000, "moe_intermediate_size": 1_000_000,
    "shared_expert_intermediate_size": 1_000_000, "num_experts": 4_096, "num_experts_per_tok": 4_096,
    "linear_conv_kernel_dim": 64, "linear_key_head_dim": 4_096, "linear_value_head_dim": 4_096,
    "linear_num_key_heads": 1_024, "linear_num_value_heads": 1_024, "max_position_embeddings": 1_000_000_000,
}
NUMBERS = {"rms_norm_eps": (1e-12, 1.0), "rope_theta": (1.0, 1e15)}
DIVIDES = (  # the first must be a multiple of the second
    ("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads"),
)
MOST_BYTES = 1_000_000  # of a config.json; published ones have some thousand


def read_config(file: Path) -> dict[str, Any]:
    """The text model's part of a config.json, of which everything that sizes depend on was checked.

    Raises:
        ValueError: the file is missing or no JSON, or describes a model that is not supported or cannot be.
    """
    if not file.is_file():  # nor is it a pipe, which would wait for a writer
        raise ValueError(f"{file}: not found. Expected a directory with config.json and *.safetensors files")
    try:
        with open(file, "rb") as opened:
            raw = opened.read(MOST_BYTES + 1)
        found = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        reason = f"over {MOST_BYTES:,} bytes" if isinstance(error, ValueError) and len(raw) > MOST_BYTES else error
        raise ValueError(f"{file}: not valid JSON ({reason}). Expected the config.json of a Hugging Face model") from None
    text = found.get("text_config", found) if isinstance(found, dict) else found
    if not isinstance(text, dict):
        raise ValueError(f"{file}: found a {type(text).__name__}, expected an object: the config.json of a Hugging Face model")
    missing = [key for key in ("model_type", *NEEDED) if key not in text]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing. Expected the config.json of a Hugging Face model")
    kind = str(text["model_type"])[:80]
    if kind not in LINEARS:
        raise ValueError(f"{file}: model_type {kind!r} is not supported; supported are {', '.join(LINEARS)}")
    check_sizes(file, text)
    if kind == "qwen3_moe" and (text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1):
        raise ValueError(f"{file}: mlp_only_layers or decoder_sparse_step makes some layers dense, expected experts in all")
    if kind in WITH_EXPERTS and text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: hidden_act is {str(text['hidden_act'])[:80]!r}, expected 'silu' for routed experts")
    return text


def check_sizes(file: Path, text: dict[str, Any]) -> None:
    """Raises:
        ValueError: a size is no number, is too small or too large, or does not fit another one.
    """
    for key, most in SIZES.items():
        value = text.get(key)
        if key not in text or value is None and key == "head_dim":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"{file}: {key} is {str(value)[:80]}, expected a whole number from 1 to {most:,}")
    rotary = text.get("rope_parameters")
    for part in (text, rotary if isinstance(rotary, dict) else {}):
        for key, (low, high) in NUMBERS.items():
            if key in part and (not isinstance(part[key], (int, float)) or not low <= part[key] <= high):
                raise ValueError(f"{file}: {key} is {str(part[key])[:80]}, expected a number from {low:g} to {high:g}")
    for key, divisor in DIVIDES:
        if text.get(key) and text.get(divisor) and text[key] % text[divisor]:
            raise ValueError(f"{file}: {key} is {text[key]}, expected a multiple of {divisor}, which is {text[divisor]}")
    if not text.get("head_dim") and text["hidden_size"] % text["num_attention_heads"]:
        raise ValueError(f"{file}: hidden_size is {text['hidden_size']}, expected a multiple of num_attention_heads, which is "
                         f"{text['num_attention_heads']}, where there is no head_dim")
    if text.get("num_experts_per_tok", 0) > text.get("num_experts", SIZES["num_experts"]):
        raise ValueError(f"{file}: num_experts_per_tok is {text['num_experts_per_tok']}, expected at most num_experts, "
                         f"which is {text['num_experts']}")
    layers = text.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or len(layers) != text["num_hidden_layers"]):
        found = len(layers) if isinstance(layers, list) else str(layers)[:80]
        raise ValueError(f"{file}: layer_types has {found} entries, expected num_hidden_layers, {text['num_hidden_layers']}")
