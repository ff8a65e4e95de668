"""CPU kernels for images in channels_last: depthwise 3x3 convolutions, layer norm over channels, and what follows them.

Importing this module compiles them, or loads them from a disk cache. Memory is what they cost, so each reads its inputs
and writes its result once. Images are dense (b, h, w, c), c at least 16.
"""

import math

from numba import types

from dpmambair_basicsr.ops.selective_scan.numba.runtime import LANES
from dpmambair_basicsr.ops.selective_scan.numba.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    Address,
    Integer,
    fma,
    gelu,
    kernel,
    load,
    silu,
    splat,
    store,
    subroutine,
    total,
    zeros,
)

GROUP = 4  # neighbouring pixels that share the values and weights that are loaded
TILE = 64  # columns: three rows of a tile stay in the second-level cache

_sizes = types.UniTuple(Integer, 3)  # h, w, c


@subroutine
def _place(block, channels):
    """Offset of a block's 16 channels; the last overlaps the one before, which gives its channels the same values."""
    return min(block * LANES, channels - LANES) * FLOAT_BYTES


@subroutine
def _pixel(sums, source, rows, columns, sizes, weights, bias):
    """The convolution of one pixel.

    Args:
        sums: receives the c sums.
        source: address of the pixel.
        rows, columns: (first, last + 1) of 0, 1, 2: those taps that are inside the image.
        weights, bias: (9, c) and (c,).
    """
    _, width, channels = sizes
    pixel = channels * FLOAT_BYTES
    for block in range((channels + LANES - 1) // LANES):
        place = _place(block, channels)
        value = load(bias + place)
        for i in range(rows[0], rows[1]):
            for j in range(columns[0], columns[1]):
                x = load(source + ((i - 1) * width + j - 1) * pixel + place)
                value = fma(x, load(weights + (3 * i + j) * pixel + place), value)
        store(sums + place, value)


@subroutine
def _group(sums, source, rows, sizes, weights, bias):
    """As `_pixel` for four neighbours whose columns are all inside the image, in the same order of additions."""
    _, width, channels = sizes
    pixel = channels * FLOAT_BYTES
    for block in range((channels + LANES - 1) // LANES):
        place = _place(block, channels)
        y0 = y1 = y2 = y3 = load(bias + place)
        for i in range(rows[0], rows[1]):
            row, taps = source + ((i - 1) * width - 1) * pixel + place, weights + 3 * i * pixel + place
            left, middle, right = load(taps), load(taps + pixel), load(taps + 2 * pixel)
            x0, x1, x2 = load(row), load(row + pixel), load(row + 2 * pixel)
            y0 = fma(x2, right, fma(x1, middle, fma(x0, left, y0)))
            x3 = load(row + 3 * pixel)
            y1 = fma(x3, right, fma(x2, middle, fma(x1, left, y1)))
            x4 = load(row + 4 * pixel)
            y2 = fma(x4, right, fma(x3, middle, fma(x2, left, y2)))
            y3 = fma(load(row + 5 * pixel), right, fma(x4, middle, fma(x3, left, y3)))
        store(sums + place, y0)
        store(sums + pixel + place, y1)
        store(sums + 2 * pixel + place, y2)
        store(sums + 3 * pixel + place, y3)


@subroutine
def _convolve(sums, count, source, y, x, sizes, weights, bias):
    """The convolution of `count` pixels from column x on, 1 or GROUP; `source` is the address of the first."""
    height, width, _ = sizes
    rows = 1 if y == 0 else 0, 2 if y == height - 1 else 3
    if count == GROUP:
        _group(sums, source, rows, sizes, weights, bias)
    else:
        _pixel(sums, source, rows, (1 if x == 0 else 0, 2 if x == width - 1 else 3), sizes, weights, bias)


@subroutine
def _count(x, end, width):
    """How many pixels from column x on are computed together."""
    return GROUP if x > 0 and x + GROUP <= min(end, width - 1) else 1


@kernel(_sizes, Address, Address, Address, Address, Integer, Integer, Address)
def depthwise_silu(sizes, image, weights, bias, result, first, last, scratch):
    """silu(convolution) of the rows [first, last), counted over the batch; `scratch`: GROUP * c floats."""
    height, width, channels = sizes
    pixel = channels * FLOAT_BYTES
    for tile in range(0, width, TILE):
        end = min(width, tile + TILE)
        for row in range(first, last):
            x = tile
            while x < end:
                here, count = (row * width + x) * pixel, _count(x, end, width)
                _convolve(scratch, count, image + here, row % height, x, sizes, weights, bias)
                for i in range(count):
                    for block in range((channels + LANES - 1) // LANES):
                        place = i * pixel + _place(block, channels)
                        store(result + here + place, silu(load(scratch + place)))
                x += count


@kernel(_sizes, *(Address,) * 7, Integer, Integer, Address)
def depthwise_gelu_gate(
    sizes, gate, gate_weights, gate_bias, value, value_weights, value_bias, result, first, last, scratch
):
    """gelu(convolution of gate) * (convolution of value); `scratch`: 2 * GROUP * c floats."""
    height, width, channels = sizes
    pixel = channels * FLOAT_BYTES
    others = scratch + GROUP * pixel
    for tile in range(0, width, TILE):
        end = min(width, tile + TILE)
        for row in range(first, last):
            x = tile
            while x < end:
                here, count, y = (row * width + x) * pixel, _count(x, end, width), row % height
                _convolve(scratch, count, gate + here, y, x, sizes, gate_weights, gate_bias)
                _convolve(others, count, value + here, y, x, sizes, value_weights, value_bias)
                for i in range(count):
                    for block in range((channels + LANES - 1) // LANES):
                        place = i * pixel + _place(block, channels)
                        store(result + here + place, gelu(load(scratch + place)) * load(others + place))
                x += count


@kernel(Integer, Address, Address, Address, types.float32, Address, Address, Integer, Integer)
def layer_norm(channels, x, weight, bias, eps, gate, result, first, last):
    """Layer norm over c, a multiple of 16, of the pixels [first, last); times silu(gate), unless that is address 0."""
    pixel = channels * FLOAT_BYTES
    for i in range(first, last):
        here = x + i * pixel
        sums = zeros()
        for c in range(0, pixel, VECTOR_BYTES):
            sums = sums + load(here + c)
        mean = splat(total(sums) / types.float32(channels))
        sums = zeros()
        for c in range(0, pixel, VECTOR_BYTES):
            difference = load(here + c) - mean
            sums = fma(difference, difference, sums)
        scale = splat(types.float32(1.0 / math.sqrt(total(sums) / types.float32(channels) + eps)))
        for c in range(0, pixel, VECTOR_BYTES):
            value = fma((load(here + c) - mean) * scale, load(weight + c), load(bias + c))
            if gate:
                value = value * silu(load(gate + i * pixel + c))
            store(result + i * pixel + c, value)
