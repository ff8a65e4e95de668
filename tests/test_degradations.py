import inspect

import cv2
import numpy as np
import pytest

import dpmambair_basicsr.data.degradations as degradations
from dpmambair_basicsr.data.degradations import (
    DEGRADATIONS,
    add_degradation,
    degradation,
    degrade,
    demo_strengths,
    form_image,
    synthetic,
    to_uint8,
)


def textured(height=96, width=80):
    """Smooth colour plus detail, in [0.1, 0.9]."""
    rng = np.random.default_rng(7)
    coarse = cv2.resize(rng.random((6, 5, 3), dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(0.6 * coarse + 0.3 * rng.random((height, width, 3), dtype=np.float32), 0.1, 0.9)


CLEAN = textured()


def psnr(degraded, clean=CLEAN):
    return 10 * np.log10(1 / np.mean((degraded - clean) ** 2))


def run(kind, seed=0, image=CLEAN, **parameters):
    return degrade(image, kind, np.random.default_rng(seed), **parameters)


@pytest.mark.parametrize('kind', [kind for kind in DEGRADATIONS if kind != 'clean'])
def test_results_are_degraded_deterministic_and_in_range(kind):
    before = CLEAN.copy()
    degraded = run(kind)
    assert degraded.shape == CLEAN.shape and degraded.dtype == np.float32
    assert degraded.min() >= 0 and degraded.max() <= 1
    assert np.array_equal(CLEAN, before), 'the input was written to'
    assert psnr(degraded) < 40, 'the image is hardly changed'
    assert np.array_equal(degraded, run(kind)), 'one seed gave two results'


@pytest.mark.parametrize('kind', [kind for kind in DEGRADATIONS if kind not in ('jpeg', 'clean')])
def test_seeds_differ(kind):
    assert not np.array_equal(run(kind, seed=1), run(kind, seed=2))


@pytest.mark.parametrize('kind', DEGRADATIONS)
@pytest.mark.parametrize('size', [(1, 1), (7, 3), (33, 130)])
def test_images_of_any_size_are_degraded(kind, size):
    image = textured(*size)
    degraded = run(kind, image=image)
    assert degraded.shape == image.shape and np.isfinite(degraded).all()


ZERO_STRENGTH = {
    'haze': {'beta': 0},  # transmission 1
    'rain': {'strength': 0},
    'snow': {'strength': 0},
    'lowlight': {'illumination': 1, 'variation': 0, 'sigma': 0},  # alpha 1
    'blur': {'length': 1},  # a kernel of one pixel
    'noise': {'sigma': 0},
    'clean': {},
}


@pytest.mark.parametrize('kind', ZERO_STRENGTH)
def test_zero_strength_is_the_identity(kind):
    np.testing.assert_allclose(run(kind, **ZERO_STRENGTH[kind]), CLEAN, atol=1e-7)


# kind: parameter, values of increasing severity. Each is a fixed number, so a seed always gives the same pattern.
SEVERITY = [
    ('haze', 'beta', [0.2, 0.6, 1.2, 2.4]),
    ('rain', 'strength', [0.1, 0.3, 0.6, 1.0]),
    ('rain', 'density', [0.0005, 0.002, 0.008]),
    ('snow', 'strength', [0.1, 0.4, 0.7, 1.0]),
    ('snow', 'coverage', [0.01, 0.05, 0.2]),
    ('lowlight', 'illumination', [0.9, 0.5, 0.2, 0.05]),
    ('blur', 'length', [2, 5, 11, 25]),
    ('noise', 'sigma', [5, 15, 25, 50]),
    ('jpeg', 'quality', [95, 50, 20, 5]),
    ('camera_noise', 'shot', [0.0001, 0.001, 0.01]),
    ('camera_noise', 'quality', [98, 60, 10]),
]


@pytest.mark.parametrize(('kind', 'name', 'values'), SEVERITY)
def test_severity_grows_with_its_parameter(kind, name, values):
    results = [np.mean([psnr(run(kind, seed, **{name: value})) for seed in range(4)]) for value in values]
    assert all(np.diff(results) < 0), dict(zip(values, results, strict=True))


def test_degradations_combine_as_in_equation_6():
    rng = np.random.default_rng(0)
    alpha, artefact = rng.random((96, 80, 1), dtype=np.float32), rng.random((96, 80, 3), dtype=np.float32) / 8
    kernel = np.zeros((3, 3), np.float32)
    kernel[0, 1], kernel[2, 2] = 0.25, 0.75  # asymmetric: a correlation would shift the image the other way
    inside = 0.5 * (alpha * CLEAN + artefact)
    expected = 0.25 * inside[2:, 1:-1] + 0.75 * inside[:-2, :-2]
    got = form_image(0.5 * CLEAN, alpha=alpha, artefact=0.5 * artefact, kernel=kernel)
    np.testing.assert_allclose(got[1:-1, 1:-1], expected, atol=1e-6)


def test_haze_tends_to_the_airlight():
    np.testing.assert_allclose(run('haze', beta=100, airlight=0.8), 0.8, atol=1e-4)


def test_haze_follows_the_scattering_equation():
    """I - A = (J - A) t with one t for all colours, falling towards the top of the image."""
    degraded = run('haze', beta=1, airlight=0.95)
    transmission = (degraded - 0.95) / (CLEAN - 0.95)
    assert np.ptp(transmission, axis=2).max() < 1e-3
    assert transmission[:10].mean() < transmission[-10:].mean()


def test_rain_and_snow_only_add_light_to_a_black_image():
    black = np.zeros_like(CLEAN)
    for kind in ('rain', 'snow'):
        degraded = run(kind, image=black)
        assert 0.005 < (degraded > 0.2).mean() < 0.5
        assert np.ptp(degraded, axis=2).max() == 0, 'drops and flakes are grey'


@pytest.mark.parametrize(('angle', 'axis'), [(0, 0), (90, 1)])
def test_rain_falls_along_its_angle(angle, axis):
    """Streaks are smooth along themselves: 0 degrees is vertical (axis 0)."""
    streaks = run('rain', image=np.zeros((128, 128, 3), np.float32), angle=angle, length=25)[..., 0]
    along, across = (np.abs(np.diff(streaks, axis=a)).mean() for a in (axis, 1 - axis))
    assert along < across / 3


def test_snow_covers_the_requested_area():
    black = np.zeros((256, 256, 3), np.float32)
    mask = run('snow', image=black, coverage=0.1, layers=1, radius=3, strength=1)
    assert (mask > 0.65 / 2).mean() == pytest.approx(0.1, rel=0.2)  # half of the mean brightness of a flake: its edge


def test_lowlight_is_darker_by_the_illumination():
    degraded = run('lowlight', illumination=0.2, variation=0, sigma=0)
    np.testing.assert_allclose(degraded, 0.2 * CLEAN, atol=1e-6)
    varied = run('lowlight', illumination=0.2, variation=0.5, sigma=0)
    assert (varied / CLEAN).min() == pytest.approx(0.1, abs=1e-3)
    assert (varied / CLEAN).max() == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize('curvature', [0, 0.3])
def test_blur_spreads_a_point_over_its_path(curvature):
    point = np.zeros((65, 65, 3), np.float32)
    point[32, 32] = 1
    for seed in range(5):
        spread = run('blur', seed, image=point, length=20, curvature=curvature)[..., 0].astype(np.float64)
        assert spread.sum() == pytest.approx(1, abs=1e-5), 'a blur keeps the light'
        rows, columns = np.nonzero(spread > 1e-6)
        extent = np.hypot(np.ptp(rows), np.ptp(columns))
        assert extent <= 20 + 2 and (curvature or extent >= 19)  # bilinear: up to a pixel more at each end
        weights = spread / spread.sum()
        centre = [(weights * axis).sum() for axis in np.mgrid[:65, :65]]
        assert centre == pytest.approx([32, 32], abs=0.05), 'the image must not shift'


@pytest.mark.parametrize(('angle', 'along'), [(0, 1), (90, 0)])
def test_blur_follows_its_angle(angle, along):
    point = np.zeros((65, 65, 3), np.float32)
    point[32, 32] = 1
    spread = np.nonzero(run('blur', image=point, length=20, angle=angle, curvature=0)[..., 0] > 1e-4)
    assert np.ptp(spread[along]) >= 19 and np.ptp(spread[1 - along]) == 0


def test_noise_has_the_requested_sigma():
    grey = np.full((128, 128, 3), 0.5, np.float32)
    error = (run('noise', image=grey, sigma=25) - grey) * 255
    assert error.std() == pytest.approx(25, rel=0.02) and abs(error.mean()) < 0.5
    channels = np.corrcoef(error.reshape(-1, 3).T)
    assert np.abs(channels - np.eye(3)).max() < 0.03


def test_jpeg_matches_opencv():
    code = cv2.imencode('.jpg', to_uint8(CLEAN[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 17])[1]
    expected = cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(to_uint8(run('jpeg', quality=17)), expected)


def test_a_pair_is_drawn_from_and_a_number_is_not():
    rng = np.random.default_rng(0)
    grey = np.full((64, 64, 3), 0.5, np.float32)
    sigmas = [(degrade(grey, 'noise', rng, sigma=(5, 20)) - grey).std() * 255 for _ in range(20)]
    assert 4.5 < min(sigmas) < 9 and 16 < max(sigmas) < 21


@pytest.mark.parametrize(
    ('kind', 'parameters', 'message'),
    [
        ('fog', {}, "unknown degradation 'fog', choose from haze, rain"),
        ('noise', {'sgima': 3}, "noise has no parameter 'sgima', choose from sigma"),
        ('noise', {'sigma': -1}, 'sigma: expected number or .* got -1'),
        ('noise', {'sigma': (30, 20)}, 'sigma: expected number'),
        ('noise', {'sigma': '50'}, 'sigma: expected number'),
        ('noise', {'sigma': float('nan')}, 'sigma: expected number'),
        ('haze', {'airlight': 1.5}, r'airlight: expected number .* within \[0, 1\]'),
        ('rain', {'layers': 2.5}, 'layers: expected int or '),
        ('jpeg', {'quality': 0}, r'quality: expected int .* within \[1, 100\]'),
        ('jpeg', {'quality': (10, 101)}, 'quality: expected int'),
        ('blur', {'length': 0.5}, 'length: expected number'),
    ],
)
def test_errors_name_the_key(kind, parameters, message):
    with pytest.raises(ValueError, match=message):
        run(kind, **parameters)


def test_errors_name_the_image():
    with pytest.raises(ValueError, match=r'\(8, 8\) float32'):
        run('noise', image=np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match='uint8'):
        run('noise', image=np.zeros((8, 8, 3), np.uint8))


# --- camera noise, two degradations at once

FLAT = np.full((256, 256, 3), 0.5, np.float32)
WHITE = {'grain': 0, 'quality': None}


def linear_deviation(level, **parameters):
    image = np.full_like(FLAT, level)
    return np.std(run('camera_noise', image=image, **WHITE, **parameters) ** 2.2 - image**2.2)


def test_camera_noise_has_the_variance_of_photons_and_of_the_sensor():
    """Var = shot x + read^2 in linear light."""
    for level in (0.4, 0.8):
        expected = np.sqrt(0.001 * level**2.2 + 0.01**2)
        assert linear_deviation(level, shot=0.001, read=0.01) == pytest.approx(expected, rel=0.1)


def test_camera_noise_is_largest_in_the_shadows_of_a_file():
    noise = [np.std(run('camera_noise', image=np.full_like(FLAT, x), shot=0.005, **WHITE)) for x in (0.2, 0.8)]
    assert noise[0] > 1.2 * noise[1]


def test_grain_correlates_neighbours_and_keeps_the_variance():
    fields = [run('camera_noise', image=FLAT, shot=0.005, quality=None, grain=grain) - 0.5 for grain in (0, 1)]
    neighbours = [np.corrcoef(field[:, 1:, 0].ravel(), field[:, :-1, 0].ravel())[0, 1] for field in fields]
    assert abs(neighbours[0]) < 0.1 and neighbours[1] > 0.6
    assert np.std(fields[1]) == pytest.approx(np.std(fields[0]), rel=0.1)


def test_two_degradations_are_composed_in_the_order_of_equation_6():
    of = {'jpeg': {'quality': 5}, 'haze': {'beta': 1}}
    expected = run('jpeg', image=run('haze', beta=1), quality=5)
    got = {run('composed', seed, of=of).tobytes() for seed in range(3)}
    assert len(got) == 3, 'the seed draws the haze'
    rng = np.random.default_rng(0)
    rng.integers(1)  # which pair
    hazy = degrade(CLEAN, 'haze', rng, beta=1)
    assert np.array_equal(run('composed', of=of), run('jpeg', image=hazy, quality=5))
    assert psnr(expected, run('composed', of=of)) > 15


def test_two_of_one_term_are_never_composed():
    """Two pairs of rain, snow and haze are possible: haze comes first in both."""
    of = {'rain': {'strength': 0}, 'snow': {'strength': 0}, 'haze': {'beta': 100, 'airlight': 0.8}}
    for seed in range(8):
        np.testing.assert_allclose(run('composed', seed, of=of), 0.8, atol=1e-4)


@pytest.mark.parametrize(
    'of', [{'haze': {}}, {'rain': {}, 'snow': {}}, {'haze': {}, 'clean': {}}, {'haze': {}, 'x': {}}]
)
def test_what_cannot_be_composed_is_named(of):
    with pytest.raises(ValueError, match='of must name degradations of two or more terms'):
        run('composed', of=of)


# --- the registry


def test_the_seven_have_the_labels_of_all_checkpoints():
    labels = {name: known.label for name, known in DEGRADATIONS.items()}
    assert list(labels.values()) == list(range(10))
    seven = {'haze': 0, 'rain': 1, 'snow': 2, 'lowlight': 3, 'blur': 4, 'noise': 5, 'jpeg': 6}
    assert labels == seven | {'clean': 7, 'camera_noise': 8, 'composed': 9}
    assert synthetic() == list(labels) and list(demo_strengths()) == list(seven)


def test_every_kind_has_a_function_of_its_name():
    for kind in DEGRADATIONS:
        assert DEGRADATIONS[kind].function is getattr(degradations, kind)
        assert list(inspect.signature(getattr(degradations, kind)).parameters)[:2] == ['image', 'rng']


def test_the_demos_strengths_are_within_what_the_functions_take():
    for kind, strength in demo_strengths().items():
        assert psnr(run(kind, **strength)) < 35, 'not seen at a glance'


@pytest.fixture
def registry():
    """The registry, restored after the test."""
    before = dict(DEGRADATIONS)
    yield DEGRADATIONS
    DEGRADATIONS.clear()
    DEGRADATIONS.update(before)


def test_one_decorator_adds_a_degradation(registry):
    @degradation(label=10, demo={'strength': 0.5})
    def fade(image, rng, strength=(0.2, 0.8)):
        return form_image(image, alpha=1 - strength)

    assert registry['fade'].label == 10 and synthetic()[-1] == 'fade' and demo_strengths()['fade'] == {'strength': 0.5}
    np.testing.assert_allclose(run('fade', strength=0.25), 0.75 * CLEAN, rtol=1e-6)
    with pytest.raises(ValueError, match="fade has no parameter 'sigma', choose from strength"):
        run('fade', sigma=1)


def test_one_line_adds_a_degradation_of_stored_pairs(registry):
    add_degradation('fog', label=10)
    assert list(registry)[-1] == 'fog' and 'fog' not in synthetic() and 'fog' not in demo_strengths()
    with pytest.raises(ValueError, match='degradation fog has no function, choose from haze, rain, .*composed$'):
        run('fog')


@pytest.mark.parametrize(
    ('name', 'label', 'message'),
    [
        ('haze', 10, 'degradation haze: already registered'),
        ('fog', 6, 'degradation fog: label must be 10, the next one, got 6'),
        ('fog', 11, 'degradation fog: label must be 10, the next one, got 11'),
    ],
)
def test_labels_are_never_given_twice_nor_left_out(name, label, message, registry):
    with pytest.raises(ValueError, match=message):
        add_degradation(name, label)
    assert len(registry) == 10
