"""Triton kernels over all routed experts of a layer at once, which dequantize tiles of the weights on the way.
Dequantized weights never lie in memory. `by_kernel.py` starts these kernels; torch alone never imports this file.

A program computes ROWS of one expert's sorted assignments by COLUMNS, DEPTH of the contracted features at a time, in the
compute dtype with float32 sums. An expert's last tile is filled up with zero rows. Nothing is added up across programs, so
that results are bit-equal from run to run.
"""

import triton
import triton.language as tl

# E experts, T tokens, K experts a token, S = T * K assignments, D hidden size, I or INNER intermediate size, X either,
# C some columns of D


@triton.jit
def tile_of(bounds_E1, E: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of this program's tile, and the tile's first row and its stop; no rows if there are fewer tiles.

    EXPERTS: the power of two that is E or more.
    """
    tile, numbers = tl.program_id(1), tl.arange(0, EXPERTS)
    start_E = tl.load(bounds_E1 + numbers, mask=numbers < E, other=0)
    stop_E = tl.load(bounds_E1 + numbers + 1, mask=numbers < E, other=0)
    tiles_E = (stop_E - start_E + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles_E, 0) <= tile).to(tl.int32))
    tiles_before = tl.sum(tl.where(numbers < expert, tiles_E, 0))
    first = tl.sum(tl.where(numbers == expert, start_E, 0)) + (tile - tiles_before) * ROWS
    return expert, first, tl.sum(tl.where(numbers == expert, stop_E, 0))


@triton.jit
def nf4(code):
    """The 4-bit NormalFloat of QLoRA. Arithmetic, because a table in memory would cost a load for each weight."""
    b0, b1, b2, b3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    minus = tl.where(b2, tl.where(b1, tl.where(b0, 0.0, -0.09105003625154495),
                                  tl.where(b0, -0.18477343022823334, -0.28444138169288635)),
                     tl.where(b1, tl.where(b0, -0.39491748809814453, -0.5250730514526367),
                              tl.where(b0, -0.6961928009986877, -1.0)))
    plus = tl.where(b2, tl.where(b1, tl.where(b0, 1.0, 0.7229568362236023),
                                 tl.where(b0, 0.5626170039176941, 0.44070982933044434)),
                    tl.where(b1, tl.where(b0, 0.33791524171829224, 0.24611230194568634),
                             tl.where(b0, 0.16093020141124725, 0.07958029955625534)))
    return tl.where(b3, plus, minus)


@triton.jit
def weights(parts, expert, o, f, NUM_OUT: tl.constexpr, NUM_IN: tl.constexpr, WIDTH: tl.constexpr, STORED: tl.constexpr, dtype,
            OPERAND: tl.constexpr):
    """Rows `o` and columns f to f + WIDTH of an expert's matrix, dequantized: rounded to `dtype`, given as OPERAND.

    parts: the buffers of an `expert_weights.ExpertMatrices`. WIDTH is at most 64 and f a multiple of it, so that a row of
    the tile lies within one block of nf4.
    """
    row = expert.to(tl.int64) * NUM_OUT + o  # NUM_IN is a multiple of 64, so that experts and rows begin at new blocks
    if STORED == "nf4":
        byte = tl.load(parts[0] + row[:, None] * (NUM_IN // 2) + (f // 2 + tl.arange(0, WIDTH // 2))[None, :]).to(tl.int32)
        NUM_SCALES: tl.constexpr = (NUM_OUT * NUM_IN // 64 + 255) // 256
        block = (o * NUM_IN + f) // 64
        quantized = tl.load(parts[1] + expert * (NUM_SCALES * 256) + block).to(tl.int32)
        absmax = tl.load(parts[4] + quantized) * tl.load(parts[2] + expert * NUM_SCALES + block // 256)
        absmax += tl.load(parts[3] + expert)
        w = tl.interleave(nf4(byte >> 4), nf4(byte & 15)) * absmax[:, None]
    else:
        w = tl.load(parts[0] + row[:, None] * NUM_IN + (f + tl.arange(0, WIDTH))[None, :])
        if STORED == "int8":
            w = w.to(tl.float32) * tl.load(parts[1] + row)[:, None]
    return w.to(dtype).to(OPERAND)


@triton.jit
def add_gate_and_up(gate, up, x_TD, at, mine, gate_up, expert, i, d, D: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr,
                    STORED: tl.constexpr, OPERAND: tl.constexpr):
    """gate and up, plus what features d to d + DEPTH of the tokens at `at` contribute."""
    dtype = x_TD.dtype.element_ty
    x = tl.load(x_TD + at, mask=mine[:, None], other=0).to(OPERAND)
    w = weights(gate_up, expert, i, d, 2 * INNER, D, DEPTH, STORED, dtype, OPERAND)
    gate = tl.dot(x, tl.trans(w), gate, input_precision="ieee")
    w = weights(gate_up, expert, i + INNER, d, 2 * INNER, D, DEPTH, STORED, dtype, OPERAND)
    return gate, tl.dot(x, tl.trans(w), up, input_precision="ieee")


@triton.jit
def hidden(h_SI, x_TD, order_S, bounds_E1, gate_up, D: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
           EXPERTS: tl.constexpr, STORED: tl.constexpr, OPERAND: tl.constexpr,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """h = silu(x Wg^T) * (x Wu^T) of each assignment's token."""
    expert, first, stop = tile_of(bounds_E1, E, EXPERTS, ROWS)
    if first < stop:
        row = first + tl.arange(0, ROWS)
        mine = row < stop
        token = tl.load(order_S + row, mask=mine, other=0) // K
        i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        dtype = x_TD.dtype.element_ty
        gate, up = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for d in range(0, D, DEPTH):
            at = token[:, None] * D + (d + tl.arange(0, DEPTH))[None, :]
            gate, up = add_gate_and_up(gate, up, x_TD, at, mine, gate_up, expert, i, d, D, INNER, DEPTH, STORED, OPERAND)
        tl.store(h_SI + row[:, None] * INNER + i[None, :], (gate * tl.sigmoid(gate) * up).to(dtype), mask=mine[:, None])


@triton.jit
def hidden_backward(dgate_up_S2I, dweight_CS, x_TD, dout_TD, weight_S, order_S, bounds_E1, gate_up, down, S,
                    D: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr,
                    STORED: tl.constexpr, OPERAND: tl.constexpr,
                    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """The gradients of gate and up, which are computed again, and this program's part of the routing weights' gradients.

    With y = h Wd^T and out = weight * y, the gradient of a routing weight is y . dout = h . (dout Wd): y is not needed.
    """
    expert, first, stop = tile_of(bounds_E1, E, EXPERTS, ROWS)
    if first < stop:
        row = first + tl.arange(0, ROWS)
        mine = row < stop
        assignment = tl.load(order_S + row, mask=mine, other=0)
        token = assignment // K
        column = tl.program_id(0) * COLUMNS
        i = column + tl.arange(0, COLUMNS)
        dtype = x_TD.dtype.element_ty
        gate, up = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        dh = tl.zeros([ROWS, COLUMNS], tl.float32)
        for d in range(0, D, DEPTH):
            at = token[:, None] * D + (d + tl.arange(0, DEPTH))[None, :]
            gate, up = add_gate_and_up(gate, up, x_TD, at, mine, gate_up, expert, i, d, D, INNER, DEPTH, STORED, OPERAND)
            dout = tl.load(dout_TD + at, mask=mine[:, None], other=0).to(OPERAND)
            w = weights(down, expert, d + tl.arange(0, DEPTH), column, D, INNER, COLUMNS, STORED, dtype, OPERAND)
            dh = tl.dot(dout, w, dh, input_precision="ieee")
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid
        tl.store(dweight_CS + tl.program_id(0) * S + assignment, tl.sum(act * up * dh, axis=1), mask=mine)
        dh *= tl.load(weight_S + assignment, mask=mine, other=0).to(tl.float32)[:, None]
        at = row[:, None] * (2 * INNER) + i[None, :]
        tl.store(dgate_up_S2I + at, (dh * up * (sigmoid + act * (1 - sigmoid))).to(dtype), mask=mine[:, None])
        tl.store(dgate_up_S2I + at + INNER, (dh * act).to(dtype), mask=mine[:, None])


@triton.jit
def columns(y_SC, x_SX, weight_S, order_S, bounds_E1, matrices, first_column, NUM_COLUMNS, D: tl.constexpr, X: tl.constexpr,
            E: tl.constexpr, EXPERTS: tl.constexpr, BACKWARD: tl.constexpr, STORED: tl.constexpr, OPERAND: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Some columns of weight * x W^T (W is [D, X] an expert), or of x W if BACKWARD (W is [X, D]); x's rows are sorted by
    expert, y's rows are the assignments in the order of tokens."""
    expert, first, stop = tile_of(bounds_E1, E, EXPERTS, ROWS)
    if first < stop:
        row = first + tl.arange(0, ROWS)
        mine = row < stop
        assignment = tl.load(order_S + row, mask=mine, other=0)
        column = tl.program_id(0) * COLUMNS
        c = tl.arange(0, COLUMNS)
        dtype = x_SX.dtype.element_ty
        y = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, X, DEPTH):
            x = tl.load(x_SX + row[:, None] * X + (k + tl.arange(0, DEPTH))[None, :], mask=mine[:, None], other=0).to(OPERAND)
            if BACKWARD:
                w = weights(matrices, expert, k + tl.arange(0, DEPTH), first_column + column, X, D, COLUMNS, STORED, dtype,
                            OPERAND)
            else:
                w = tl.trans(weights(matrices, expert, first_column + column + c, k, D, X, DEPTH, STORED, dtype, OPERAND))
            y = tl.dot(x, w, y, input_precision="ieee")
        if not BACKWARD:
            y *= tl.load(weight_S + assignment, mask=mine, other=0).to(tl.float32)[:, None]
        tl.store(y_SC + assignment[:, None] * NUM_COLUMNS + (column + c)[None, :], y.to(dtype), mask=mine[:, None])
