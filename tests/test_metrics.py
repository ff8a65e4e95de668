import cv2
import numpy as np
import pytest
import torch
import torchvision
import yaml
from basicsr.metrics import calculate_metric, psnr_ssim
from basicsr.utils import tensor2img
from support.commands import PACKAGE_PARENT

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable, and registers the metric)
from dpmambair_basicsr.losses.lpips_network import build_lpips
from dpmambair_basicsr.metrics.lpips import calculate_lpips


@pytest.fixture(scope='module')
def option(tmp_path_factory):
    """With a random backbone, which measures a distance too. Values of a trained one: test_losses.py."""
    path = tmp_path_factory.mktemp('weights') / 'squeezenet.pth'
    torch.manual_seed(0)
    torch.save(torchvision.models.SqueezeNet('1_1').state_dict(), path)
    return {'type': 'calculate_lpips', 'crop_border': 0, 'net': 'squeeze', 'weights': str(path), 'better': 'lower'}


def photo(seed=0, shape=(48, 56, 3)):
    """BGR uint8, smooth, with a different colour in each channel."""
    coarse = np.random.default_rng(seed).random((6, 7, shape[2]), dtype=np.float32)
    return (cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_LINEAR) * 255).astype(np.uint8)


def noisy(image, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, image.shape)
    return np.clip(image + noise, 0, 255).round().astype(np.uint8)


# BasicSR's PSNR and SSIM with the settings of our option files

ASKED_FOR = {
    tuple(sorted(metric.items()))
    for file in (PACKAGE_PARENT / 'options').glob('*.yml')
    for metric in yaml.safe_load(file.read_text(encoding='utf-8')).get('val', {}).get('metrics', {}).values()
    if metric['type'] != 'calculate_lpips'
}


def by_skimage(image, truth, type, crop_border, test_y_channel=False, **of_ssim):
    """The same from scikit-image. Images are BGR uint8; SSIM's window is Gaussian unless `of_ssim` says otherwise."""
    metrics = pytest.importorskip('skimage.metrics')
    inside = slice(crop_border, -crop_border or None)
    pair = [part[inside, inside, ::-1] for part in (truth, image)]
    if test_y_channel:
        pair = [pytest.importorskip('skimage.color').rgb2ycbcr(part)[..., :1] for part in pair]
    if type == 'calculate_psnr':
        return metrics.peak_signal_noise_ratio(*pair, data_range=255)
    window = of_ssim or {'gaussian_weights': True, 'sigma': 1.5, 'use_sample_covariance': False}
    return metrics.structural_similarity(
        *(part.astype(np.float64) for part in pair), data_range=255, channel_axis=2, **window
    )


def pairs():
    """Mildly and strongly degraded pairs, one with odd sides, with an edge that reveals a wrong border."""
    for seed, (sigma, shape) in enumerate([(4, (48, 56, 3)), (40, (37, 51, 3))]):
        truth = photo(seed, shape)
        image = noisy(truth, sigma)
        image[:4] = 255 - image[:4]
        yield image, truth


@pytest.mark.parametrize('options', sorted(ASKED_FOR), ids=lambda options: ' '.join(str(value) for _, value in options))
def test_psnr_and_ssim_are_those_of_scikit_image(options):
    for image, truth in pairs():
        value = calculate_metric({'img': image, 'img2': truth}, dict(options))
        assert value == pytest.approx(by_skimage(image, truth, **dict(options)), abs=1e-3)


def test_every_setting_is_compared():
    """The settings of the option files: both metrics, RGB and Y, borders of 0 and 4 pixels."""
    for key, values in {
        'type': {'calculate_psnr', 'calculate_ssim'},
        'crop_border': {0, 4},
        'test_y_channel': {None, True},
    }.items():
        assert {dict(options).get(key) for options in ASKED_FOR} == values


def test_other_definitions_give_other_numbers():
    """docs/experiments.md, "Metrics": each difference exceeds the last printed digit."""
    image, truth = next(pairs())
    pair, luminance = {'img': image, 'img2': truth}, {'crop_border': 0, 'test_y_channel': True}
    ssim = {'type': 'calculate_ssim', 'crop_border': 0}
    uniform = by_skimage(image, truth, **ssim, win_size=7)
    assert abs(calculate_metric(pair, ssim) - uniform) > 5e-3
    psnr = calculate_metric(pair, {'type': 'calculate_psnr', **luminance})
    full_range = [cv2.cvtColor(part, cv2.COLOR_BGR2YCrCb)[..., 0] for part in (image, truth)]
    grey = dict(zip(('img', 'img2'), full_range, strict=True))
    assert psnr - calculate_metric(grey, {'type': 'calculate_psnr', 'crop_border': 0}) == pytest.approx(1.32, abs=0.1)
    cropped = calculate_metric(pair, {'type': 'calculate_psnr', **luminance, 'crop_border': 4})
    assert cropped - psnr > 1


def test_faster_ssim_gives_the_same_values():
    for image, truth in pairs():
        image, truth = (part[..., 0].astype(np.float64) for part in (image, truth))
        for other in (image, truth, 255 - truth, np.zeros_like(truth)):
            expected = psnr_ssim._ssim.__wrapped__(other, truth)
            assert psnr_ssim._ssim(other, truth) == pytest.approx(expected, abs=1e-12)


# LPIPS


def test_lpips_is_zero_for_equal_images_and_rises_with_noise(option):
    clean = photo()
    values = [calculate_metric({'img': noisy(clean, sigma), 'img2': clean}, option) for sigma in (0, 5, 20, 60)]
    assert values[0] == 0 and all(np.diff(values) > 0.002), values
    assert all(type(value) is float for value in values), 'a numpy or torch scalar would not survive a checkpoint'


def test_metric_equals_lpips_of_the_rgb_images(option):
    """From the tensors that BasicSR's validation converted to 8-bit BGR."""
    tensors = [
        torch.rand(1, 3, 40, 44, generator=torch.Generator().manual_seed(seed)).mul(255).round() / 255
        for seed in (0, 1)
    ]
    network = build_lpips('squeeze', option['weights'])
    expected = network(*tensors, normalize=True).item()
    images = [tensor2img([tensor]) for tensor in tensors]
    assert calculate_metric({'img': images[0], 'img2': images[1]}, option) == pytest.approx(expected, rel=1e-4)
    swapped = network(*(tensor.flip(1) for tensor in tensors), normalize=True).item()
    assert abs(swapped - expected) > 1e-3, 'the test would not notice BGR taken for RGB'


def test_crop_border_excludes_the_frame(option):
    clean = photo()
    framed = clean.copy()
    framed[:4], framed[-4:], framed[:, :4], framed[:, -4:] = 0, 255, 0, 255
    data = {'img': framed, 'img2': clean}
    assert calculate_metric(data, option) > 0.01
    assert calculate_metric(data, option | {'crop_border': 4}) == 0


def test_grey_images_become_three_channels(option):
    clean = photo()[..., 0]
    three = [np.dstack([image] * 3) for image in (noisy(clean, 20), clean)]
    expected = calculate_metric({'img': three[0], 'img2': three[1]}, option)
    assert calculate_metric({'img': noisy(clean, 20), 'img2': clean}, option) == expected > 0


def test_the_network_is_built_once(option, monkeypatch):
    data = {'img': photo(0), 'img2': photo(1)}
    first = calculate_metric(data, option)
    monkeypatch.setattr('dpmambair_basicsr.metrics.lpips.build_lpips', None)
    assert calculate_metric(data, option) == first


def test_invalid_arguments_are_named(option, tmp_path):
    with pytest.raises(ValueError, match=r'the same size, got \(48, 56, 3\) and \(48, 40, 3\)'):
        calculate_lpips(photo(), photo(shape=(48, 40, 3)), net='squeeze', weights=option['weights'])
    with pytest.raises(ValueError, match="better must be 'lower', got 'higher'"):
        calculate_metric({'img': photo(), 'img2': photo()}, option | {'better': 'higher'})
    with pytest.raises(FileNotFoundError, match=r'\S*/absent.pth'):
        calculate_lpips(photo(), photo(), weights=str(tmp_path / 'absent.pth'))
    with pytest.raises(TypeError, match='nett'):
        calculate_metric({'img': photo(), 'img2': photo()}, option | {'nett': 'alex'})
