"""The architectures of `model.tiny`: the published configs at any scale, and the tensors of their checkpoints.
Costs a few hundred bytes a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint and the distribution of its weights."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    dtype: str = "BF16"
    is_linear: bool = False  # stored in FP8 in the fp8 layout
    # Names of a fused tensor's matrices: each is drawn separately, so that every layout holds the same weights.
    matrices: tuple[str, ...] = field(default=())


def text_config(kind: str, scale: float, num_tokens: int) -> dict[str, Any]:
    """The published config of the text model at `scale`; below scale 1 the vocabulary is only the tokenizer's."""
    def scaled(value: int, multiple: int, least: int = 0) -> int:
        if scale == 1:
            return value
        if multiple >= 32 and value * scale > 128:
            multiple = 128  # transformers reads FP8 in whole blocks only
        return max(round(value * scale / multiple) * multiple, multiple, least)

    true_vocab_size = {"qwen3_5_moe": 248_320, "qwen3_moe": 151_936, "qwen3": 151_936, "llama": 49_152}[kind]
    vocab_size = max(-(-num_tokens // 64) * 64, true_vocab_size if scale == 1 else 0)
    common = {"vocab_size": vocab_size, "hidden_act": "silu", "initializer_range": 0.02, "attention_bias": False,
              "attention_dropout": 0.0, "use_cache": True, "dtype": "bfloat16"}
    if kind == "llama":  # SmolLM2-135M-Instruct
        num_heads, num_kv_heads = (9, 3) if scale == 1 else (4, 2)
        hidden = scaled(576, 64)
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common, "hidden_size": hidden,
                "num_hidden_layers": 30 if scale == 1 else 4, "intermediate_size": scaled(1536, 64, 128),
                "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads,
                "head_dim": hidden // num_heads, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
                "mlp_bias": False, "rope_theta": 100_000.0, "tie_word_embeddings": True}
    if kind == "qwen3":  # Qwen3-4B
        num_kv_heads = scaled(8, 1, 2)
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **common, "hidden_size": scaled(2560, 64),
                "num_hidden_layers": 36, "intermediate_size": scaled(9728, 64, 128),
                "num_attention_heads": 4 * num_kv_heads, "num_key_value_heads": num_kv_heads,
                "head_dim": scaled(128, 16), "max_position_embeddings": 262_144, "rms_norm_eps": 1e-6,
                "rope_theta": 5_000_000.0, "tie_word_embeddings": True}
    if kind == "qwen3_moe":  # Qwen3-30B-A3B
        num_experts = scaled(128, 4, 8)
        return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **common, "hidden_size": scaled(2048, 64),
                "num_hidden_layers": 48, "intermediate_size": scaled(6144, 64), "num_attention_heads": scaled(32, 2, 4),
                "num_key_value_heads": scaled(4, 1, 2), "head_dim": scaled(128, 16), "num_experts": num_experts,
                "num_experts_per_tok": min(8, num_experts // 4), "moe_intermediate_size": scaled(768, 32),
                "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001,
                "max_position_embeddings": 262_144, "rms_norm_eps": 1e-6, "rope_theta": 10_000_000.0,
                "tie_word_embeddings": False}
    num_experts, head_dim, num_key_heads = scaled(256, 4, 8), scaled(256, 32), scaled(16, 1, 2)
    num_frequencies = head_dim // 8  # a quarter of the head rotates, two dimensions a frequency
    return {
        "model_type": "qwen3_5_moe_text", **common, "hidden_size": scaled(2048, 64), "num_hidden_layers": 40,
        "full_attention_interval": 4, "layer_types": [], "attn_output_gate": True, "head_dim": head_dim,
        "num_attention_heads": scaled(16, 2, 4), "num_key_value_heads": 2, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": scaled(128, 16), "linear_value_head_dim": scaled(128, 16),
        "linear_num_key_heads": num_key_heads, "linear_num_value_heads": 2 * num_key_heads,
        "num_experts": num_experts, "num_experts_per_tok": min(8, num_experts // 4),
        "moe_intermediate_size": scaled(512, 32), "shared_expert_intermediate_size": scaled(512, 32),
        "router_aux_loss_coef": 0.001, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1,
        "max_position_embeddings": 262_144, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
                            "mrope_interleaved": True,
                            "mrope_section": [(num_frequencies + 2 - i) // 3 for i in range(3)]}}


def wrapped_config(text: dict[str, Any]) -> dict[str, Any]:
    """The config as published: that of the multimodal model, around that of the text model."""
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
        "tie_word_embeddings": text["tie_word_embeddings"], "text_config": text,
        "vision_config": {"model_type": "qwen3_5_moe", "depth": 1, "hidden_size": 32, "intermediate_size": 64,
                          "num_heads": 2, "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2,
                          "spatial_merge_size": 2, "num_position_embeddings": 16,
                          "out_hidden_size": text["hidden_size"], "hidden_act": "gelu_pytorch_tanh"},
        "image_token_id": 0, "video_token_id": 0, "vision_start_token_id": 0, "vision_end_token_id": 0}


def checkpoint_tensors(kind: str, text: dict[str, Any], is_fused: bool) -> Iterator[Stored]:
    """The tensors in the order of the model, with the names of the published checkpoint."""
    is_hybrid, is_moe = kind == "qwen3_5_moe", "num_experts" in text
    prefix = "model.language_model" if is_hybrid else "model"
    hidden = text["hidden_size"]
    norm = partial(_norm, mean=0.0 if is_hybrid else 1.0)  # Qwen3.5 multiplies by 1 + weight
    yield Stored(f"{prefix}.embed_tokens.weight", (text["vocab_size"], hidden), hidden**-0.5)
    for layer in range(text["num_hidden_layers"]):
        name = f"{prefix}.layers.{layer}"
        yield norm(f"{name}.input_layernorm.weight", hidden)
        if is_hybrid and text["layer_types"][layer] == "linear_attention":
            yield from _delta_rule(f"{name}.linear_attn", text)
        else:
            yield from _attention(f"{name}.self_attn", text, norm, is_gated=is_hybrid, has_norms=kind != "llama")
        yield norm(f"{name}.post_attention_layernorm.weight", hidden)
        if is_moe:
            yield from _experts(f"{name}.mlp", text, is_fused)
        else:
            yield from _mlp(f"{name}.mlp", hidden, text["intermediate_size"])
    yield norm(f"{prefix}.norm.weight", hidden)
    if not text["tie_word_embeddings"]:
        yield Stored("lm_head.weight", (text["vocab_size"], hidden), hidden**-0.5)
    if is_hybrid:  # training on text must ignore these: some tensors of the vision tower and of the extra prediction head
        yield Stored("model.visual.patch_embed.proj.weight", (32, 3, 2, 16, 16), 0.02)
        yield Stored("model.visual.patch_embed.proj.bias", (32,), 0.02)
        yield Stored("model.visual.blocks.0.attn.qkv.weight", (96, 32), 0.02)
        yield Stored("mtp.fc.weight", (hidden, 2 * hidden), 0.02)
        yield norm("mtp.norm.weight", hidden)
        yield from _mlp("mtp.layers.0.mlp.shared_expert", hidden, text["shared_expert_intermediate_size"])


def _norm(name: str, size: int, mean: float, dtype: str = "BF16") -> Stored:
    return Stored(name, (size,), 0.05, mean, dtype)


def _linear(name: str, num_out: int, num_in: int, is_linear: bool = True) -> Stored:
    return Stored(f"{name}.weight", (num_out, num_in), num_in**-0.5, is_linear=is_linear)


def _attention(name: str, text: dict[str, Any], norm: partial[Stored], is_gated: bool,
               has_norms: bool) -> Iterator[Stored]:
    hidden, head_dim = text["hidden_size"], text["head_dim"]
    num_q, num_kv = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    yield _linear(f"{name}.q_proj", 2 * num_q if is_gated else num_q, hidden)
    yield _linear(f"{name}.k_proj", num_kv, hidden)
    yield _linear(f"{name}.v_proj", num_kv, hidden)
    yield _linear(f"{name}.o_proj", hidden, num_q)
    if has_norms:
        yield norm(f"{name}.q_norm.weight", head_dim)
        yield norm(f"{name}.k_norm.weight", head_dim)


def _delta_rule(name: str, text: dict[str, Any]) -> Iterator[Stored]:
    hidden, num_heads, value_dim = text["hidden_size"], text["linear_num_value_heads"], text["linear_value_head_dim"]
    num_v = num_heads * value_dim
    num_qkv = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + num_v
    kernel = text["linear_conv_kernel_dim"]
    # Decays of about e^-0.1 a token: some heads remember a whole row, others a word.
    yield Stored(f"{name}.A_log", (num_heads,), 1.0, dtype="F32")
    yield Stored(f"{name}.dt_bias", (num_heads,), 1.0, mean=-2.0)
    yield Stored(f"{name}.conv1d.weight", (num_qkv, 1, kernel), kernel**-0.5)
    yield _linear(f"{name}.in_proj_qkv", num_qkv, hidden)
    yield _linear(f"{name}.in_proj_z", num_v, hidden)
    yield _linear(f"{name}.in_proj_b", num_heads, hidden, is_linear=False)
    yield _linear(f"{name}.in_proj_a", num_heads, hidden, is_linear=False)
    yield _norm(f"{name}.norm.weight", value_dim, mean=1.0, dtype="F32")
    yield _linear(f"{name}.out_proj", hidden, num_v)


def _mlp(name: str, hidden: int, intermediate: int) -> Iterator[Stored]:
    yield _linear(f"{name}.gate_proj", intermediate, hidden)
    yield _linear(f"{name}.up_proj", intermediate, hidden)
    yield _linear(f"{name}.down_proj", hidden, intermediate)


def _experts(name: str, text: dict[str, Any], is_fused: bool) -> Iterator[Stored]:
    hidden, intermediate, num_experts = text["hidden_size"], text["moe_intermediate_size"], text["num_experts"]
    yield _linear(f"{name}.gate", num_experts, hidden, is_linear=False)
    if is_fused:
        experts = [f"{name}.experts.{e}" for e in range(num_experts)]
        yield Stored(f"{name}.experts.gate_up_proj", (num_experts, 2 * intermediate, hidden), hidden**-0.5,
                     matrices=tuple(f"{e}.{projection}_proj.weight" for e in experts for projection in ("gate", "up")))
        yield Stored(f"{name}.experts.down_proj", (num_experts, hidden, intermediate), intermediate**-0.5,
                     matrices=tuple(f"{e}.down_proj.weight" for e in experts))
    else:
        for e in range(num_experts):
            yield from _mlp(f"{name}.experts.{e}", hidden, intermediate)
    if "shared_expert_intermediate_size" in text:
        yield from _mlp(f"{name}.shared_expert", hidden, text["shared_expert_intermediate_size"])
        yield _linear(f"{name}.shared_expert_gate", 1, hidden, is_linear=False)
