"""The frozen matrices of a layer's routed experts, stored in int8, nf4 or the compute dtype, dequantized a few at a time.
Costs 1 byte (int8) or 0.516 bytes (nf4) a weight; whoever dequantizes matrices frees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model import bnb
from model.devices import OFF
from model.quant import (
    ABSMAX_BLOCK,
    NF4_BLOCK,
    dequantize_int8,
    plain_blockwise,
    plain_nf4,
    quantize_int8,
    quantize_nf4,
)

# E experts, G of them in a group, O output features, I input features
# A absmax values of one expert (one for each block of 64 weights), Q their scales (one for 256), B packed bytes


class ExpertMatrices(nn.Module):
    """One frozen matrix for each expert, [E, O, I]; `put` fills them in and quantizes each matrix separately.

    Subclasses differ in how they store a matrix.
    """

    PARTS: tuple[str, ...]  # the buffers that hold the weights

    def __init__(self, shape_EOI: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape_EOI, self.dtype = shape_EOI, dtype

    def parts(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.PARTS]

    def put(self, e: int, matrix_OI: Tensor) -> None:
        """Stores the matrix of expert `e`, given as in the checkpoint."""
        raise NotImplementedError

    def dequantize(self, first: int, stop: int) -> Tensor:
        """The matrices of experts `first` to `stop` in the compute dtype: [G, O, I]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"shape_EOI={self.shape_EOI}, dtype={self.dtype}"


class PlainMatrices(ExpertMatrices):
    """Stored in the compute dtype."""

    PARTS = ("weight_EOI",)
    weight_EOI: Tensor

    def __init__(self, shape_EOI: tuple[int, int, int], dtype: torch.dtype, device: Any) -> None:
        super().__init__(shape_EOI, dtype)
        self.register_buffer("weight_EOI", torch.empty(shape_EOI, dtype=dtype, device=device))

    def put(self, e: int, matrix_OI: Tensor) -> None:
        self.weight_EOI[e] = matrix_OI

    def dequantize(self, first: int, stop: int) -> Tensor:
        return self.weight_EOI[first:stop]


class Int8Matrices(ExpertMatrices):
    """Each row scaled by its absmax to -127 ... 127, as in `quant.Int8Linear`."""

    PARTS = ("weight_EOI", "scale_EO")
    weight_EOI: Tensor
    scale_EO: Tensor

    def __init__(self, shape_EOI: tuple[int, int, int], dtype: torch.dtype, device: Any) -> None:
        super().__init__(shape_EOI, dtype)
        self.register_buffer("weight_EOI", torch.empty(shape_EOI, dtype=torch.int8, device=device))
        self.register_buffer("scale_EO", torch.empty(shape_EOI[:2], dtype=torch.float32, device=device))

    def put(self, e: int, matrix_OI: Tensor) -> None:
        self.weight_EOI[e], self.scale_EO[e] = quantize_int8(matrix_OI.to(self.weight_EOI.device))

    def dequantize(self, first: int, stop: int) -> Tensor:
        return dequantize_int8(self.weight_EOI[first:stop], self.scale_EO[first:stop], self.dtype)


class Nf4Matrices(ExpertMatrices):
    """Blocks of 64 weights in 4-bit NormalFloat, double-quantized (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

    Each expert has the bits of `bitsandbytes.functional.quantize_4bit(matrix, compress_statistics=True)`; quantizing the
    absmax of several experts together would change the weights by 0.3 %. The experts' states are contiguous, so that a
    group is dequantized by as many kernels as one expert. Each expert begins at a new block.
    """

    PARTS = ("packed_EB", "absmax_EA", "scale_EQ", "offset_E", "code")
    packed_EB: Tensor
    absmax_EA: Tensor
    scale_EQ: Tensor
    offset_E: Tensor
    code: Tensor

    def __init__(self, shape_EOI: tuple[int, int, int], dtype: torch.dtype, device: Any) -> None:
        super().__init__(shape_EOI, dtype)
        num_experts, *shape_OI = shape_EOI
        self.num_weights = shape_OI[0] * shape_OI[1]
        self.num_blocks = -(-self.num_weights // NF4_BLOCK)
        num_scales = -(-self.num_blocks // ABSMAX_BLOCK)
        # zeros, because an expert may not fill its last block
        self.register_buffer(
            "packed_EB", torch.zeros(num_experts, self.num_blocks * NF4_BLOCK // 2, dtype=torch.uint8, device=device))
        self.register_buffer(
            "absmax_EA", torch.zeros(num_experts, num_scales * ABSMAX_BLOCK, dtype=torch.uint8, device=device))
        self.register_buffer("scale_EQ", torch.zeros(num_experts, num_scales, dtype=torch.float32, device=device))
        self.register_buffer("offset_E", torch.zeros(num_experts, dtype=torch.float32, device=device))
        self.register_buffer("code", bnb.create_dynamic_map().to(device))  # the 8-bit type of the absmax values

    def put(self, e: int, matrix_OI: Tensor) -> None:
        packed, absmax_A = quantize_nf4(matrix_OI.to(self.packed_EB.device).flatten())
        offset = absmax_A.mean()
        quantized_A, state = bnb.quantize_blockwise(absmax_A - offset, blocksize=ABSMAX_BLOCK)
        self.packed_EB[e, : packed.numel()] = packed.flatten()
        self.absmax_EA[e, : self.num_blocks] = quantized_A
        self.scale_EQ[e], self.offset_E[e] = state.absmax, offset

    def dequantize(self, first: int, stop: int) -> Tensor:
        num, plain = stop - first, "nf4" in OFF
        quantized, scales = self.absmax_EA[first:stop].view(-1), self.scale_EQ[first:stop].view(-1)
        absmax = plain_blockwise(quantized, scales, self.code) if plain else bnb.dequantize_blockwise(
            quantized, absmax=scales, code=self.code, blocksize=ABSMAX_BLOCK)
        absmax_GA = absmax.view(num, -1)[:, : self.num_blocks] + self.offset_E[first:stop, None]
        packed, shape_GX = self.packed_EB[first:stop].view(-1, 1), (num, self.num_blocks * NF4_BLOCK)
        weights_GX = plain_nf4(packed, absmax_GA.flatten(), self.dtype).view(shape_GX) if plain else bnb.dequantize_4bit(
            packed, bnb.QuantState(absmax=absmax_GA.view(-1), shape=shape_GX, blocksize=NF4_BLOCK, quant_type="nf4",
                                   dtype=self.dtype))
        return weights_GX[:, : self.num_weights].unflatten(1, self.shape_EOI[1:])


MATRICES: dict[str, type[PlainMatrices | Int8Matrices | Nf4Matrices]] = {
    "bf16": PlainMatrices,
    "float32": PlainMatrices,
    "int8": Int8Matrices,
    "nf4": Nf4Matrices,
}
