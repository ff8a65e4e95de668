"""`calculate_iqa`: pyiqa's metrics in validation, refused before training if they cannot be computed."""

import sys

import cv2
import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_metric

import dpmambair_basicsr
from dpmambair_basicsr.option_checks.calls import check_metric, compares

dpmambair_basicsr.register()


def photo(seed, shape=(40, 44, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def iqa(metric, **options):
    return {'type': 'calculate_iqa', 'metric': metric, **options}


@pytest.fixture
def pyiqa():
    return pytest.importorskip('pyiqa')


@pytest.mark.parametrize(
    ('name', 'options', 'shift'),
    [('psnr', {}, 0), ('psnry', {'test_y_channel': True}, 20 * np.log10(219 / 255))],
    ids=['RGB', 'luminance'],
)
def test_psnr_matches_basicsr(pyiqa, name, options, shift):
    """pyiqa's luminance has 255 steps, BasicSR's 219, as in ITU-R BT.601."""
    pair = {'img': photo(0), 'img2': photo(1)}
    for border in (0, 3):
        expected = calculate_metric(pair, {'type': 'calculate_psnr', 'crop_border': border, **options}) + shift
        value = calculate_metric(pair, iqa(name, crop_border=border))
        assert type(value) is float and value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize('name', ['fsim', 'gmsd', 'vif', 'vsi', 'entropy', 'piqe'])  # those without weights
def test_metrics_match_pyiqa_on_rgb_images_in_unit_range(pyiqa, name):
    metric = pyiqa.create_metric(name)
    blurred = {'img': cv2.GaussianBlur(photo(0, (192, 208, 3)), (5, 5), 1), 'img2': photo(0, (192, 208, 3))}
    rgb = (image[..., ::-1] / np.float32(255) for image in blurred.values())
    tensors = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in rgb]
    with torch.no_grad():
        expected = float(metric(*tensors[: 2 if metric.metric_mode == 'FR' else 1]))
    better = 'lower' if metric.lower_better else 'higher'
    assert calculate_metric(blurred, iqa(name, better=better)) == pytest.approx(expected, rel=1e-6)


def test_metrics_that_pyiqa_cannot_compute_are_refused_before_training(pyiqa):
    assert check_metric('val.metrics.m', iqa('psnr')) == []
    for metric, options, problem in (
        ('niqee', {}, 'val.metrics.m.metric: niqee must be a pyiqa metric of single images, did you mean niqe?'),
        (
            'niqe',
            {},
            'val.metrics.m.better: must be lower for niqe, BasicSR selects the best network by it',
        ),
        ('psnr', {'better': 'lower'}, 'val.metrics.m.better: must be higher for psnr'),
        ('fid', {'better': 'lower'}, 'val.metrics.m.metric: fid must be a pyiqa metric of single images'),
        ('psnr', {'crop_bordr': 1}, 'val.metrics.m.crop_bordr: unknown key, did you mean crop_border?'),
    ):
        (found,) = check_metric('val.metrics.m', iqa(metric, **options))
        assert found.startswith(problem)


def test_only_metrics_with_a_reference_need_clean_images(pyiqa):
    assert compares(iqa('psnr')) and not compares(iqa('niqe', better='lower'))
    with pytest.raises(ValueError, match='psnr needs a clean image, and there is none'):
        calculate_metric({'img': photo(0)}, iqa('psnr'))
    with pytest.raises(ValueError, match=r'the same size, got \(40, 44, 3\) and \(44, 40, 3\)'):
        calculate_metric({'img': photo(0), 'img2': photo(0, (44, 40, 3))}, iqa('psnr'))


def test_without_pyiqa_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyiqa', None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, 'pyiqa.default_model_configs', None)
    (problem,) = check_metric('val.metrics.niqe', iqa('niqe', better='lower'))
    assert problem.startswith('val.metrics.niqe: ') and problem.endswith('pip install pyiqa')
    assert not compares(iqa('niqe')), 'one problem is enough'
