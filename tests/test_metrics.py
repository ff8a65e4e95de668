import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable, and registers the metric)

# isort: split
import cv2
import numpy as np
import pytest
import torch
import torchvision
from basicsr.metrics import calculate_metric
from basicsr.utils import tensor2img

from dpmambair_basicsr.losses.lpips_network import build_lpips
from dpmambair_basicsr.metrics.lpips import calculate_lpips


@pytest.fixture(scope='module')
def option(tmp_path_factory):
    """With a random backbone; even that measures a distance. For values of a trained one see test_losses.py."""
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


def test_zero_for_equal_images_and_rising_with_noise(option):
    clean = photo()
    values = [calculate_metric({'img': noisy(clean, sigma), 'img2': clean}, option) for sigma in (0, 5, 20, 60)]
    assert values[0] == 0 and all(np.diff(values) > 0.002), values
    assert all(type(value) is float for value in values), 'a numpy or torch scalar would not survive a checkpoint'


def test_equals_lpips_of_the_rgb_images(option):
    """From the tensors that BasicSR's validation turned into 8 bit BGR."""
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


def test_crop_border(option):
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


def test_errors(option, tmp_path):
    with pytest.raises(ValueError, match=r'one size, got \(48, 56, 3\) and \(48, 40, 3\)'):
        calculate_lpips(photo(), photo(shape=(48, 40, 3)), net='squeeze', weights=option['weights'])
    with pytest.raises(ValueError, match="better must be 'lower', got 'higher'"):
        calculate_metric({'img': photo(), 'img2': photo()}, option | {'better': 'higher'})
    with pytest.raises(FileNotFoundError, match=r'\S*/absent.pth'):
        calculate_lpips(photo(), photo(), weights=str(tmp_path / 'absent.pth'))
    with pytest.raises(TypeError, match='nett'):
        calculate_metric({'img': photo(), 'img2': photo()}, option | {'nett': 'alex'})
