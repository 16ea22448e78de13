"""The sizes of a model that decide what a case of loop/paths.py computes, from the model's configuration in transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """The sizes of a case. Heads, experts and hidden sizes are those of a model; 0 where the model has no such thing."""

    tokens: int
    hidden: int
    vocabulary: int
    num_out: int  # rows of the largest linear
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    expert_size: int
    key_heads: int
    value_heads: int
    delta_size: int
    rotated: int  # of each head's numbers
    kind: str  # model_type in transformers
    base: str = "nf4"  # how experts are stored

    @classmethod
    def of(cls, model: Any, tokens: int, base: str = "nf4") -> Sizes:
        """The sizes of a text model, from its configuration in transformers."""
        def get(name: str) -> Any:
            return getattr(model, name, None) or 0

        head_size = get("head_dim") or model.hidden_size // model.num_attention_heads
        inner = get("intermediate_size") or get("shared_expert_intermediate_size") or model.hidden_size
        has_delta = "linear_attention" in (getattr(model, "layer_types", None) or ())
        delta: tuple[int, int, int] = (
            get("linear_num_key_heads"), get("linear_num_value_heads"), get("linear_key_head_dim")) if has_delta else (0, 0, 0)
        rotated = int(head_size * (get("rope_parameters") or {}).get("partial_rotary_factor", 1))
        return cls(tokens, model.hidden_size, model.vocab_size, inner, model.num_attention_heads, model.num_key_value_heads,
                   head_size, get("num_experts"), get("moe_intermediate_size"), *delta, rotated, model.model_type, base)

    def small(self, on_gpu: bool = False) -> Sizes:
        """A size that takes no time. On a GPU with all heads: a kernel is compiled and tuned for their number and size."""
        if on_gpu:
            return replace(self, tokens=2048, hidden=min(self.hidden, 1024), num_out=min(self.num_out, 2048),
                           experts=min(self.experts, 8))
        return Sizes(192, min(self.hidden, 256), min(self.vocabulary, 512), min(self.num_out, 512), min(self.heads, 4),
                     min(self.kv_heads, 2), self.head_size, min(self.experts, 4), min(self.expert_size, 128),
                     min(self.key_heads, 2), 2 * min(self.key_heads, 2) if self.value_heads else 0, self.delta_size,
                     self.rotated, self.kind, self.base)
