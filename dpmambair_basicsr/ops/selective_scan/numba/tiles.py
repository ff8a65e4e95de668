"""The computation of a block and chunk, and the copies to and from small dense tiles in the first-level cache.

A block is 16 neighbouring channels, a vector. A chunk is `CHUNK` successive positions of a sequence. For these,

- u, delta, y and their gradients are (CHUNK, 16) tiles, a vector per position;
- B, C and their gradients are (n, CHUNK) tiles, a float per state and position, broadcast to a vector when used.

One state after another then runs along the chunk in registers. Channels of a block beyond the end of their group are
zero in u, A, D, delta_bias and dy, and so contribute nothing. The parameters of a block are (n + 2 or more, 16):
A * log2(e), D, delta_bias.
"""

import math

from dpmambair_basicsr.ops.selective_scan.numba.runtime import CHUNK, LANES
from dpmambair_basicsr.ops.selective_scan.numba.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    Address,
    Integer,
    broadcast,
    exp2,
    fma,
    kernel,
    load,
    load_float,
    prefetch_read,
    prefetch_write,
    row_sums,
    sigmoid,
    softplus,
    splat,
    store,
    store_float,
    subroutine,
    transpose,
    zeros,
)

ROW = FLOAT_BYTES * CHUNK  # bytes of a row of an (n, CHUNK) tile
# Bytes of a (CHUNK, 16) tile and a gap: loads and stores 4096 bytes apart alias and stall.
_TILE = (CHUNK + 21) * VECTOR_BYTES

_LN_2 = math.log(2)

# Offsets of the (CHUNK, 16) tiles of the forward pass: inputs u and delta, result y.
TILE_U, TILE_DELTA, TILE_Y = (i * _TILE for i in range(3))
FORWARD_TILES = 3 * _TILE
# The same for the backward pass: inputs u, delta and dy, results du and ddelta.
BACK_U, BACK_DELTA, BACK_DY, BACK_DU, BACK_DDELTA = (i * _TILE for i in range(5))
BACK_SCRATCH, _SLOPE, _DRIVE, _DECAY, _KEPT = (i * _TILE for i in range(5, 10))
BACKWARD_TILES = 10 * _TILE


@subroutine
def clear(target, size):
    """Zero `size` bytes, a multiple of a vector's size."""
    for i in range(0, size, VECTOR_BYTES):
        store(target + i, zeros())


@subroutine
def copy(target, source, size):
    for i in range(0, size, VECTOR_BYTES):
        store(target + i, load(source + i))


@subroutine
def gather(tile, pitch, source, row_stride, column_stride, rows, columns, ahead):
    """Copy `columns` floats of each row to the tile, its rows `pitch` bytes apart, zero-padded to 16 columns.

    The next tile of this source will be read `ahead` bytes from here: short pieces of many rows, which the CPU cannot
    predict. Prefetching them saves a tenth to a sixth of the time where the sequences exceed the cache.
    """
    for column in range(0, columns, LANES):
        source_block, tile_block = source + column * column_stride, tile + column * FLOAT_BYTES
        count = min(LANES, columns - column)
        row = 0
        if count == LANES and column_stride == FLOAT_BYTES:
            while row < rows:
                prefetch_read(source_block + row * row_stride + ahead)
                store(tile_block + row * pitch, load(source_block + row * row_stride))
                row += 1
        elif count == LANES and row_stride == FLOAT_BYTES:
            while row + LANES <= rows:
                source_rows = source_block + row * FLOAT_BYTES
                for i in range(LANES):
                    prefetch_read(source_rows + i * column_stride + ahead)
                transpose(tile_block + row * pitch, pitch, source_rows, column_stride)
                row += LANES
        while row < rows:
            if count < LANES:
                store(tile_block + row * pitch, zeros())
            for i in range(count):
                value = load_float(source_block + row * row_stride + i * column_stride)
                store_float(tile_block + row * pitch + i * FLOAT_BYTES, value)
            row += 1


@subroutine
def scatter(target, row_stride, column_stride, tile, pitch, rows, columns, ahead):
    """Copy `columns` floats of each row of the tile to the target; the next tile is written `ahead` bytes from here."""
    for column in range(0, columns, LANES):
        target_block, tile_block = target + column * column_stride, tile + column * FLOAT_BYTES
        count = min(LANES, columns - column)
        row = 0
        if count == LANES and column_stride == FLOAT_BYTES:
            while row < rows:
                prefetch_write(target_block + row * row_stride + ahead)
                store(target_block + row * row_stride, load(tile_block + row * pitch))
                row += 1
        elif count == LANES and row_stride == FLOAT_BYTES:
            while row + LANES <= rows:
                target_rows = target_block + row * FLOAT_BYTES
                for i in range(LANES):
                    prefetch_write(target_rows + i * column_stride + ahead)
                transpose(target_rows, column_stride, tile_block + row * pitch, pitch)
                row += LANES
        while row < rows:
            for i in range(count):
                value = load_float(tile_block + row * pitch + i * FLOAT_BYTES)
                store_float(target_block + row * row_stride + i * column_stride, value)
            row += 1


@subroutine
def add(target, value):
    store(target, load(target) + value)


@subroutine
def add_row_sums(row, tile, steps):
    """Sum a (CHUNK, 16) tile over its channels and add the sums to a row of an (n, CHUNK) tile."""
    for t in range(0, steps, LANES):
        add(row + t * FLOAT_BYTES, row_sums(tile + t * VECTOR_BYTES))


@subroutine
def forward_chunk(n, steps, delta_softplus, parameters, h, tiles, tile_B, tile_C):
    """Compute y from u and delta, and advance the states h (n, 16) over the chunk. Overwrites u and delta."""
    tile_drive, tile_step, tile_y = tiles + TILE_U, tiles + TILE_DELTA, tiles + TILE_Y
    D, delta_bias = load(parameters + n * VECTOR_BYTES), load(parameters + (n + 1) * VECTOR_BYTES)
    for t in range(0, steps * VECTOR_BYTES, VECTOR_BYTES):
        step, u_t = load(tile_step + t) + delta_bias, load(tile_drive + t)
        if delta_softplus:
            step = softplus(step)
        store(tile_step + t, step)
        store(tile_drive + t, step * u_t)
        store(tile_y + t, D * u_t)
    for state in range(n):
        A_n, h_n = load(parameters + state * VECTOR_BYTES), load(h + state * VECTOR_BYTES)
        B_n, C_n = tile_B + state * ROW, tile_C + state * ROW
        for t in range(steps):
            i, j = t * VECTOR_BYTES, t * FLOAT_BYTES
            decay = exp2(load(tile_step + i) * A_n)
            h_n = fma(decay, h_n, load(tile_drive + i) * broadcast(B_n + j))
            store(tile_y + i, fma(h_n, broadcast(C_n + j), load(tile_y + i)))
        store(h + state * VECTOR_BYTES, h_n)


@subroutine
def backward_chunk(
    n, steps, delta_softplus, parameters, h, adjoint, dparameters, tiles, tile_B, tile_C, tile_dB, tile_dC
):
    """Compute du and ddelta from u, delta and dy.

    Args:
        h: (n, 16), the states before the chunk.
        adjoint: (n, 16), the gradients of the states after the chunk; replaced by the gradients of those before it.
        dparameters: (n + 2, 16); the gradients of the parameters are added, A's without the factor log2(e).
        tile_dB, tile_dC: the gradients of B and C are added.
    """
    tile_u, tile_step, tile_dy, tile_slope = tiles + BACK_U, tiles + BACK_DELTA, tiles + BACK_DY, tiles + _SLOPE
    tile_drive, tile_decay, tile_product = tiles + _DRIVE, tiles + _DECAY, tiles + BACK_SCRATCH
    tile_kept = tiles + _KEPT  # decay * h before the step: the part of the state that is kept
    tile_ddrive = tiles + BACK_DU
    tile_dlog = tiles + BACK_DDELTA  # sum over n of A * (gradient of the decay's exponent)
    D, delta_bias = load(parameters + n * VECTOR_BYTES), load(parameters + (n + 1) * VECTOR_BYTES)
    for t in range(0, steps * VECTOR_BYTES, VECTOR_BYTES):
        step = load(tile_step + t) + delta_bias
        if delta_softplus:
            store(tile_slope + t, sigmoid(step))
            step = softplus(step)
        store(tile_step + t, step)
        store(tile_drive + t, step * load(tile_u + t))
        store(tile_ddrive + t, zeros())
        store(tile_dlog + t, zeros())
    for state in range(n):
        A_n, h_n = load(parameters + state * VECTOR_BYTES), load(h + state * VECTOR_BYTES)
        B_n, C_n = tile_B + state * ROW, tile_C + state * ROW
        for t in range(steps):
            i = t * VECTOR_BYTES
            decay = exp2(load(tile_step + i) * A_n)
            store(tile_decay + i, decay)
            store(tile_kept + i, decay * h_n)
            h_n = fma(decay, h_n, load(tile_drive + i) * broadcast(B_n + t * FLOAT_BYTES))
            store(tile_product + i, h_n * load(tile_dy + i))
        add_row_sums(tile_dC + state * ROW, tile_product, steps)
        dh, dA_n, decay = load(adjoint + state * VECTOR_BYTES), zeros(), splat(1.0)
        for t in range(steps - 1, -1, -1):
            i, j = t * VECTOR_BYTES, t * FLOAT_BYTES
            dh = fma(decay, dh, load(tile_dy + i) * broadcast(C_n + j))
            decay = load(tile_decay + i)
            store(tile_product + i, dh * load(tile_drive + i))
            store(tile_ddrive + i, fma(dh, broadcast(B_n + j), load(tile_ddrive + i)))
            dexponent = dh * load(tile_kept + i)
            store(tile_dlog + i, fma(dexponent, A_n, load(tile_dlog + i)))
            dA_n = fma(dexponent, load(tile_step + i), dA_n)
        store(adjoint + state * VECTOR_BYTES, decay * dh)
        add(dparameters + state * VECTOR_BYTES, dA_n)
        add_row_sums(tile_dB + state * ROW, tile_product, steps)
    ln_2, dD, dbias = splat(_LN_2), zeros(), zeros()
    for t in range(0, steps * VECTOR_BYTES, VECTOR_BYTES):
        u_t, dy_t, ddrive = load(tile_u + t), load(tile_dy + t), load(tile_ddrive + t)
        ddelta_t = fma(ln_2, load(tile_dlog + t), ddrive * u_t)
        if delta_softplus:
            ddelta_t = ddelta_t * load(tile_slope + t)
        store(tile_dlog + t, ddelta_t)
        store(tile_ddrive + t, fma(ddrive, load(tile_step + t), dy_t * D))
        dD, dbias = fma(dy_t, u_t, dD), dbias + ddelta_t
    add(dparameters + n * VECTOR_BYTES, dD)
    add(dparameters + (n + 1) * VECTOR_BYTES, dbias)


@kernel(Integer, Address, Integer, Integer, Address, Integer, Integer, Integer, Integer)
def add_parts(parts, source, part_stride, source_stride, target, target_stride, columns, first, last):
    """Sum `parts` arrays in order: the first `columns` floats of rows [first, last), `source_stride` bytes apart."""
    for row in range(first, last):
        source_row, target_row = source + row * source_stride, target + row * target_stride
        vectors = columns // LANES * VECTOR_BYTES
        for i in range(0, vectors, VECTOR_BYTES):
            total = load(source_row + i)
            for part in range(1, parts):
                total = total + load(source_row + part * part_stride + i)
            store(target_row + i, total)
        for i in range(vectors, columns * FLOAT_BYTES, FLOAT_BYTES):
            rest = load_float(source_row + i)
            for part in range(1, parts):
                rest += load_float(source_row + part * part_stride + i)
            store_float(target_row + i, rest)
