"""Read an image as sequences along several directions, and sum such sequences back into an image.

Directions, in VMamba's order (Liu et al. 2024, section 4.2; VmambaIR, Shi et al. 2024, uses the same), on a 2 x 3 image
    a b c
    d e f
0: row by row, a b c d e f; 1: column by column, a d b e c f; 2: 0 reversed; 3: 1 reversed.

Shapes: b batch, c channels, h, w height and width, l = h * w, k = len(directions).
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

DIRECTIONS = (0, 1, 2, 3)


def cross_scan(x: Tensor, directions: Sequence[int] = DIRECTIONS) -> Tensor:
    """Read (b, c, h, w) in the given directions: (b, k, c, l). For directions=(0,), a view of a contiguous image."""
    _check(directions)
    if x.dim() != 4:
        raise ValueError(f'cross_scan: x must be (b, c, h, w), got {tuple(x.shape)}')
    if len(directions) > 1:
        x = x.contiguous()  # copies a channels_last image once, not once per direction
    sequences = [_to_sequence(x, direction) for direction in directions]
    return sequences[0].unsqueeze(1) if len(sequences) == 1 else torch.stack(sequences, dim=1)


def cross_merge(ys: Tensor, size: tuple[int, int], directions: Sequence[int] = DIRECTIONS) -> Tensor:
    """Put the sequences (b, k, c, l) back in image order and sum them over k: (b, c, h, w), where size = (h, w).

    The adjoint of `cross_scan`, so merging a scanned image gives k times the image. For directions=(0,), a view.
    """
    _check(directions)
    h, w = size
    if ys.dim() != 4 or ys.shape[1] != len(directions) or ys.shape[3] != h * w:
        raise ValueError(
            f'cross_merge: ys must be (b, {len(directions)}, c, {h * w}) for size {h} x {w} and directions '
            f'{tuple(directions)}, got {tuple(ys.shape)}'
        )
    images = (_to_image(y, h, w, direction) for y, direction in zip(ys.unbind(1), directions, strict=True))
    return reduce(torch.add, images)


def _to_sequence(x, direction):
    if direction in (1, 3):
        x = x.transpose(2, 3)
    sequence = x.flatten(2)
    return sequence.flip(-1) if direction in (2, 3) else sequence


def _to_image(y, h, w, direction):
    if direction in (2, 3):
        y = y.flip(-1)
    if direction in (1, 3):
        return y.unflatten(-1, (w, h)).transpose(2, 3)
    return y.unflatten(-1, (h, w))


def _check(directions):
    if not directions or any(direction not in DIRECTIONS for direction in directions):
        raise ValueError(f'directions must be one or more of {DIRECTIONS}, got {directions!r}')
