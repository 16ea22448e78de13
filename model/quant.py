"""Frozen linear layers stored in int8, nf4 or the compute dtype, each dequantized only for its own matmul.
Costs 1 byte (int8) or 0.516 bytes (nf4) a weight, and one dequantized matrix during a matmul."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from model import bnb
from model.devices import OFF, on_gpu
from model.matmul import Part, multiply

# O output features, I input features, R rows of a weight, X any leading dimensions

NF4_BLOCK = 64  # weights that share one absmax
ABSMAX_BLOCK = 256  # absmax values that share one scale (double quantization)
CPU_PIECE = 2**17  # weights that are quantized at a time on a CPU


class FrozenLinear(nn.Module):
    """A linear layer whose weight is never trained; `put` fills the weight in, row by row in order.

    Keeps nothing for the backward pass, which dequantizes the weight again; only the input gets a gradient.
    Subclasses differ in how they store rows.
    """

    drops_out = False

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_buffer("bias", None)

    def put(self, start: int, rows_RI: Tensor) -> None:
        """Stores rows `start` to `start + R` of the weight, given as in the checkpoint."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The weight in the compute dtype: [O, I]."""
        raise NotImplementedError

    def part(self) -> tuple[Part, tuple[Tensor, ...]]:
        """For `multiply`: what this linear computes, and no adapter."""
        return Part(self), ()

    def forward(self, x_XI: Tensor) -> Tensor:
        return multiply(x_XI, [self])[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"


class PlainLinear(FrozenLinear):
    """Stored in the compute dtype."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__(in_features, out_features, dtype)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=dtype, device=device))

    def put(self, start: int, rows_RI: Tensor) -> None:
        self.weight[start : start + len(rows_RI)] = rows_RI

    def dequantize(self) -> Tensor:
        return self.weight


class Int8Linear(FrozenLinear):
    """Each row scaled by its absmax to -127 ... 127, as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339).

    Activations stay in the compute dtype. On CPU this is several times as fast as bitsandbytes' own int8 matmul.
    """

    weight: Tensor
    scale_O: Tensor

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__(in_features, out_features, dtype)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale_O", torch.empty(out_features, dtype=torch.float32, device=device))

    def put(self, start: int, rows_RI: Tensor) -> None:
        stop = start + len(rows_RI)
        self.weight[start:stop], self.scale_O[start:stop] = quantize_int8(rows_RI.to(self.weight.device))

    def dequantize(self) -> Tensor:
        return dequantize_int8(self.weight, self.scale_O, self.dtype)


class Nf4Linear(FrozenLinear):
    """Blocks of 64 weights in 4-bit NormalFloat, double-quantized (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

    A block continues in the next row where I is no multiple of 64. `put` gives the same bits for any slices of rows.
    """

    packed: Tensor

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__(in_features, out_features, dtype)
        num_weights = in_features * out_features
        self.register_buffer("packed", torch.empty((num_weights + 1) // 2, 1, dtype=torch.uint8, device=device))
        # one absmax a block while loading; then `state` holds them quantized
        self.absmax = torch.empty(-(-num_weights // NF4_BLOCK), dtype=torch.float32, device=device)
        self.partial_block: Tensor | None = None  # weights of a block that the next rows complete
        self.state: Any = None  # bitsandbytes' QuantState

    def put(self, start: int, rows_RI: Tensor) -> None:
        weights = rows_RI.to(self.packed.device).flatten()
        first = start * self.in_features
        if self.partial_block is not None:
            weights = torch.cat([self.partial_block, weights])
            first -= len(self.partial_block)
            self.partial_block = None
        last_rows = start + len(rows_RI) == self.out_features
        if not last_rows and len(weights) % NF4_BLOCK:
            whole = len(weights) // NF4_BLOCK * NF4_BLOCK
            weights, self.partial_block = weights[:whole], weights[whole:].clone()
        if len(weights):
            packed, absmax = quantize_nf4(weights)
            self.packed[first // 2 : first // 2 + len(packed)] = packed
            self.absmax[first // NF4_BLOCK : first // NF4_BLOCK + len(absmax)] = absmax
        if last_rows:
            self.quantize_absmax(bnb.get_4bit_type("nf4", device=self.packed.device))

    def quantize_absmax(self, code: Tensor) -> None:
        offset = self.absmax.mean()
        quantized, state2 = bnb.quantize_blockwise(self.absmax - offset, blocksize=ABSMAX_BLOCK)
        self.state = bnb.QuantState(
            # flat: of a matrix whose rows end within a block, bitsandbytes' CPU kernel takes the wrong absmax
            absmax=quantized, shape=(self.out_features * self.in_features,), code=code, blocksize=NF4_BLOCK,
            quant_type="nf4", dtype=self.dtype, offset=offset, state2=state2,
        )
        del self.absmax

    def dequantize(self) -> Tensor:
        assert self.state is not None, "not all rows were put"
        if "nf4" in OFF:
            state, scales = self.state, self.state.state2
            absmax = plain_blockwise(state.absmax, scales.absmax, scales.code) + state.offset
            weights = plain_nf4(self.packed, absmax, self.dtype)[: self.out_features * self.in_features]
        else:
            weights = bnb.dequantize_4bit(self.packed, self.state)
        return weights.view(self.out_features, self.in_features)


def dequantize_int8(weight_XI: Tensor, scale_X: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row times its scale, rounded once, to `dtype`; the fast path "int8" makes no float32 copy in between."""
    if "int8" in OFF:
        return (weight_XI.float() * scale_X[..., None]).to(dtype)
    return torch.mul(weight_XI, scale_X[..., None], out=torch.empty(weight_XI.shape, dtype=dtype, device=weight_XI.device))


def plain_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes flat nf4 weights, two a byte, the first in the high half; the reference for bitsandbytes' kernel."""
    code = bnb.get_4bit_type("nf4", device=packed.device)
    weights = code[torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().int()]
    return weights.mul_(absmax.repeat_interleave(NF4_BLOCK)[: len(weights)]).to(dtype)


def plain_blockwise(quantized: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """Dequantizes absmax values of nf4 blocks; the reference for `bitsandbytes.functional.dequantize_blockwise`."""
    return code[quantized.int()] * scales.repeat_interleave(ABSMAX_BLOCK)[: len(quantized)]


def quantize_nf4(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes W flat weights to bitsandbytes' nf4: packed [W / 2, 1], and each block's absmax in float32."""
    with one_thread_on_cpu(weights):
        parts = [quantize_nf4_piece(part) for part in pieces(weights)]
        return torch.cat([packed for packed, _ in parts]), torch.cat([absmax for _, absmax in parts])


def quantize_nf4_piece(weights: Tensor) -> tuple[Tensor, Tensor]:
    """`bitsandbytes.functional.quantize_4bit`, bit for bit; whole blocks on a CPU at several times its speed."""
    if on_gpu(weights) or len(weights) % NF4_BLOCK:
        packed, state = bnb.quantize_4bit(weights, blocksize=NF4_BLOCK, quant_type="nf4")
        return packed, state.absmax
    blocks = weights.float().view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks.mul(1 / absmax.clamp(min=1e-38)[:, None]).clamp_(-1, 1).flatten()
    upper = (scaled.view(torch.int32) >> 16).add_(2**15)
    least_code, next_above = nf4_tables()
    codes = least_code.index_select(0, upper)
    codes += (scaled > next_above.index_select(0, upper)).view(torch.uint8)
    pairs = codes.view(torch.int16)  # the first of two codes is the lower byte
    return (pairs << 4 | pairs >> 8).to(torch.uint8)[:, None], absmax


@cache
def nf4_tables() -> tuple[Tensor, Tensor]:
    """For the upper 16 bits of a float32 the least nf4 code of all such numbers, and above which of them it is one more.

    Two lookups find the nearest of 16 codes faster than a search among the 15 bounds between them.
    """
    code = bnb.get_4bit_type("nf4", device="cpu")
    bounds = (code[:-1] + code[1:]) / 2
    upper = torch.arange(-2**15, 2**15, dtype=torch.int32) << 16
    ends = torch.bucketize(torch.stack([upper, upper | 0xFFFF]).view(torch.float32), bounds)
    least = ends.amin(dim=0)
    return least.to(torch.uint8), torch.where(ends[0] == ends[1], torch.inf, bounds[least.clamp(max=14)])


def quantize_int8(weight_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each row to bitsandbytes' int8: [R, I], and the float32 numbers [R] that multiply the rows."""
    with one_thread_on_cpu(weight_RI):
        # half precision first, for the same bits as bitsandbytes' Linear8bitLt
        parts = [bnb.int8_vectorwise_quant(part.half()) for part in pieces(weight_RI)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]) / 127


def pieces(weights: Tensor) -> tuple[Tensor, ...]:
    """On CPU cuts the weights into pieces, so that quantization's temporaries stay in the cache and below 4 MiB."""
    if on_gpu(weights):
        return (weights,)
    return weights.split(max(CPU_PIECE * len(weights) // weights.numel(), 1))


@contextmanager
def one_thread_on_cpu(weights: Tensor) -> Iterator[None]:
    """Uses one thread on CPU: two are slower, because the steps of quantization are so small."""
    num_threads = torch.get_num_threads()
    if not on_gpu(weights):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def kept_dequantized(model: nn.Module) -> Iterator[None]:
    """Keeps all frozen linears dequantized while the context lasts: faster decoding at several times the memory."""
    linears = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    for linear in linears:
        weight_OI = linear.dequantize()
        setattr(linear, "dequantize", lambda weight_OI=weight_OI: weight_OI)  # shadows the method
    try:
        yield
    finally:
        for linear in linears:
            delattr(linear, "dequantize")


LINEARS: dict[str, type[PlainLinear | Int8Linear | Nf4Linear]] = {
    "bf16": PlainLinear,
    "float32": PlainLinear,
    "int8": Int8Linear,
    "nf4": Nf4Linear,
}
