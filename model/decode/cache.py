"""What a decoder keeps of each row from token to token: keys and values of attention, and the delta rule's states.
Costs 2 x G x E numbers a position and attention layer, for all rows as many positions as the longest has, and H x K x V
float32 numbers a row and delta-rule layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.delta_rule import rule_with_states
from model.mixers import Segments, stream_attention
from model.ops.gated_delta_step import convolution_step, gated_delta_step

# B rows that are being written, S slots of the cache, L positions; H query or value heads, G key/value heads, R query heads a
# key/value head, E head size; C channels of the delta rule's convolution, W its width, K and V sizes of its keys and values

BLOCK = 128  # positions by which the cache grows
SPAN = 16  # attention reads a multiple of this many positions


class Cache:
    """Slots for rows. The rows that are being written are in the first slots, without a gap."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots, self.length = num_slots, 0
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values [S, G, L, E]
        self.states: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: last inputs of the convolution [S, W - 1, C], state

    def reserve(self, length: int) -> None:
        """Makes room for rows of `length` positions."""
        if length <= self.length:
            return
        more = -(-length // BLOCK) * BLOCK - self.length
        self.length += more
        for layer, (keys, values) in self.keys_values.items():
            self.keys_values[layer] = F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))

    def move(self, source: int, target: int) -> None:
        """Copies the row of one slot to another slot."""
        for tensors in (*self.keys_values.values(), *self.states.values()):
            for tensor in tensors:
                tensor[target] = tensor[source]


class Prefill:
    """Computes prompts as in training, each a segment of a packed stream, and puts what must be kept of them into slots.

    Args:
        slots: of each segment, except of padding at the end.
    """

    def __init__(self, cache: Cache, slots: list[int]) -> None:
        self.cache, self.slots = cache, slots

    def attention(
        self, layer: int, q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, scaling: float, segments: Segments
    ) -> Tensor:
        if layer not in self.cache.keys_values:  # zeros, for attention multiplies also what it masks
            shape = (self.cache.num_slots, k_1GTE.shape[1], self.cache.length, k_1GTE.shape[3])
            self.cache.keys_values[layer] = k_1GTE.new_zeros(shape), v_1GTE.new_zeros(shape)
        for kept_SGLE, new_1GTE in zip(self.cache.keys_values[layer], (k_1GTE, v_1GTE)):
            for slot, new_GTE in zip(self.slots, new_1GTE[0].split(segments.lengths, dim=1)):
                kept_SGLE[slot, :, : new_GTE.shape[1]] = new_GTE
        return stream_attention(q_1HTE, k_1GTE, v_1GTE, scaling, segments)

    def delta_rule(self, module: Any, qkv_1TC: Tensor, g_1TH: Tensor, beta_1TH: Tensor, segments: Segments) -> Tensor:
        o_1THV, states = rule_with_states(
            qkv_1TC, g_1TH, beta_1TH, module.conv1d.weight, module.num_k_heads, module.head_k_dim, segments)
        back = module.conv1d.weight.shape[2] - 1
        if module.layer_idx not in self.cache.states:
            self.cache.states[module.layer_idx] = (
                qkv_1TC.new_zeros(self.cache.num_slots, back, qkv_1TC.shape[2]),
                states[0].new_zeros(self.cache.num_slots, *states[0].shape))
        inputs_SWC, state_SHKV = self.cache.states[module.layer_idx]
        for slot, qkv_LC, state_HKV in zip(self.slots, qkv_1TC[0].split(segments.lengths), states):
            inputs_SWC[slot] = F.pad(qkv_LC, (0, 0, back, 0))[-back:]  # before a row are zeros
            state_SHKV[slot] = state_HKV
        return o_1THV


class Step:
    """Computes one more position of each row: position b of the stream [1, B] is that of the row in slot b.

    Args:
        lengths_B: how many positions each row already has.
        longest: the largest of them.
    """

    def __init__(self, cache: Cache, lengths_B: Tensor, longest: int, dtype: torch.dtype) -> None:
        self.cache, self.lengths_B, self.span = cache, lengths_B, -(-(longest + 1) // SPAN) * SPAN
        self.slots_B = torch.arange(len(lengths_B), device=lengths_B.device)
        unwritten_BL = torch.arange(self.span, device=lengths_B.device) > lengths_B[:, None]
        # added to the scores, and made once for all layers
        self.mask_B11L = torch.zeros_like(unwritten_BL, dtype=dtype).masked_fill_(unwritten_BL, -torch.inf)[:, None, None]

    def attention(
        self, layer: int, q_1HBE: Tensor, k_1GBE: Tensor, v_1GBE: Tensor, scaling: float, segments: Segments
    ) -> Tensor:
        num_rows, num_groups = len(self.lengths_B), k_1GBE.shape[1]
        k_SGLE, v_SGLE = self.cache.keys_values[layer]
        k_SGLE[self.slots_B, :, self.lengths_B] = k_1GBE[0].transpose(0, 1)
        v_SGLE[self.slots_B, :, self.lengths_B] = v_1GBE[0].transpose(0, 1)
        # the query heads that share keys are like several positions of one head, for none looks further than another
        q_BGRE = q_1HBE[0].unflatten(0, (num_groups, -1)).permute(2, 0, 1, 3)
        o_BGRE = F.scaled_dot_product_attention(
            q_BGRE, k_SGLE[:num_rows, :, : self.span], v_SGLE[:num_rows, :, : self.span], self.mask_B11L, scale=scaling)
        return o_BGRE.flatten(1, 2)[None]

    def delta_rule(self, module: Any, qkv_1BC: Tensor, g_1BH: Tensor, beta_1BH: Tensor, segments: Segments) -> Tensor:
        num_rows = len(self.lengths_B)
        inputs_SWC, state_SHKV = self.cache.states[module.layer_idx]
        window_BWC = torch.cat([inputs_SWC[:num_rows], qkv_1BC.transpose(0, 1)], dim=1)
        inputs_SWC[:num_rows] = window_BWC[:, 1:]
        qkv_BC = convolution_step(window_BWC, module.conv1d.weight)
        return gated_delta_step(
            qkv_BC, g_1BH[0], beta_1BH[0], state_SHKV[:num_rows], module.num_k_heads, module.head_k_dim)[None]
