"""CPU kernels of the omni scan in numba. Importing this module compiles them, or loads them from a disk cache.

The pixels of a chunk, in a direction's scan order, are found by counting. Their rows of x and of the projections are
gathered into tiles, and results are scattered to the same pixels. So no direction needs a copy of the image, and step
sizes exist in tiles only.

Images are (b, h * w, d) in memory, their projections (b, h * w, k, r + 2n): low-rank step sizes, B and C.
The parameters of a block are (n + 2 + r, 16): A * log2(e), D, delta_bias, and the projection to step sizes. Samples are
`per_sample` bytes apart, 0 if all share them.
"""

from numba import types

from dpmambair_basicsr.ops.selective_scan.numba.runtime import CHUNK, LANES
from dpmambair_basicsr.ops.selective_scan.numba.simd import (
    FLOAT_BYTES,
    INTEGER_BYTES,
    VECTOR_BYTES,
    Address,
    Integer,
    broadcast,
    fma,
    kernel,
    load,
    load_float,
    load_integer,
    prefetch_read,
    prefetch_write,
    store,
    store_float,
    store_integer,
    subroutine,
    zeros,
)
from dpmambair_basicsr.ops.selective_scan.numba.tiles import (
    BACK_DDELTA,
    BACK_DELTA,
    BACK_DU,
    BACK_DY,
    BACK_SCRATCH,
    BACK_U,
    BACKWARD_TILES,
    FORWARD_TILES,
    ROW,
    TILE_DELTA,
    TILE_U,
    TILE_Y,
    add,
    add_row_sums,
    backward_chunk,
    clear,
    copy,
    forward_chunk,
    gather,
)

_PIXELS = CHUNK * INTEGER_BYTES  # bytes of the list of pixels of a chunk


@subroutine
def _find_pixels(pixels, direction, height, width, chunk):
    """Write the pixels of a chunk in a direction's scan order (see `cross_scan`); none outside the image."""
    start = chunk * CHUNK
    steps, position, stride = min(CHUNK, height * width - start), start, 1
    if direction & 2:
        position, stride = height * width - 1 - start, -1
    if direction & 1:
        row, column = position % height, position // height
        for t in range(steps):
            store_integer(pixels + t * INTEGER_BYTES, row * width + column)
            row += stride
            if row == height:
                row = 0
                column += 1
            elif row < 0:
                row = height - 1
                column -= 1
    else:
        for t in range(steps):
            store_integer(pixels + t * INTEGER_BYTES, position + t * stride)


@subroutine
def _gather_pixels(tile, pitch, source, stride, pixels, next_pixels, steps, columns):
    """Copy `columns` floats of each pixel to a row of the tile, zero-padded to 16 columns.

    The next pixels are prefetched, since the CPU cannot predict them.
    """
    for t in range(steps):
        row, place = tile + t * pitch, source + load_integer(pixels + t * INTEGER_BYTES) * stride
        if columns < LANES:
            store(row, zeros())
            for i in range(0, columns * FLOAT_BYTES, FLOAT_BYTES):
                store_float(row + i, load_float(place + i))
        else:
            ahead, end = load_integer(next_pixels + t * INTEGER_BYTES) * stride, (columns - LANES) * FLOAT_BYTES
            for i in range(0, end, VECTOR_BYTES):
                prefetch_read(source + ahead + i)
                store(row + i, load(place + i))
            prefetch_read(source + ahead + end)
            store(row + end, load(place + end))  # may overlap the previous one


@subroutine
def _scatter_pixels(target, stride, pixels, next_pixels, tile, pitch, steps, columns, accumulate):
    """Copy, or add if `accumulate`, the rows of the tile to the pixels; adding supports at most 16 columns."""
    for t in range(steps):
        row, place = tile + t * pitch, target + load_integer(pixels + t * INTEGER_BYTES) * stride
        if columns < LANES:
            for i in range(0, columns * FLOAT_BYTES, FLOAT_BYTES):
                value = load_float(row + i)
                store_float(place + i, load_float(place + i) + value if accumulate else value)
        else:
            ahead, end = load_integer(next_pixels + t * INTEGER_BYTES) * stride, (columns - LANES) * FLOAT_BYTES
            for i in range(0, end, VECTOR_BYTES):
                prefetch_write(target + ahead + i)
                store(place + i, load(row + i))
            prefetch_write(target + ahead + end)
            value = load(row + end)
            if accumulate:
                value = value + load(place + end)
            store(place + end, value)


@subroutine
def _project_steps(tile_delta, projections, pitch, weights, rank, steps):
    """Compute the step sizes of a block, before the bias, from the low-rank ones that start each projection row."""
    for t in range(steps):
        delta, place = zeros(), projections + t * pitch
        for i in range(rank):
            delta = fma(broadcast(place + i * FLOAT_BYTES), load(weights + i * VECTOR_BYTES), delta)
        store(tile_delta + t * VECTOR_BYTES, delta)


@subroutine
def _project_steps_back(tiles, projections, pitch, weights, dweights, rank, steps, tile_dprojections):
    """Add the gradients of `_project_steps`'s inputs to dweights and to the first rows of tile_dprojections."""
    for i in range(rank):
        weight, dweight = load(weights + i * VECTOR_BYTES), zeros()
        for t in range(steps):
            ddelta = load(tiles + BACK_DDELTA + t * VECTOR_BYTES)
            store(tiles + BACK_SCRATCH + t * VECTOR_BYTES, ddelta * weight)
            dweight = fma(ddelta, broadcast(projections + t * pitch + i * FLOAT_BYTES), dweight)
        add(dweights + i * VECTOR_BYTES, dweight)
        add_row_sums(tile_dprojections + i * ROW, tiles + BACK_SCRATCH, steps)


@subroutine
def _pitch(columns):
    """Bytes of a row of `columns` floats, in whole vectors."""
    return (columns + LANES - 1) // LANES * VECTOR_BYTES


def forward_scratch(n, rank, blocks):
    """Size of `forward`'s scratch memory, in floats."""
    projections = CHUNK * -(-(rank + 2 * n) // LANES) * VECTOR_BYTES
    return (FORWARD_TILES + projections + 2 * n * ROW + blocks * n * VECTOR_BYTES + 2 * _PIXELS) // FLOAT_BYTES


_sizes = types.UniTuple(Integer, 7)  # b, k, d, n, r, h, w


@kernel(_sizes, Address, Address, Address, Address, Integer, Address, Address, Integer, Integer, Integer, Address)
def forward(sizes, directions, x, projected, parameters, per_sample, y, states, teams, first, last, scratch):
    """Compute the outputs of the blocks [first, last), counted over (b, teams, blocks of an image).

    Args:
        directions: (k,) integers, distributed over `teams`; each team sums the outputs of its directions.
        parameters: (samples, k * blocks, n + 2 + r, 16).
        per_sample: bytes between samples' parameters.
        y: (teams, b, h * w, d).
        states: (b, k, blocks, chunks, n, 16), receives the initial state of each chunk; or address 0.
    """
    samples, orders, channels, n, rank, height, width = sizes
    length, blocks, columns = height * width, (channels + LANES - 1) // LANES, rank + 2 * n
    chunks, pitch, image = (length + CHUNK - 1) // CHUNK, _pitch(columns), length * channels * FLOAT_BYTES
    tiles, projections = scratch, scratch + FORWARD_TILES
    tile_B = projections + CHUNK * pitch
    tile_C = tile_B + n * ROW
    h = tile_C + n * ROW
    lists = h + blocks * n * VECTOR_BYTES
    number = first
    while number < last:
        sample, team, first_block = number // (blocks * teams), number // blocks % teams, number % blocks
        last_block = min(blocks, first_block + last - number)
        number += last_block - first_block
        x_image, y_image = x + sample * image, y + (team * samples + sample) * image
        first_order = orders * team // teams
        for order in range(first_order, orders * (team + 1) // teams):
            direction = load_integer(directions + order * INTEGER_BYTES)
            projected_order = projected + (sample * length * orders + order) * columns * FLOAT_BYTES
            clear(h, (last_block - first_block) * n * VECTOR_BYTES)
            _find_pixels(lists, direction, height, width, 0)
            for chunk in range(chunks):
                steps = min(CHUNK, length - chunk * CHUNK)
                pixels, next_pixels = lists + chunk % 2 * _PIXELS, lists + (chunk + 1) % 2 * _PIXELS
                _find_pixels(next_pixels, direction, height, width, chunk + 1)
                stride = orders * columns * FLOAT_BYTES
                _gather_pixels(projections, pitch, projected_order, stride, pixels, next_pixels, steps, columns)
                gather(tile_B, ROW, projections + rank * FLOAT_BYTES, FLOAT_BYTES, pitch, 2 * n, steps, 0)
                for block in range(first_block, last_block):
                    start, lanes = block * VECTOR_BYTES, min(LANES, channels - block * LANES)
                    block_parameters = parameters + sample * per_sample
                    block_parameters += (order * blocks + block) * (n + 2 + rank) * VECTOR_BYTES
                    weights = block_parameters + (n + 2) * VECTOR_BYTES
                    h_block = h + (block - first_block) * n * VECTOR_BYTES
                    if states:
                        place = (((sample * orders + order) * blocks + block) * chunks + chunk) * n
                        copy(states + place * VECTOR_BYTES, h_block, n * VECTOR_BYTES)
                    stride = channels * FLOAT_BYTES
                    # fmt: off
                    _gather_pixels(tiles + TILE_U, VECTOR_BYTES, x_image + start, stride, pixels, next_pixels, steps,
                                   lanes)
                    _project_steps(tiles + TILE_DELTA, projections, pitch, weights, rank, steps)
                    forward_chunk(n, steps, True, block_parameters, h_block, tiles, tile_B, tile_C)
                    _scatter_pixels(y_image + start, stride, pixels, next_pixels, tiles + TILE_Y, VECTOR_BYTES, steps,
                                    lanes, order > first_order)
                    # fmt: on


def backward_scratch(n, rank, blocks):
    """Size of `backward`'s scratch memory, in floats."""
    columns = rank + 2 * n
    projections = CHUNK * -(-columns // LANES) * VECTOR_BYTES
    rows = (2 * n + columns) * ROW
    return (BACKWARD_TILES + projections + rows + blocks * n * VECTOR_BYTES + 2 * _PIXELS) // FLOAT_BYTES


@kernel(
    *(_sizes, Integer, Integer, Address, Address, Address, Integer, Address, Address),
    *(Address, Address, Integer, Integer, Address, Integer, Integer, Integer, Address),
)
def backward(
    sizes,
    order,
    direction,
    x,
    projected,
    parameters,
    per_sample,
    dy,
    states,
    dx,
    dprojected,
    dprojected_part,
    dprojected_pixel,
    dparameters,
    parts,
    first,
    last,
    scratch,
):
    """Compute the gradients through direction number `order` of k.

    The blocks of an image are distributed over `parts`; [first, last) are parts, counted over (b, parts).

    Args:
        parameters, per_sample, states: as in `forward`, states filled.
        dx: (b, h * w, d); overwritten if order is 0, otherwise added to.
        dprojected: (parts, b * h * w, r + 2n), both strides in bytes; receives each part's sums.
        dparameters: (b, k * blocks, n + 2 + r, 16), initially zero; the gradients are added.
    """
    samples, orders, channels, n, rank, height, width = sizes
    length, blocks, columns = height * width, (channels + LANES - 1) // LANES, rank + 2 * n
    chunks, pitch, image = (length + CHUNK - 1) // CHUNK, _pitch(columns), length * channels * FLOAT_BYTES
    tiles, projections = scratch, scratch + BACKWARD_TILES
    tile_B = projections + CHUNK * pitch
    tile_C = tile_B + n * ROW
    tile_dprojected = tile_C + n * ROW
    tile_dB = tile_dprojected + rank * ROW
    tile_dC = tile_dB + n * ROW
    adjoints = tile_dC + n * ROW
    lists = adjoints + blocks * n * VECTOR_BYTES
    stride, projected_stride = channels * FLOAT_BYTES, orders * columns * FLOAT_BYTES
    for number in range(first, last):
        sample, share = number // parts, number % parts
        first_block, last_block = blocks * share // parts, blocks * (share + 1) // parts
        projected_order = projected + (sample * length * orders + order) * columns * FLOAT_BYTES
        dprojected_share = dprojected + share * dprojected_part + sample * length * dprojected_pixel
        clear(adjoints, (last_block - first_block) * n * VECTOR_BYTES)
        _find_pixels(lists + (chunks - 1) % 2 * _PIXELS, direction, height, width, chunks - 1)
        for chunk in range(chunks - 1, -1, -1):
            steps = min(CHUNK, length - chunk * CHUNK)
            pixels, next_pixels = lists + chunk % 2 * _PIXELS, lists + (chunk + 1) % 2 * _PIXELS
            if chunk:
                _find_pixels(next_pixels, direction, height, width, chunk - 1)
            _gather_pixels(projections, pitch, projected_order, projected_stride, pixels, next_pixels, steps, columns)
            gather(tile_B, ROW, projections + rank * FLOAT_BYTES, FLOAT_BYTES, pitch, 2 * n, steps, 0)
            clear(tile_dprojected, columns * ROW)
            for block in range(first_block, last_block):
                start, lanes = sample * image + block * VECTOR_BYTES, min(LANES, channels - block * LANES)
                block_parameters = parameters + sample * per_sample
                block_parameters += (order * blocks + block) * (n + 2 + rank) * VECTOR_BYTES
                weights = block_parameters + (n + 2) * VECTOR_BYTES
                block_number = (sample * orders + order) * blocks + block
                h = states + (block_number * chunks + chunk) * n * VECTOR_BYTES
                dblock = dparameters + block_number * (n + 2 + rank) * VECTOR_BYTES
                adjoint = adjoints + (block - first_block) * n * VECTOR_BYTES
                _gather_pixels(tiles + BACK_U, VECTOR_BYTES, x + start, stride, pixels, next_pixels, steps, lanes)
                _gather_pixels(tiles + BACK_DY, VECTOR_BYTES, dy + start, stride, pixels, next_pixels, steps, lanes)
                _project_steps(tiles + BACK_DELTA, projections, pitch, weights, rank, steps)
                # fmt: off
                backward_chunk(n, steps, True, block_parameters, h, adjoint, dblock,
                               tiles, tile_B, tile_C, tile_dB, tile_dC)
                _project_steps_back(tiles, projections, pitch, weights, dblock + (n + 2) * VECTOR_BYTES, rank, steps,
                                    tile_dprojected)
                _scatter_pixels(dx + start, stride, pixels, next_pixels, tiles + BACK_DU, VECTOR_BYTES, steps, lanes,
                                order > 0)
                # fmt: on
            gather(projections, pitch, tile_dprojected, FLOAT_BYTES, ROW, steps, columns, 0)
            # fmt: off
            _scatter_pixels(dprojected_share, dprojected_pixel, pixels, next_pixels, projections, pitch, steps, columns,
                            False)
            # fmt: on
