"""Frozen linears: row slices hold the bits that bitsandbytes makes of the whole weight, and multiply as they dequantize."""

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb

from model import quant
from model.quant import LINEARS, quantize_nf4_piece

CPU = torch.device("cpu")
NUM_OUT, NUM_IN = 96, 200  # 200: blocks of 64 run through row ends
CUTS = [(96,), (1,) * 96, (7, 64, 25), (50, 46)]


def weight():
    torch.manual_seed(0)
    return (torch.randn(NUM_OUT, NUM_IN) * torch.logspace(-2, 1, NUM_OUT)[:, None]).bfloat16()


def filled(base, cuts=(96,), dtype=torch.float32):
    linear = LINEARS[base](NUM_IN, NUM_OUT, dtype, CPU)
    start = 0
    for rows in weight().split(list(cuts)):
        linear.put(start, rows)
        start += len(rows)
    return linear


@pytest.mark.parametrize("cuts", CUTS)
def test_int8_rows_are_bitsandbytes_bits(cuts):
    linear = filled("int8", cuts)
    quantized, absmax, _ = bnb.int8_vectorwise_quant(weight().half())
    assert torch.equal(linear.weight, quantized)
    assert torch.equal(linear.scale_O, absmax / 127)


@pytest.mark.parametrize("cuts", CUTS)
def test_nf4_rows_are_bitsandbytes_bits_double_quantized(cuts):
    linear = filled("nf4", cuts, torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight(), blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(linear.packed, packed)
    assert torch.equal(linear.state.absmax, state.absmax)
    assert torch.equal(linear.state.offset, state.offset)
    assert torch.equal(linear.state.state2.absmax, state.state2.absmax)
    assert torch.equal(linear.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("base, error", (("int8", 0.01), ("nf4", 0.12), ("float32", 1e-9)))
def test_the_weight_comes_back(base, error):
    truth = weight().float()
    assert ((filled(base).dequantize() - truth).norm() / truth.norm()).item() < error


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_nf4_pieces_are_bitsandbytes_bits(dtype):
    """Also where all of a block is 0, where one weight is huge, and for weights on the bounds between two codes."""
    code = bnb.get_4bit_type("nf4", device="cpu")
    bounds = (code[:-1] + code[1:]) / 2
    edges = torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0)), code, -code,
                       torch.ones(1), torch.zeros(2)])
    weights = torch.cat([edges, torch.zeros(64), torch.randn(2**16) * 1e-3, torch.randn(2**16) * 10]).to(dtype)
    weights[1000], weights[2000] = torch.finfo(dtype).max, -torch.finfo(dtype).tiny
    for part in (weights[: len(weights) // 64 * 64], weights[:100], weights[64:128], -weights[: 64 * 1000]):
        packed, absmax = quantize_nf4_piece(part)
        expected, state = bnb.quantize_4bit(part, blocksize=64, quant_type="nf4")
        assert torch.equal(packed, expected) and torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("num_in", (24, 32, 40, 64, 96))
def test_nf4_rows_that_end_within_a_block(num_in, monkeypatch):
    """Rows of 32 and of 96 came back multiplied by other rows' absmax: on a CPU, bitsandbytes counts blocks from the start of a
    row if it is told the matrix's shape. A proof of an export found it, as the same matrix of a single expert was right."""
    linear, matrix = LINEARS["nf4"](num_in, 64, torch.float32, CPU), torch.randn(64, num_in)
    linear.put(0, matrix)
    found = linear.dequantize()
    assert ((found - matrix).norm() / matrix.norm()).item() < 0.12
    monkeypatch.setattr(quant, "OFF", {"nf4"})
    assert ((found - linear.dequantize()).norm() / matrix.norm()).item() < 1e-6


@pytest.mark.parametrize("base", sorted(LINEARS))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_forward_and_backward_are_those_of_the_dequantized_weight(base, dtype):
    linear = filled(base, dtype=dtype)
    linear.bias = torch.randn(NUM_OUT).to(dtype)
    x, dy = torch.randn(2, 5, NUM_IN).to(dtype).requires_grad_(), torch.randn(2, 5, NUM_OUT).to(dtype)
    dequantized = linear.dequantize()
    assert dequantized.dtype == dtype
    y, expected = linear(x), F.linear(x, dequantized, linear.bias)
    (dx,), (expected_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for found, truth in ((y, expected), (dx, expected_dx)):
        assert ((found - truth).float().norm() / truth.float().norm()).item() < tolerance


@pytest.mark.parametrize("base, bytes_a_weight", (("int8", 1.03), ("nf4", 0.52 + 0.02), ("bf16", 2.01)))
def test_what_a_weight_costs(base, bytes_a_weight):
    linear = LINEARS[base](1024, 1024, torch.bfloat16, CPU)
    linear.put(0, torch.randn(1024, 1024))
    tensors = list(linear.buffers())
    if base == "nf4":
        tensors += [linear.state.absmax, linear.state.state2.absmax, linear.state.state2.code, linear.state.code]
    assert sum(t.nbytes for t in tensors) < bytes_a_weight * 2**20


def test_nothing_but_the_input_is_differentiated():
    assert not list(filled("int8").parameters())
