"""Greedy decoding with the model as it trains: quantized base, adapters on or off.
Keeps keys and values of one conversation, but of a model with a delta rule nothing. Dequantizes the base for every token,
unless in `quant.kept_dequantized`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from model.mixers import PACKED, Segments
from model.stages import Stage

SDPA = "sdpa"  # training's packed attention cannot use a cache of keys and values


@torch.no_grad()
def generate(stage: Stage, prompt_T: Tensor, max_tokens: int, stop_id: int) -> list[int]:
    """The token ids that the model writes after a prompt, always the likeliest, up to but without the stop token.

    Args:
        stage: a stage that holds the whole model.
        prompt_T: token ids of the prompt.
    """
    was_training, device = stage.training, next(stage.parameters()).device
    stage.eval()
    has_delta_rule = any(hasattr(layer, "linear_attn") for layer in stage.model.model.layers)
    try:
        return (again if has_delta_rule else with_cache)(stage, prompt_T.to(device), max_tokens, stop_id)
    finally:
        stage.train(was_training)


def again(stage: Stage, ids_T: Tensor, max_tokens: int, stop_id: int) -> list[int]:
    """Computes the whole text again for each token. Slow, but transformers would choose the delta rule's implementation by
    what is installed, even one that needs a GPU where there is none."""
    written: list[int] = []
    while len(written) < max_tokens:
        length = len(ids_T)
        segments = Segments(torch.tensor([0, length], dtype=torch.int32, device=ids_T.device), (length,))
        x_1TD = stage(ids_T[None], torch.arange(length, device=ids_T.device), segments)
        logits_V = stage.model.lm_head(stage.model.model.norm(x_1TD[0, -1]))
        if (chosen := int(logits_V.argmax())) == stop_id:
            break
        written.append(chosen)
        ids_T = torch.cat([ids_T, logits_V.argmax()[None]])
    return written


def with_cache(stage: Stage, prompt_T: Tensor, max_tokens: int, stop_id: int) -> list[int]:
    model: Any = stage.model
    logging.getLogger("transformers").setLevel(logging.ERROR)  # no warning of unused sampling flags
    model.set_attn_implementation(SDPA)
    try:
        output_1T = model.generate(
            prompt_T[None], attention_mask=torch.ones_like(prompt_T)[None], max_new_tokens=max_tokens, do_sample=False,
            eos_token_id=stop_id, pad_token_id=stop_id)
    finally:
        model.set_attn_implementation(PACKED)
    written = output_1T[0, len(prompt_T) :].tolist()
    return written[: written.index(stop_id)] if stop_id in written else written
