"""Greedy decoding with the model as it trains: quantized base, adapters on or off.
Keeps keys and values of one conversation. Dequantizes the base for every token, unless in `quant.kept_dequantized`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from model.delta_rule import reference_on_cpu
from model.mixers import PACKED
from model.stages import Stage

SDPA = "sdpa"  # training's packed attention cannot use a cache of keys and values


@torch.no_grad()
def generate(stage: Stage, prompt_T: Tensor, max_tokens: int, stop_id: int) -> list[int]:
    """The token ids that the model writes after a prompt, always the likeliest, up to but without the stop token.

    Args:
        stage: a stage that holds the whole model.
        prompt_T: token ids of the prompt.
    """
    model: Any = stage.model
    logging.getLogger("transformers").setLevel(logging.ERROR)  # no warning of unused sampling flags
    was_training = stage.training
    stage.eval()
    model.set_attn_implementation(SDPA)
    try:
        device = next(stage.parameters()).device
        with reference_on_cpu(model):
            output_1T = model.generate(
                prompt_T[None].to(device), attention_mask=torch.ones(1, len(prompt_T), dtype=torch.int64, device=device),
                max_new_tokens=max_tokens, do_sample=False, eos_token_id=stop_id, pad_token_id=stop_id,
            )
    finally:
        model.set_attn_implementation(PACKED)
        stage.train(was_training)
    written = output_1T[0, len(prompt_T) :].tolist()
    return written[: written.index(stop_id)] if stop_id in written else written
