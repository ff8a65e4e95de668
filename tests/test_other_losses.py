"""Losses that neither paper uses, each compared with a naive implementation of its definition."""

import sys

import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from torch.nn import functional as F
from torchvision.models import vgg

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable, and registers the losses)
from dpmambair_basicsr.losses.dists_loss import CHANNELS
from dpmambair_basicsr.losses.focal_frequency_loss import focal_frequency
from dpmambair_basicsr.option_checks.calls import CALLS, check_call
from dpmambair_basicsr.option_checks.dry_run import check_least_size


def images(seed=0, shape=(2, 3, 12, 18), dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- focal frequency


def naive_focal_frequency(pred, target, alpha, parts):
    """Jiang et al. 2021, Eq. 5 to 8, patch by patch, with NumPy's DFT."""
    values = []
    for a, b in zip(
        pred.numpy().reshape(-1, *pred.shape[-2:]), target.numpy().reshape(-1, *pred.shape[-2:]), strict=True
    ):
        for rows in np.split(np.arange(a.shape[0]), parts):
            for columns in np.split(np.arange(a.shape[1]), parts):
                real, fake = (np.fft.fft2(image[np.ix_(rows, columns)], norm='ortho') for image in (a, b))
                distance = np.abs(real - fake)
                weight = distance**alpha / (distance**alpha).max()
                values.append((weight * distance**2).mean())
    return np.mean(values)


@pytest.mark.parametrize('alpha', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('parts', [1, 2, 3])
def test_focal_frequency_matches_its_definition(alpha, parts):
    pred, target = images(0), images(1)
    value = focal_frequency(pred, target, alpha, parts)
    assert value.item() == pytest.approx(naive_focal_frequency(pred, target, alpha, parts), rel=1e-10)


def test_focal_frequency_with_alpha_0_is_the_mean_squared_error():
    """Parseval: alpha 0 weights all frequencies equally."""
    pred, target = images(0), images(1)
    torch.testing.assert_close(focal_frequency(pred, target, alpha=0.0), F.mse_loss(pred, target))


def test_weights_of_focal_frequency_have_no_gradient():
    pred, target = images(0).requires_grad_(), images(1)
    (gradient,) = torch.autograd.grad(focal_frequency(pred, target), pred)
    spectrum = torch.fft.fft2(pred.detach() - target, norm='ortho')
    weight = spectrum.abs() / spectrum.abs().amax((-2, -1), keepdim=True)
    expected = 2 / pred.numel() * torch.fft.ifft2(weight * spectrum, norm='ortho').real
    torch.testing.assert_close(gradient, expected)


def test_focal_frequency_is_smallest_at_equality_with_a_finite_gradient():
    pred = images().requires_grad_()
    value = build_loss({'type': 'FocalFrequencyLoss', 'loss_weight': 2.0})(pred, pred.detach())
    value.backward()
    assert value.item() == 0 and torch.equal(pred.grad, torch.zeros_like(pred))


def test_focal_frequency_is_computed_in_fp32_and_patches_must_fit():
    half = images(dtype=torch.bfloat16)
    assert focal_frequency(half, images(1, dtype=torch.float32)).dtype == torch.float32
    with pytest.raises(ValueError, match=r'^patch_factor: 5 does not divide the sides of \(2, 3, 12, 18\)'):
        focal_frequency(images(0), images(1), patch_factor=5)
    with pytest.raises(ValueError, match='^patch_factor must be at least 1, got 0'):
        build_loss({'type': 'FocalFrequencyLoss', 'patch_factor': 0})


# --- MS-SSIM


def naive_ms_ssim(a, b, weights):
    """Wang et al. 2003, one channel of one image, window by window."""
    kernel = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    result = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            a, b = (image.reshape(len(image) // 2, 2, -1, 2).mean((1, 3)) for image in (a, b))
        windows = [np.lib.stride_tricks.sliding_window_view(image, (11, 11)) for image in (a, b)]
        mean_a, mean_b = ((window * kernel).sum((-2, -1)) for window in windows)
        centred = [w - m[..., None, None] for w, m in zip(windows, (mean_a, mean_b), strict=True)]
        variance_a, variance_b = ((c * c * kernel).sum((-2, -1)) for c in centred)
        covariance = (centred[0] * centred[1] * kernel).sum((-2, -1))
        part = (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
        if scale == len(weights) - 1:
            part = part * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        result *= part.mean() ** weight
    return result


def similar(shape):
    clean = F.interpolate(images(0, (1, 3, 6, 6), torch.float32), size=shape, mode='bicubic').clamp(0, 1)
    return (clean + 0.1 * (images(1, clean.shape, torch.float32) - 0.5)).clamp(0, 1), clean


@pytest.mark.parametrize('scale_weights', [None, [0.5, 0.25, 0.25]])
def test_ms_ssim_matches_its_definition(scale_weights):
    pytest.importorskip('piq')
    size = (48, 64) if scale_weights else (176, 192)
    pred, target = similar(size)
    loss = build_loss({'type': 'MSSSIMLoss', 'loss_weight': 0.5, 'scale_weights': scale_weights})
    weights = scale_weights or [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    channels = zip(pred[0].double().numpy(), target[0].double().numpy(), strict=True)
    expected = 0.5 * (1 - np.mean([naive_ms_ssim(a, b, weights) for a, b in channels]))
    assert loss(pred, target).item() == pytest.approx(expected, rel=1e-3)


def test_ms_ssim_accepts_outputs_beyond_the_range_and_has_a_gradient_inside():
    pytest.importorskip('piq')
    pred, target = similar((48, 64))
    loss = build_loss({'type': 'MSSSIMLoss', 'scale_weights': [1, 1, 1]})
    wide = (3 * pred - 1).requires_grad_()
    assert loss(wide, target) == loss(wide.clamp(0, 1), target)
    loss(wide, target).backward()
    inside = (wide > 0) & (wide < 1)
    assert wide.grad.isfinite().all() and (wide.grad[inside] != 0).all() and (wide.grad[~inside] == 0).all()
    assert loss(target, target).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(('options', 'least'), [({}, 161), ({'scale_weights': [1, 1, 1]}, 41)])
def test_crops_too_small_for_ms_ssim_are_refused_before_training(options, least):
    pytest.importorskip('piq')
    loss = build_loss({'type': 'MSSSIMLoss', **options})
    assert loss.least_size(options) == least
    loss(images(0, (1, 1, least, least)), images(1, (1, 1, least, least)))
    with pytest.raises(ValueError, match='size'):
        loss(images(0, (1, 1, least - 1, least)), images(1, (1, 1, least - 1, least)))
    opt = {'datasets': {'train': {'gt_size': 200, 'progressive': {'gt_sizes': [200, least]}}}}
    check_least_size(opt, 'MSSSIMLoss', least)
    opt['datasets']['train']['gt_size'] = least - 1
    with pytest.raises(ValueError, match=f'^MSSSIMLoss needs crops of at least {least}, and .* has {least - 1}'):
        check_least_size(opt, 'MSSSIMLoss', least)


# --- DISTS


@pytest.fixture(scope='module')
def dists_files(tmp_path_factory):
    """Random weights under the names of torchvision's VGG16 and of DISTS."""
    pytest.importorskip('piq')
    folder = tmp_path_factory.mktemp('dists')
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs['D']).state_dict()
    torch.save({f'features.{name}': value for name, value in features.items()}, folder / 'vgg16.pth')
    heads = {name: torch.rand(1, sum(CHANNELS), 1, 1) for name in ('alpha', 'beta')}
    torch.save(heads, folder / 'dists.pt')
    return {'weights': str(folder / 'vgg16.pth'), 'heads': str(folder / 'dists.pt')}


def naive_dists(pred, target, files):
    """Ding et al. 2020, Eq. 3 to 7, of two images (1, 3, h, w)."""
    state, heads = (torch.load(files[name]) for name in ('weights', 'heads'))
    total = heads['alpha'].sum() + heads['beta'].sum()
    hann = torch.outer(*2 * [torch.tensor([0.25, 0.5, 0.25])])

    def stages(image):
        found, index = [image], 0
        x = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
            3, 1, 1
        )
        for layer in vgg.cfgs['D']:
            if layer == 'M':
                found.append(x)
                window = hann.expand(x.shape[1], 1, 3, 3)
                x = (F.conv2d(x**2, window, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()
                index += 1
            else:
                x = F.conv2d(x, state[f'features.{index}.weight'], state[f'features.{index}.bias'], padding=1).relu()
                index += 2
        return found

    similarity, channel = 0.0, 0
    for a, b in zip(stages(pred), stages(target), strict=True):
        for x, y in zip(a[0].double(), b[0].double(), strict=True):
            texture = (2 * x.mean() * y.mean() + 1e-6) / (x.mean() ** 2 + y.mean() ** 2 + 1e-6)
            covariance = ((x - x.mean()) * (y - y.mean())).mean()
            structure = (2 * covariance + 1e-6) / (x.var(correction=0) + y.var(correction=0) + 1e-6)
            weights = (heads[name][0, channel, 0, 0] / total for name in ('alpha', 'beta'))
            similarity += sum(w * part for w, part in zip(weights, (texture, structure), strict=True))
            channel += 1
    assert channel == sum(CHANNELS)
    return 1 - similarity.item()


def test_dists_matches_its_definition(dists_files):
    pred, target = similar((40, 48))
    loss = build_loss({'type': 'DISTSLoss', 'loss_weight': 0.5, **dists_files})
    assert loss(pred, target).item() == pytest.approx(0.5 * naive_dists(pred, target, dists_files), rel=1e-3)


def test_dists_is_zero_for_equal_images_frozen_and_has_a_finite_gradient(dists_files):
    state = torch.random.get_rng_state()
    loss = build_loss({'type': 'DISTSLoss', **dists_files})
    assert torch.equal(state, torch.random.get_rng_state()), 'building a loss must not change a training run'
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    pred, target = similar((40, 48))
    assert loss(target, target).item() == pytest.approx(0, abs=1e-5)
    for other in (pred, target.clone()):
        other.requires_grad_()
        loss(other, target).backward()
        assert other.grad.isfinite().all()
    assert pred.grad.abs().sum() > 0


def test_nothing_is_downloaded_and_files_cannot_run_code(tmp_path, monkeypatch, capsys):
    pytest.importorskip('piq')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    message = r'no \S*vgg16-397923af\.pth and no \S*dists_weights\.pt: `dpmambair fetch vgg dists` downloads them'
    with pytest.raises(FileNotFoundError, match=message):
        build_loss({'type': 'DISTSLoss'})
    (problem,) = check_call('train.dists_opt', {'type': 'DISTSLoss'}, CALLS['LOSS'])
    assert problem.startswith('train.dists_opt: DISTS needs') and '`dpmambair fetch vgg dists`' in problem
    for name in ('vgg.pth', 'dists.pt'):
        torch.save({'features.0.weight': Malicious()}, tmp_path / name)
    with pytest.raises(ValueError, match='do not contain VGG16 and the weights of DISTS: Weights only load failed'):
        build_loss({'type': 'DISTSLoss', 'weights': str(tmp_path / 'vgg.pth'), 'heads': str(tmp_path / 'dists.pt')})
    assert 'executed' not in capsys.readouterr().out


class Malicious:
    def __reduce__(self):
        return print, ('executed',)


@pytest.mark.parametrize('loss', ['MSSSIMLoss', 'DISTSLoss'])
def test_without_piq_the_error_says_how_to_install_it(loss, monkeypatch):
    monkeypatch.setitem(sys.modules, 'piq', None)  # as if it were not installed
    (problem,) = check_call('train.x_opt', {'type': loss}, CALLS['LOSS'])
    assert problem.startswith(f'train.x_opt: {loss} needs piq')
    assert problem.endswith("pip install 'dpmambair_basicsr[losses]'")
