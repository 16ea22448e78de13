"""One position at a time against the rule in chunks: outputs and the state that is left."""

import pytest
import torch

from model.delta_rule import CausalConvolution, rule_in_batches, rule_with_states
from model.mixers import Segments
from model.ops.gated_delta import gated_delta_rule, gated_delta_rule_with_state
from model.ops.gated_delta_step import convolution_step, gated_delta_step

KEY_HEADS, RATIO, KEY_SIZE, VALUE_SIZE = 2, 2, 16, 24
HEADS, CHANNELS = KEY_HEADS * RATIO, 2 * KEY_HEADS * KEY_SIZE + KEY_HEADS * RATIO * VALUE_SIZE


def inputs(rows, length, dtype=torch.float32):
    torch.manual_seed(0)
    g = -torch.rand(rows, length, HEADS) ** 4 * 3
    return torch.randn(rows, length, CHANNELS).to(dtype), g, torch.randn(rows, length, HEADS).sigmoid().to(dtype)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150, 1100])
def test_the_last_state_continues_the_rule(length):
    """1,100 positions are more than one block, and 40 rows several sets of heads."""
    rows = 40 if length == 150 else 3
    qkv, g, beta = inputs(rows, length + 3)
    expected = gated_delta_rule(qkv, g, beta, KEY_HEADS, KEY_SIZE)
    o, state = gated_delta_rule_with_state(qkv[:, :length], g[:, :length], beta[:, :length], KEY_HEADS, KEY_SIZE)
    assert relative(o, expected[:, :length]) < 1e-6
    for t in range(length, length + 3):
        step = gated_delta_step(qkv[:, t], g[:, t], beta[:, t], state, KEY_HEADS, KEY_SIZE)
        assert relative(step, expected[:, t]) < 2e-6


def test_steps_alone_equal_the_chunks():
    qkv, g, beta = inputs(2, 70)
    state = torch.zeros(2, HEADS, KEY_SIZE, VALUE_SIZE)
    o = torch.stack([gated_delta_step(qkv[:, t], g[:, t], beta[:, t], state, KEY_HEADS, KEY_SIZE) for t in range(70)], 1)
    expected, last = gated_delta_rule_with_state(qkv, g, beta, KEY_HEADS, KEY_SIZE)
    assert relative(o, expected) < 1e-6 and relative(state, last) < 1e-6


def test_bf16_keeps_its_state_in_float32():
    qkv, g, beta = inputs(2, 40, torch.bfloat16)
    o, state = gated_delta_rule_with_state(qkv, g, beta, KEY_HEADS, KEY_SIZE)
    exact, exact_state = gated_delta_rule_with_state(qkv.float(), g, beta.float(), KEY_HEADS, KEY_SIZE)
    assert state.dtype == torch.float32 and o.dtype == torch.bfloat16
    assert relative(o, exact) < 1e-2 and relative(state, exact_state) < 1e-2


@pytest.mark.parametrize("lengths", [(70, 13, 37, 29), (1, 2, 64), (3,)])
def test_each_segment_leaves_its_own_state(lengths):
    qkv, g, beta = inputs(1, sum(lengths))
    weight = torch.randn(CHANNELS, 1, 4)
    segments = Segments(torch.tensor((0, *lengths)).cumsum(0).int(), lengths)
    o, states = rule_with_states(qkv, g, beta, weight, KEY_HEADS, KEY_SIZE, segments)
    assert torch.equal(o, rule_in_batches(qkv, g, beta, weight, KEY_HEADS, KEY_SIZE, segments))
    for r, row in enumerate(zip(*(x.split(lengths, dim=1) for x in (qkv, g, beta)))):
        _, alone = gated_delta_rule_with_state(CausalConvolution.apply(row[0], weight), *row[1:], KEY_HEADS, KEY_SIZE)
        assert relative(states[r], alone[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_step_is_the_last_position_of_the_convolution(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 24).to(dtype), torch.randn(24, 1, 4).to(dtype)
    assert relative(convolution_step(x, weight), CausalConvolution.apply(x, weight)[:, -1]) < (
        1e-6 if dtype == torch.float32 else 4e-3)
