"""Rows in a stream against each row alone."""

import pytest
import torch

from model.mixers import Segments, plain_attention, stream_attention

SCALING = 0.25


def case(lengths, dtype, heads=(6, 2), size=16, spread=1.0):
    """q, k, v as the projections leave them (heads after positions in memory), and the output's gradient."""
    torch.manual_seed(0)
    num_tokens = sum(lengths)
    stream = [(torch.randn(1, num_tokens, h, size) * spread).to(dtype).transpose(1, 2).requires_grad_()
              for h in (heads[0], heads[1], heads[1])]
    return stream, torch.randn(1, num_tokens, heads[0], size).to(dtype)


def run(attention, stream, do, lengths):
    o = attention(*stream, SCALING, lengths)
    return [o.detach(), *torch.autograd.grad(o, stream, do)]


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_packed_rows_are_the_rows_alone(dtype):
    lengths = (40, 150, 7)
    stream, do = case(lengths, dtype)
    segments = Segments(torch.tensor([0, 40, 190, 197], dtype=torch.int32), lengths)
    o = stream_attention(*stream, SCALING, segments)
    assert o.shape == do.shape
    packed = [o, *torch.autograd.grad(o, stream, do)]
    start = 0
    for length in lengths:
        row = slice(start, start + length)
        alone = [x[:, :, row].detach().requires_grad_() for x in stream]
        found = run(plain_attention, alone, do[:, row], (length,))
        for part, truth in zip([packed[0][:, row], *(x[:, :, row] for x in packed[1:])], found):
            assert relative(part, truth) < (1e-6 if dtype == torch.float32 else 1e-2)
        start += length


def test_a_row_never_sees_another_nor_its_future():
    lengths = (20, 30)
    (q, k, v), _ = case(lengths, torch.bfloat16)
    before = plain_attention(q, k, v, SCALING, lengths)
    with torch.no_grad():
        v[:, :, 19:21] += 1  # the last position of the first row, the first of the second
    after = plain_attention(q, k, v, SCALING, lengths)
    changed = (before != after).any(-1).any(-1)[0]
    assert not changed[:19].any() and changed[19:].all()
    for position in (5, 30):  # an output's gradient reaches back to its row's first position, not beyond, not ahead
        o = plain_attention(q, k, v, SCALING, lengths)
        (dk,) = torch.autograd.grad(o[0, position].sum(), k)
        reached = dk[0].abs().sum((0, 2)).nonzero()[:, 0].tolist()
        assert reached and min(reached) >= (0 if position < 20 else 20) and max(reached) <= position
