"""A stage: consecutive residual sublayers of one model on one device, which train alone or as part of a pipeline.
Keeps only each decoder layer's input (T x D) for the backward pass if it recomputes, else all activations."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.delta_rule import packed_delta_rule
from model.lora import adapter_parameters
from model.matmul import unread
from model.mixers import Segments
from model.ops.loss import supervised_losses

# T tokens of the packed stream, D hidden size, N supervised positions


class Stage(nn.Module):
    """Sublayers `first` to `stop` of a transformers causal language model, called one by one.

    A decoder layer is two residual sublayers, token mixer (2 * layer) and feed-forward (2 * layer + 1). The first stage
    embeds, the last one has the final norm and the head.

    Args:
        model: the text model, with the modules of this stage in place and the others' absent.
        first, stop: the stage's sublayers.
        recompute: free each decoder layer's activations after the forward pass and recompute them in the backward pass.
        keep_layers: how many of the last decoder layers do not recompute; the backward pass begins with these.
    """

    def __init__(self, model: Any, first: int, stop: int, recompute: bool, keep_layers: int = 0) -> None:
        super().__init__()
        self.model = model
        self.first, self.stop = first, stop
        self.recomputed = range(first // 2, (stop + 1) // 2 - keep_layers if recompute else 0)  # decoder layers
        self.is_first = first == 0
        self.is_last = stop == 2 * model.config.num_hidden_layers
        self.has_dropout = any(getattr(module, "dropout", 0) for module in model.modules())

    def adapters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by their global names."""
        return adapter_parameters(self.model)

    def forward(self, x: Tensor, positions_T: Tensor, segments: Segments) -> Tensor:
        """Token ids [1, T] on the first stage, else hidden states [1, T, D]; returns hidden states [1, T, D]."""
        x_1TD, rotary = self.begin(x, positions_T)
        for number in range(self.first // 2, (self.stop + 1) // 2):
            x_1TD = self.run_layer(number, x_1TD, rotary, segments)
        return x_1TD

    def begin(self, x: Tensor, positions_T: Tensor) -> tuple[Tensor, Any]:
        """Hidden states [1, T, D] in front of the stage's first layer, and the rotary tables of all layers."""
        text_model = self.model.model
        x_1TD = text_model.embed_tokens(x) if self.is_first else x
        # a multimodal model takes three rows of positions (time, height, width), which are equal for text
        is_3d = hasattr(text_model.rotary_emb, "mrope_section")
        return x_1TD, text_model.rotary_emb(x_1TD, positions_T.expand(3, 1, -1) if is_3d else positions_T[None])

    def run_layer(self, number: int, x_1TD: Tensor, rotary: Any, segments: Segments) -> Tensor:
        """One decoder layer, or the sublayer of it that this stage holds; its activations are kept or recomputed."""
        layer, feed_forward = self.model.model.layers[number], 2 * number + 1 < self.stop
        run: Callable[..., Tensor] = partial(
            decoder_layer, layer, rotary=rotary, segments=segments, mixer=2 * number >= self.first, feed_forward=feed_forward)
        if number in self.recomputed and torch.is_grad_enabled():
            return checkpoint(run, x_1TD, use_reentrant=False, preserve_rng_state=self.has_dropout,
                              context_fn=lambda: (nullcontext(), unread(last_summand(layer, feed_forward))))
        return run(x_1TD)

    def losses(self, x_1TD: Tensor, predict_N: Tensor, labels_N: Tensor) -> Tensor:
        """On the last stage: the cross-entropy of each supervised position, [N] in float32. Norm and head skip all others."""
        h_ND = self.model.model.norm(x_1TD[0, predict_N])
        return supervised_losses(h_ND, self.model.lm_head.weight, labels_N)


def last_summand(layer: Any, feed_forward: bool) -> nn.Module:
    """The frozen module whose output goes straight into the layer's last addition, so that a recomputation need not have it.
    The shared expert's is none: its gate multiplies it, and autograd keeps both factors."""
    if not feed_forward:
        module = layer.linear_attn.out_proj if hasattr(layer, "linear_attn") else layer.self_attn.o_proj
    else:
        module = layer.mlp.experts if hasattr(layer.mlp, "experts") else layer.mlp.down_proj
    frozen: nn.Module = getattr(module, "base", module)  # without its adapter
    return frozen


def decoder_layer(
    layer: Any, x_1TD: Tensor, rotary: Any, segments: Segments, mixer: bool = True, feed_forward: bool = True
) -> Tensor:
    """One decoder layer, or only one of its two sublayers where a cut between stages separates them. A norm adds its sublayer's
    input to the stream in the same pass over memory."""
    h_1TD: Tensor | None = None
    if mixer:
        x_1TD, normed_1TD = layer.input_layernorm.of_sum(x_1TD, None)
        if hasattr(layer, "linear_attn"):
            h_1TD = packed_delta_rule(layer.linear_attn, normed_1TD, segments)
        else:
            h_1TD = layer.self_attn(normed_1TD, rotary, segments)
    if feed_forward:
        x_1TD, normed_1TD = layer.post_attention_layernorm.of_sum(x_1TD, h_1TD)
        h_1TD = layer.mlp(normed_1TD)
    assert h_1TD is not None, "a stage holds a sublayer of each of its layers"
    return x_1TD + h_1TD
