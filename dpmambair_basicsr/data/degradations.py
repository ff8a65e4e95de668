"""Degradations as pure functions of an image and a random generator: the seven of the all-in-one benchmark, and three
more that networks for everyday photographs need: none, camera noise, and two at once.

DPMambaIR (arXiv 2504.17732), Eq. (6), describes all of them as I = Q((alpha J + beta gamma) * K): luminance alpha,
artefacts beta gamma, blur kernel K, compression Q. `form_image` is that equation; the functions choose its terms.

Images are (H, W, 3) RGB float32 in [0, 1], in and out, and are not rounded to 8 bits except by JPEG itself.
A parameter is a number, or a pair (low, high) from which each call draws uniformly. A fixed number advances the
generator just as a pair does, so a seed gives the same pattern at every strength.

The paper gives no parameters: all defaults are our choice. Two match its results (28.25 dB after denoising is typical
of sigma 50, 30.57 dB after JPEG restoration of quality 20 to 30); the others resemble the benchmark sets it trains on.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import cv2
import numpy as np

Range = float | Sequence[float]
IntRange = int | Sequence[int]


@dataclass(frozen=True)
class Degradation:
    """A registered degradation.

    Args:
        name: in option files, folders and reports.
        label: class label, what `degradation: class` of DPMambaIR embeds.
        function: of an image and a random generator; None: only available as stored pairs.
        demo: the parameters of the function in the demo, strong enough to be seen at a glance; None: not in the demo.
        term: of Eq. (6), one of `TERMS`: its place when two are composed; None: never composed.
    """

    name: str
    label: int
    function: Callable[..., np.ndarray] | None = None
    demo: dict | None = None
    term: str | None = None


TERMS = ('luminance', 'artefact', 'kernel', 'compression')  # alpha, beta gamma, K, Q, in this order
DEGRADATIONS: dict[str, Degradation] = {}  # by name, in the order of labels


def add_degradation(
    name: str,
    label: int,
    function: Callable[..., np.ndarray] | None = None,
    demo: dict | None = None,
    term: str | None = None,
) -> None:
    """Registers a degradation; see `Degradation` for the arguments.

    Raises:
        ValueError: the name is taken, the label is not the next free one (existing labels are in checkpoints), or the
            term is unknown.
    """
    if name in DEGRADATIONS:
        raise ValueError(f'degradation {name}: already registered')
    if label != len(DEGRADATIONS):
        raise ValueError(f'degradation {name}: label must be {len(DEGRADATIONS)}, the next one, got {label}')
    if term not in (*TERMS, None):
        raise ValueError(f'degradation {name}: term must be one of {", ".join(TERMS)}, got {term!r}')
    DEGRADATIONS[name] = Degradation(name, label, function, demo, term)


def degradation(label: int, demo: dict | None = None, term: str | None = None) -> Callable:
    """Decorator of a function (image, rng, parameters) -> image: registers it as the degradation of its name."""

    def add(function):
        add_degradation(function.__name__, label, function, demo, term)
        return function

    return add


def synthetic() -> list[str]:
    """Names of the degradations that have a function."""
    return [name for name, known in DEGRADATIONS.items() if known.function is not None]


def demo_strengths() -> dict[str, dict]:
    """{name: parameters} of the degradations in the demo."""
    return {name: known.demo for name, known in DEGRADATIONS.items() if known.demo is not None}


def degrade(image: np.ndarray, kind: str, rng: np.random.Generator, **parameters) -> np.ndarray:
    """Applies the degradation `kind` with the given parameters of its function.

    Raises:
        ValueError: unknown kind or parameter, value outside its meaning, or an image that is not (H, W, 3) float32.
    """
    if kind not in synthetic():
        problem = f'degradation {kind} has no function' if kind in DEGRADATIONS else f'unknown degradation {kind!r}'
        raise ValueError(f'{problem}, choose from {", ".join(synthetic())}')
    function = DEGRADATIONS[kind].function
    assert function is not None, 'true for all of `synthetic()`'
    choices = [name for name in inspect.signature(function).parameters if name not in ('image', 'rng')]
    for name in parameters:
        if name not in choices:
            raise ValueError(f'degradation {kind} has no parameter {name!r}, choose from {", ".join(choices)}')
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.float32:
        raise ValueError(f'degrade needs an (H, W, 3) float32 image, got {image.shape} {image.dtype}')
    return function(image, rng, **parameters)


def form_image(
    clean: np.ndarray,
    alpha: np.ndarray | float = 1.0,
    artefact: np.ndarray | float = 0.0,
    kernel: np.ndarray | None = None,
    quality: int | None = None,
) -> np.ndarray:
    """Eq. (6): Q((alpha J + beta gamma) * K), clipped to [0, 1].

    Args:
        clean: J, (H, W, 3).
        alpha: luminance, broadcast against J.
        artefact: the product beta gamma, broadcast against J.
        kernel: K, odd sides, sums to 1; the border is mirrored. None is the identity.
        quality: Q, the JPEG quality in [1, 100] (4:2:0 chroma, OpenCV's default). None is the identity.
    """
    image = clean * np.float32(alpha) + np.float32(artefact)
    if kernel is not None:
        image = cv2.filter2D(image, -1, kernel[::-1, ::-1])  # filter2D correlates: flipped, it convolves
    image = np.clip(image, 0, 1)
    if quality is not None:
        _, code = cv2.imencode('.jpg', to_uint8(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
        image = cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / 255
    return image


@degradation(label=0, demo={'beta': (1.0, 1.4), 'airlight': (0.85, 1.0)}, term='luminance')
def haze(
    image: np.ndarray, rng: np.random.Generator, beta: Range = (0.6, 1.8), airlight: Range = (0.7, 1.0)
) -> np.ndarray:
    """Atmospheric scattering: alpha = t, artefact = A (1 - t), t = exp(-beta d).

    The depth d is synthetic: smooth, between 0.25 and 1.25, farther towards the top.

    Args:
        beta: scattering per unit of depth, >= 0 (0.6 to 1.8: RESIDE, Li et al. 2019).
        airlight: A, brightness of the veil, in [0, 1].
    """
    beta = _draw(rng, 'beta', beta, 0, math.inf)
    airlight = _draw(rng, 'airlight', airlight, 0, 1)
    height, width = image.shape[:2]
    slope = np.linspace(1, 0, height, dtype=np.float32)[:, None]
    depth = 0.25 + 0.6 * slope + 0.4 * _smooth_field(rng, height, width)
    transmission = np.exp(-beta * depth)[..., None]
    return form_image(image, alpha=transmission, artefact=airlight * (1 - transmission))


@degradation(label=1, demo={'strength': (0.5, 0.8)}, term='artefact')
def rain(
    image: np.ndarray,
    rng: np.random.Generator,
    strength: Range = (0.4, 0.8),
    density: Range = (0.001, 0.004),
    length: Range = (15, 40),
    width: Range = (0.6, 1.4),
    angle: Range = (-30, 30),
    layers: IntRange = (2, 4),
) -> np.ndarray:
    """Rain streaks: artefact = strength x layers of motion-blurred drops, each layer with its own length and width.

    Args:
        strength: brightness that the brightest streak adds, in [0, 1].
        density: drops per pixel and layer, in [0, 1].
        length: of a streak in pixels, >= 1.
        width: of a streak in pixels, > 0.
        angle: of a streak from the vertical in degrees, in [-90, 90].
        layers: how many, in [1, 16].
    """
    strength = _draw(rng, 'strength', strength, 0, 1)
    radians = math.radians(_draw(rng, 'angle', angle, -90, 90))
    streaks = np.zeros(image.shape[:2], np.float32)
    for _ in range(_draw_int(rng, 'layers', layers, 1, 16)):
        pixels = _draw(rng, 'length', length, 1, 512)
        sigma = _draw(rng, 'width', width, 0.01, 64) / 2
        steps = np.linspace(-0.5, 0.5, _path_samples(pixels))[:, None] * (pixels - 1)
        streak = _rasterise(steps * (math.cos(radians), math.sin(radians)), margin=math.ceil(2 * sigma))
        streak = cv2.GaussianBlur(streak, (0, 0), sigma)
        streaks += _scatter(rng, streak / streak.max(), image.shape, _draw(rng, 'density', density, 0, 1))
    return form_image(image, artefact=strength * np.minimum(streaks, 1)[..., None])


@degradation(label=2, demo={'strength': (0.8, 1.0)}, term='artefact')
def snow(
    image: np.ndarray,
    rng: np.random.Generator,
    strength: Range = (0.7, 1.0),
    coverage: Range = (0.02, 0.08),
    radius: Range = (0.7, 4),
    layers: IntRange = (3, 5),
) -> np.ndarray:
    """White flakes: alpha = 1 - mask, artefact = mask; the mask sums layers of blurred discs, one size per layer.

    Args:
        strength: opacity of the densest flake, in [0, 1].
        coverage: share of the image that one layer's flakes would cover side by side, in [0, 1].
        radius: of a flake in pixels, > 0.
        layers: how many, in [1, 16].
    """
    strength = _draw(rng, 'strength', strength, 0, 1)
    mask = np.zeros(image.shape[:2], np.float32)
    for _ in range(_draw_int(rng, 'layers', layers, 1, 16)):
        pixels = _draw(rng, 'radius', radius, 0.1, 128)
        reach = math.ceil(2 * pixels)
        distance = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
        flake = 1 / (1 + np.exp(4 * (distance / pixels - 1)))  # a disc whose edge is soft over half a radius
        density = _draw(rng, 'coverage', coverage, 0, 1) / max(math.pi * pixels**2, 1)
        mask += _scatter(rng, (flake / flake.max()).astype(np.float32), image.shape, density)
    mask = strength * np.minimum(mask, 1)[..., None]
    return form_image(image, alpha=1 - mask, artefact=mask)


@degradation(label=3, demo={'illumination': (0.1, 0.2), 'sigma': (1, 3)}, term='luminance')
def lowlight(
    image: np.ndarray,
    rng: np.random.Generator,
    illumination: Range = (0.1, 0.3),
    variation: Range = (0.0, 0.5),
    sigma: Range = (1, 4),
) -> np.ndarray:
    """Poor light: alpha = illumination (1 - variation f), f a smooth field in [0, 1]; artefact = sensor noise.

    Args:
        illumination: alpha at the brightest place, in [0, 1].
        variation: how much darker the darkest place is, in [0, 1].
        sigma: standard deviation of the noise, >= 0, in units of 1/255.
    """
    illumination = _draw(rng, 'illumination', illumination, 0, 1)
    variation = _draw(rng, 'variation', variation, 0, 1)
    sigma = _draw(rng, 'sigma', sigma, 0, math.inf)
    alpha = illumination * (1 - variation * _smooth_field(rng, *image.shape[:2]))
    return form_image(image, alpha=alpha[..., None], artefact=sigma / 255 * _gaussian(rng, image.shape))


@degradation(
    label=4, demo={'length': (5, 7), 'angle': (-10, 10), 'curvature': 0}, term='kernel'
)  # a pan: longer paths need hours of training
def blur(
    image: np.ndarray,
    rng: np.random.Generator,
    length: Range = (9, 25),
    angle: Range = (-180, 180),
    curvature: Range = (0.0, 0.15),
) -> np.ndarray:
    """Motion blur: K is the path of the camera during the exposure.

    Args:
        length: of the path in pixels, >= 1; 1 is no blur.
        angle: in which it starts, from the horizontal in degrees, in [-180, 180].
        curvature: standard deviation of the change of direction over one pixel of path, in radians, >= 0. 0 is linear
            motion, more is a random walk.
    """
    length = _draw(rng, 'length', length, 1, 512)
    radians = math.radians(_draw(rng, 'angle', angle, -180, 180))
    curvature = _draw(rng, 'curvature', curvature, 0, math.inf)
    samples = _path_samples(length)
    step = (length - 1) / max(samples - 1, 1)
    turns = curvature * math.sqrt(step) * rng.standard_normal(samples)  # variances add along the path
    direction = radians + np.cumsum(turns)
    path = np.cumsum(step * np.stack([np.sin(direction), np.cos(direction)], axis=1), axis=0)
    kernel = _rasterise(path - path.mean(axis=0))
    return form_image(image, kernel=kernel / kernel.sum())


@degradation(label=5, demo={'sigma': (40, 50)}, term='artefact')
def noise(image: np.ndarray, rng: np.random.Generator, sigma: Range = 50) -> np.ndarray:
    """White Gaussian noise, independent in each channel: beta = sigma / 255, gamma ~ N(0, 1).

    Args:
        sigma: standard deviation, >= 0, in units of 1/255.
    """
    sigma = _draw(rng, 'sigma', sigma, 0, math.inf)
    return form_image(image, artefact=sigma / 255 * _gaussian(rng, image.shape))


@degradation(label=6, demo={'quality': (3, 6)}, term='compression')
def jpeg(image: np.ndarray, rng: np.random.Generator, quality: IntRange = (20, 30)) -> np.ndarray:
    """JPEG compression: Q. The result has 8-bit values.

    Args:
        quality: int in [1, 100].
    """
    return form_image(image, quality=_draw_int(rng, 'quality', quality, 1, 100))


@degradation(label=7)
def clean(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """No degradation: alpha 1, the rest 0. From such pairs a network learns what to leave unchanged."""
    return form_image(image)


@degradation(label=8, term='artefact')
def camera_noise(
    image: np.ndarray,
    rng: np.random.Generator,
    shot: Range = (0.0005, 0.01),
    read: Range = (0, 0.01),
    grain: Range = (0, 1),
    quality: IntRange | None = (75, 98),
) -> np.ndarray:
    """Noise as in a camera's files: Poissonian-Gaussian in linear light, smoothed by demosaicing, then JPEG.

    The variance is shot x + read^2 of linear intensity x (Foi et al., IEEE TIP 17(10), 2008); the display's gamma, 2.2
    here, makes it largest in the shadows. A Gaussian over the noise field stands for demosaicing and the camera's own
    smoothing, and keeps the variance.

    Args:
        shot: variance of photon noise at full intensity, >= 0.
        read: standard deviation of the noise in the dark, in [0, 1] of full intensity, >= 0.
        grain: standard deviation in pixels of the Gaussian, >= 0; 0: white noise.
        quality: JPEG quality in [1, 100] of the file; None: no JPEG.
    """
    shot = _draw(rng, 'shot', shot, 0, math.inf)
    read = _draw(rng, 'read', read, 0, math.inf)
    grain = _draw(rng, 'grain', grain, 0, 64)
    quality = None if quality is None else _draw_int(rng, 'quality', quality, 1, 100)
    field = _gaussian(rng, image.shape)
    if grain > 0.1:  # a narrower Gaussian is one pixel wide
        field = cv2.GaussianBlur(field, (0, 0), grain)
        field *= 1 / max(np.sqrt(np.mean(field**2)), np.finfo(np.float32).tiny)
    linear = image**2.2
    noisy = np.maximum(linear + np.sqrt(shot * linear + read**2) * field, 0) ** (1 / 2.2)
    return form_image(image, artefact=noisy - image, quality=quality)


@degradation(label=9)
def composed(image: np.ndarray, rng: np.random.Generator, of: dict[str, dict] | None = None) -> np.ndarray:
    """Two degradations of two different terms of Eq. (6), in its order, drawn uniformly from all pairs.

    Args:
        of: {name: parameters} of degradations that have a term; None: all of them, with their defaults.
    """
    of = {name: {} for name, known in DEGRADATIONS.items() if known.term} if of is None else of
    terms = {name: TERMS.index(DEGRADATIONS[name].term) for name in of if getattr(DEGRADATIONS.get(name), 'term', None)}
    if len(terms) < len(of) or len(set(terms.values())) < 2:
        choices = ', '.join(name for name, known in DEGRADATIONS.items() if known.term)
        raise ValueError(f'of must name degradations of two or more terms of Eq. (6) among {choices}, got {of!r}')
    pairs = [(a, b) for a, first in terms.items() for b, second in terms.items() if first < second]
    for kind in pairs[rng.integers(len(pairs))]:
        image = degrade(image, kind, rng, **(of[kind] or {}))
    return image


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[0, 1] float to uint8, rounded to nearest, as when the image is stored."""
    return np.rint(image * 255).astype(np.uint8)


def _bounds(name: str, value: Range, minimum: float, maximum: float, number: type) -> tuple:
    pair: Any = (value, value) if isinstance(value, number) else value
    valid = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(v, number) for v in pair)
    if not (valid and minimum <= pair[0] <= pair[1] <= maximum):
        word = 'int' if number is Integral else 'number'
        raise ValueError(f'{name}: expected {word} or (low, high) within [{minimum}, {maximum}], got {value!r}')
    return tuple(pair)


def _draw(rng: np.random.Generator, name: str, value: Range, minimum: float, maximum: float) -> float:
    return rng.uniform(*_bounds(name, value, minimum, maximum, Real))


def _draw_int(rng: np.random.Generator, name: str, value: IntRange, minimum: int, maximum: int) -> int:
    return int(rng.integers(*_bounds(name, value, minimum, maximum, Integral), endpoint=True))


def _gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _smooth_field(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width) float32 that varies over about a quarter of the image and spans [0, 1]."""
    field = cv2.resize(rng.random((4, 4), dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    low, high = field.min(), field.max()
    return (field - low) / max(high - low, np.finfo(np.float32).tiny)


def _path_samples(length: float) -> int:
    """Four samples per pixel draw a path of `length` pixels without gaps."""
    return 4 * math.ceil(length - 1) + 1


def _rasterise(points: np.ndarray, margin: int = 0) -> np.ndarray:
    """Draws (row, column) points, given relative to the centre, on the smallest odd-sided square grid plus a margin.

    Each point adds 1, spread bilinearly over its four neighbours.
    """
    reach = math.ceil(np.abs(points).max() - 1e-9) + margin
    size = 2 * reach + 1
    grid = np.zeros((size + 1, size + 1), np.float32)
    corner = np.floor(points).astype(int)
    fraction = points - corner
    for row in (0, 1):
        for column in (0, 1):
            weight = np.abs(1 - row - fraction[:, 0]) * np.abs(1 - column - fraction[:, 1])
            np.add.at(grid, (corner[:, 0] + row + reach, corner[:, 1] + column + reach), weight)
    return grid[:size, :size]


def _scatter(rng: np.random.Generator, stamp: np.ndarray, shape: tuple[int, ...], density: float) -> np.ndarray:
    """(height, width) with copies of `stamp` at random places, across the border too, each dimmed by 0.3 to 1.

    Args:
        stamp: odd sides, square.
        shape: (height, width, ...).
        density: copies per pixel.
    """
    pad, (height, width) = stamp.shape[0] // 2, shape[:2]
    field = np.zeros((height + 2 * pad, width + 2 * pad), np.float32)
    count = rng.binomial(field.size, density)
    field.ravel()[rng.integers(field.size, size=count)] = rng.uniform(0.3, 1, count)
    return cv2.filter2D(field, -1, stamp)[pad : pad + height, pad : pad + width]
