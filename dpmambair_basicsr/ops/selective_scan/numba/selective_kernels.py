"""CPU kernels of the selective scan in numba. Importing this module compiles them, or loads them from a disk cache.

The inputs of a block and chunk are gathered, whatever their strides. The forward pass keeps the initial state of each
chunk; the backward pass recomputes the others from these, chunk by chunk.
"""

from numba import types

from dpmambair_basicsr.ops.selective_scan.numba.runtime import CHUNK, LANES
from dpmambair_basicsr.ops.selective_scan.numba.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    Address,
    Integer,
    kernel,
    subroutine,
)
from dpmambair_basicsr.ops.selective_scan.numba.tiles import (
    BACK_DDELTA,
    BACK_DELTA,
    BACK_DU,
    BACK_DY,
    BACK_U,
    BACKWARD_TILES,
    FORWARD_TILES,
    ROW,
    TILE_DELTA,
    TILE_U,
    TILE_Y,
    backward_chunk,
    clear,
    copy,
    forward_chunk,
    gather,
    scatter,
)

_sizes = types.UniTuple(Integer, 4)  # groups, channels per group, n, l
_view_u = types.UniTuple(Integer, 4)  # address of (b, d, l) and its strides
_view_B = types.UniTuple(Integer, 5)  # address of (b, g, n, l) and its strides


@subroutine
def _place(view, i, j, k):
    return view[0] + i * view[1] + j * view[2] + k * view[3]


def forward_scratch(n):
    """Size of `forward`'s scratch memory, in floats."""
    return (FORWARD_TILES + 2 * n * ROW + n * VECTOR_BYTES) // FLOAT_BYTES


@kernel(_sizes, types.boolean, _view_u, _view_u, Address, _view_B, _view_B, _view_u, Address, Integer, Integer, Address)
def forward(sizes, delta_softplus, u, delta, parameters, B, C, y, states, first, last, scratch):
    """Compute the outputs of the blocks [first, last), counted over (b, g, blocks of a group).

    Args:
        parameters: (g * blocks, n + 2, 16); per block A * log2(e), D, delta_bias.
        states: (b * g * blocks, chunks, n, 16), receives the initial state of each chunk; or address 0.
    """
    groups, width, n, length = sizes
    blocks, chunks = (width + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    tiles, tile_B = scratch, scratch + FORWARD_TILES
    tile_C = tile_B + n * ROW
    h = tile_C + n * ROW
    for number in range(first, last):
        sample, group, block = number // (groups * blocks), number // blocks % groups, number % blocks
        channel, lanes = group * width + block * LANES, min(LANES, width - block * LANES)
        block_parameters = parameters + (group * blocks + block) * (n + 2) * VECTOR_BYTES
        u_block, delta_block = _place(u, sample, channel, 0), _place(delta, sample, channel, 0)
        y_block = _place(y, sample, channel, 0)
        B_group = B[0] + sample * B[1] + group * B[2]
        C_group = C[0] + sample * C[1] + group * C[2]
        clear(h, n * VECTOR_BYTES)
        for chunk in range(chunks):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            if states:
                copy(states + (number * chunks + chunk) * n * VECTOR_BYTES, h, n * VECTOR_BYTES)
            u_chunk, delta_chunk = u_block + start * u[3], delta_block + start * delta[3]
            gather(tiles + TILE_U, VECTOR_BYTES, u_chunk, u[3], u[2], steps, lanes, CHUNK * u[3])
            gather(tiles + TILE_DELTA, VECTOR_BYTES, delta_chunk, delta[3], delta[2], steps, lanes, CHUNK * delta[3])
            gather(tile_B, ROW, B_group + start * B[4], B[3], B[4], n, steps, CHUNK * B[4])
            gather(tile_C, ROW, C_group + start * C[4], C[3], C[4], n, steps, CHUNK * C[4])
            forward_chunk(n, steps, delta_softplus, block_parameters, h, tiles, tile_B, tile_C)
            scatter(y_block + start * y[3], y[3], y[2], tiles + TILE_Y, VECTOR_BYTES, steps, lanes, CHUNK * y[3])


def backward_scratch(n):
    """Size of `backward`'s scratch memory, in floats."""
    return (BACKWARD_TILES + 4 * n * ROW) // FLOAT_BYTES


@kernel(
    *(_sizes, types.boolean, _view_u, _view_u, Address, _view_B, _view_B, _view_u, Address),
    *(_view_u, _view_u, Address, Address, _view_u, _view_u),
    *(Integer, Integer, Integer, Integer, Integer, Address),
)
def backward(
    sizes,
    delta_softplus,
    u,
    delta,
    parameters,
    B,
    C,
    dy,
    states,
    du,
    ddelta,
    dparameters,
    adjoints,
    dB,
    dC,
    parts,
    first_chunk,
    last_chunk,
    first,
    last,
    scratch,
):
    """Compute the gradients in the chunks [first_chunk, last_chunk); call it from the end of the sequence to its start.

    The blocks of each group are distributed over `parts`; [first, last) are parts, counted over (b, g, parts).

    Args:
        parameters, states: as in `forward`, states filled.
        dparameters: (b * g * blocks, n + 2, 16), initially zero; the gradients of A, D, delta_bias are added.
        adjoints: (b * g * blocks, n, 16), initially zero; the gradients of the states that the last call started from.
        dB, dC: (parts, b * g * n, positions in these chunks); each part writes the sums over its blocks.
    """
    groups, width, n, length = sizes
    blocks, chunks = (width + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    tiles, tile_B = scratch, scratch + BACKWARD_TILES
    tile_C = tile_B + n * ROW
    tile_dB = tile_C + n * ROW
    tile_dC = tile_dB + n * ROW
    for number in range(first, last):
        sample, group, part = number // (groups * parts), number // parts % groups, number % parts
        first_block, last_block = blocks * part // parts, blocks * (part + 1) // parts
        B_group = B[0] + sample * B[1] + group * B[2]
        C_group = C[0] + sample * C[1] + group * C[2]
        for chunk in range(last_chunk - 1, first_chunk - 1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            gather(tile_B, ROW, B_group + start * B[4], B[3], B[4], n, steps, -CHUNK * B[4])
            gather(tile_C, ROW, C_group + start * C[4], C[3], C[4], n, steps, -CHUNK * C[4])
            clear(tile_dB, n * ROW)
            clear(tile_dC, n * ROW)
            for block in range(first_block, last_block):
                channel, lanes = group * width + block * LANES, min(LANES, width - block * LANES)
                block_parameters = parameters + (group * blocks + block) * (n + 2) * VECTOR_BYTES
                block_number = (sample * groups + group) * blocks + block
                h = states + (block_number * chunks + chunk) * n * VECTOR_BYTES
                dblock = dparameters + block_number * (n + 2) * VECTOR_BYTES
                adjoint = adjoints + block_number * n * VECTOR_BYTES
                # offset of the next unit in channels and positions: the next block or, after the last, the chunk before
                onward, back = (LANES, 0) if block + 1 < last_block else ((first_block - block) * LANES, CHUNK)
                place, ahead = _place(u, sample, channel, start), onward * u[2] - back * u[3]
                gather(tiles + BACK_U, VECTOR_BYTES, place, u[3], u[2], steps, lanes, ahead)
                place, ahead = _place(delta, sample, channel, start), onward * delta[2] - back * delta[3]
                gather(tiles + BACK_DELTA, VECTOR_BYTES, place, delta[3], delta[2], steps, lanes, ahead)
                place, ahead = _place(dy, sample, channel, start), onward * dy[2] - back * dy[3]
                gather(tiles + BACK_DY, VECTOR_BYTES, place, dy[3], dy[2], steps, lanes, ahead)
                # fmt: off
                backward_chunk(n, steps, delta_softplus, block_parameters, h, adjoint, dblock,
                               tiles, tile_B, tile_C, tile_dB, tile_dC)
                # fmt: on
                place, ahead = _place(du, sample, channel, start), onward * du[2] - back * du[3]
                scatter(place, du[3], du[2], tiles + BACK_DU, VECTOR_BYTES, steps, lanes, ahead)
                place, ahead = _place(ddelta, sample, channel, start), onward * ddelta[2] - back * ddelta[3]
                scatter(place, ddelta[3], ddelta[2], tiles + BACK_DDELTA, VECTOR_BYTES, steps, lanes, ahead)
            row, column = (sample * groups + group) * n, start - first_chunk * CHUNK
            place, ahead = _place(dB, part, row, column), -CHUNK * dB[3]
            scatter(place, dB[2], dB[3], tile_dB, ROW, n, steps, ahead)
            place, ahead = _place(dC, part, row, column), -CHUNK * dC[3]
            scatter(place, dC[2], dC[3], tile_dC, ROW, n, steps, ahead)
