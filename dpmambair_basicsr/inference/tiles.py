"""Overlapping tiles, for networks whose memory grows with the area. Lengths are in pixels of the input."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

Span = tuple[int, int]  # first pixel, one past the last


def tile_spans(length: int, tile: int, overlap: int, stride: int) -> list[Span]:
    """The fewest spans of `tile` pixels that cover `length` and overlap by at least `overlap`, evenly spaced.

    Args:
        length: a multiple of stride, as are the first pixels of the spans: tiles share the grid of the whole image.
        tile: rounded down to a multiple of stride.
        overlap: rounded down to a multiple of stride, and to at most half a tile.

    Raises:
        ValueError: tile is smaller than stride, overlap is negative, or one of them is not an int.
    """
    for name, value in (('tile', tile), ('overlap', overlap)):
        if not isinstance(value, Integral):
            raise ValueError(f'{name}: expected int, got {value!r}')
    if tile < stride or overlap < 0:
        raise ValueError(
            f'tile: {tile} with overlap {overlap}; a tile must be at least {stride} pixels, an overlap at least 0'
        )
    tile = tile // stride * stride
    overlap = min(overlap, tile // 2) // stride * stride
    if tile >= length:
        return [(0, length)]
    last = math.ceil((length - tile) / (tile - overlap))
    starts = [(length - tile) * index // last // stride * stride for index in range(last + 1)]
    return [(start, start + tile) for start in starts]


def blend_weights(spans: list[Span], scale: int = 1) -> list[Tensor]:
    """Blending weights of each span's output pixels; at each pixel they sum to 1.

    Across an overlap, the weight is 0 in the outer quarter, then rises by half a period of a cosine to 1: pixels near a
    tile's border, which lack their surroundings, are not used. At the border of the image the weight is 1.

    Args:
        spans: from `tile_spans`.
        scale: output pixels per input pixel.
    """
    length = spans[-1][1] * scale
    overlap = min((end - first for (_, end), (first, _) in pairwise(spans)), default=0) * scale
    weights = []
    for first, end in spans:
        weight = torch.ones((end - first) * scale)
        ramp = ((torch.arange(overlap) + 0.5) / max(overlap, 1) * 2 - 0.5).clamp(0, 1)
        ramp = (1 - torch.cos(math.pi * ramp)) / 2
        if first > 0:
            weight[:overlap] *= ramp
        if end * scale < length:
            weight[len(weight) - overlap :] *= ramp.flip(0)
        weights.append(weight)
    total = torch.zeros(length)
    for (first, end), weight in zip(spans, weights, strict=True):
        total[first * scale : end * scale] += weight
    return [weight / total[first * scale : end * scale] for (first, end), weight in zip(spans, weights, strict=True)]


def tiled(
    function: Callable[[Tensor], Tensor], image: Tensor, rows: list[Span], columns: list[Span], scale: int
) -> Iterator[Tensor]:
    """function(image), computed tile by tile and blended, in bands from top to bottom.

    Exact for a single tile, and for any function whose receptive field reaches at most a quarter of the overlap.

    Args:
        function: (b, c, h, w) -> (b, c', scale * h, scale * w).
        image: (b, c, h, w).
        rows, columns: from `tile_spans`, for h and w.

    Yields:
        (b, c', any number of rows, scale * w), on the device of the function's output.
    """
    row_weights, column_weights = blend_weights(rows, scale), blend_weights(columns, scale)
    rest = None  # rows of the tiles above that the next tiles blend with
    for index, (top, bottom) in enumerate(rows):
        band = None  # (b, c', scale * (bottom - top), scale * w)
        for (left, right), weight in zip(columns, column_weights, strict=True):
            output = function(image[..., top:bottom, left:right])
            if band is None:
                band = output.new_zeros(*output.shape[:-1], scale * image.shape[-1])
            band[..., left * scale : right * scale] += output * weight.to(output)
        band *= row_weights[index].to(band)[:, None]
        if rest is not None:
            band[..., : rest.shape[-2], :] += rest
        done = (rows[index + 1][0] if index + 1 < len(rows) else bottom) - top
        yield band[..., : done * scale, :]
        rest = band[..., done * scale :, :]
