"""Image statistics that tell haze, rain, snow, darkness, blur, noise and JPEG apart; NumPy and OpenCV only.

They are classical: the dark channel (He et al., CVPR 2009), second differences as a measure of noise (Immerkaer, CVIU
1996), morphological top-hats for bright spots and streaks, differences across the grid of 8 x 8 blocks.
"""

import cv2
import numpy as np

SMALL = 1e-4  # added before logarithms, in [0, 1]
VISIBLE = 0.01  # smaller differences in brightness are invisible
EDGE = 0.05  # larger differences are edges of the scene, not of blocks
STEP = 3  # percentiles are taken of every third row and column
LAPLACIAN = np.float32([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6  # unit variance for white noise of unit variance


def image_statistics(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB float32 in [0, 1], of any size -> (67,) float32."""
    below, right = (max(32 - side, 0) for side in image.shape[:2])
    image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REFLECT)
    luminance = image @ np.float32([0.299, 0.587, 0.114])
    chroma = image[..., 0] - image[..., 2]
    darkest = cv2.erode(image.min(axis=2), np.ones((7, 7), np.uint8))
    parts = [
        percentiles(luminance, 1, 10, 50, 90, 99),
        percentiles(darkest, 10, 50, 90),
        [luminance.std(), np.abs(chroma).mean()],
        *(fine_detail(plane) for plane in (luminance, chroma)),
        directions(luminance),
        *(spots(luminance, size) for size in (3, 5, 9)),
        *(blocks(luminance, axis) for axis in (0, 1)),
        [(np.abs(np.diff(plane, axis=1)) < 0.5 / 255).mean() for plane in (luminance, chroma)],
    ]
    return np.concatenate(parts).astype(np.float32)


def percentiles(plane: np.ndarray, *which: float) -> np.ndarray:
    return np.percentile(plane[::STEP, ::STEP], which)


def fine_detail(plane: np.ndarray) -> np.ndarray:
    """Strength of detail of one, two and four pixels, from the smoothest to the busiest regions: noise, blur."""
    parts = []
    for _ in range(3):
        strength = cv2.blur(np.abs(cv2.filter2D(plane, -1, LAPLACIAN)), (7, 7))
        parts.append(np.log(percentiles(strength, 5, 25, 50, 75, 95) + SMALL))
        plane = cv2.resize(plane, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return np.concatenate(parts)


def directions(plane: np.ndarray) -> np.ndarray:
    """Differences along rows, columns and both diagonals, relative to each other, and the smallest: motion, rain."""
    here = plane[1:, 1:]
    differences = here - plane[1:, :-1], here - plane[:-1, 1:], here - plane[:-1, :-1], plane[1:, :-1] - plane[:-1, 1:]
    strength = np.log(np.array([np.abs(part).mean() for part in differences]) + SMALL)
    strength = strength - strength.mean()
    return np.append(strength, strength.min())


def spots(plane: np.ndarray, size: int) -> np.ndarray:
    """Amount of structure brighter than its surroundings of `size` pixels, and its excess over darker structure."""
    kernel = np.ones((size, size), np.uint8)
    bright, dark = (
        percentiles(np.abs(plane - cv2.morphologyEx(plane, operation, kernel)), 75, 99)
        for operation in (cv2.MORPH_OPEN, cv2.MORPH_CLOSE)
    )
    return np.concatenate([np.log(bright + SMALL), np.log(bright + VISIBLE) - np.log(dark + VISIBLE)])


def blocks(plane: np.ndarray, axis: int) -> np.ndarray:
    """How much first and second differences vary with the position in a block of 8, for any grid offset: JPEG."""
    parts = []
    for order in (1, 2):
        strength = np.minimum(np.abs(np.diff(plane, n=order, axis=axis)), EDGE).mean(axis=1 - axis)
        places = strength[: len(strength) // 8 * 8].reshape(-1, 8).mean(axis=0) + SMALL
        parts += [np.log(places.max() / np.median(places)), np.log(places.max() / places.min())]
    return np.array(parts)
