from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision
from basicsr.losses import build_loss
from basicsr.metrics import calculate_psnr
from torchvision.models import vgg

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable, and registers the losses)
from dpmambair_basicsr.losses.fft_loss import FFTLoss, fft_l1
from dpmambair_basicsr.losses.lpips_loss import LPIPSLoss
from dpmambair_basicsr.losses.lpips_network import BACKBONES, backbone_path, build_lpips

SQUEEZENET = Path(__file__).parents[2] / 'shared' / 'weights' / 'squeezenet1_1_caffe_as_torchvision.npz'


def images(seed=0, shape=(2, 3, 10, 13), dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- FFT


def test_fft_loss_is_the_distance_of_stacked_spectra():
    """By the definition: a DFT written as a matrix product, with odd and even sides."""
    pred, target = images(0, (1, 2, 4, 5), torch.float64), images(1, (1, 2, 4, 5), torch.float64)

    def dft(x):
        rows, columns = (
            torch.exp(-2j * torch.pi / n * torch.outer(*2 * [torch.arange(n, dtype=torch.float64)]))
            for n in x.shape[-2:]
        )
        return rows @ x.to(torch.complex128) @ columns

    a, b = dft(pred), dft(target)
    stacked = torch.stack([a.real - b.real, a.imag - b.imag], dim=-1)
    torch.testing.assert_close(fft_l1(pred, target), stacked.abs().mean(), rtol=1e-10, atol=0)


def test_fft_of_a_constant_offset():
    """Only the zero frequency differs, by H W c: one of 2 H W numbers per channel."""
    target = images(dtype=torch.float64)
    torch.testing.assert_close(fft_l1(target + 0.25, target), torch.tensor(0.25 / 2, dtype=torch.float64))


def test_fft_grows_with_the_square_root_of_the_area():
    noise = torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    small, large = (fft_l1(n, torch.zeros_like(n)) for n in (noise[..., :16, :16], noise))
    assert (large / small).item() == pytest.approx(4, rel=0.05)


def test_fft_is_smallest_at_equality_with_a_finite_gradient():
    target = images()
    pred = target.clone().requires_grad_()
    loss = fft_l1(pred, target)
    loss.backward()
    assert loss.item() == 0 and torch.equal(pred.grad, torch.zeros_like(pred))


def test_fft_gradcheck():
    pred = images(0, (1, 2, 4, 5), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(fft_l1, (pred, images(1, (1, 2, 4, 5), torch.float64)))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_fft_of_half_precision_images_is_computed_in_fp32(dtype):
    pred, target = images(0, dtype=dtype), images(1)
    loss = fft_l1(pred, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, fft_l1(pred.float(), target), rtol=0, atol=0)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(fft_l1(pred, target), loss, rtol=0, atol=0)


def test_fft_module_is_registered_and_weighted():
    loss = build_loss({'type': 'FFTLoss', 'loss_weight': 0.001})
    assert isinstance(loss, FFTLoss)
    torch.testing.assert_close(loss(images(0), images(1)), 0.001 * fft_l1(images(0), images(1)))
    with pytest.raises(TypeError, match='reduction'):
        build_loss({'type': 'FFTLoss', 'reduction': 'sum'})


# --- PSNR


def test_psnr_loss_equals_the_metric():
    """BasicSR's own metric, on images whose values are exact in 8 bits."""
    pred, target = ((images(seed) * 255).round() for seed in (0, 1))
    pred[1] = target[1] + 3 * (target[1] < 128) - 1  # the second image differs little
    psnr = [
        calculate_psnr(*(image.permute(1, 2, 0).numpy() for image in pair), crop_border=0)
        for pair in zip(pred, target, strict=True)
    ]
    loss = build_loss({'type': 'PSNRLoss', 'loss_weight': 0.5})
    assert loss(pred / 255, target / 255).item() == pytest.approx(-0.5 * np.mean(psnr), rel=1e-4)


# --- LPIPS


@pytest.fixture(scope='module')
def squeezenet(tmp_path_factory):
    if not SQUEEZENET.is_file():
        pytest.skip(f'no SqueezeNet weights in {SQUEEZENET}')
    path = tmp_path_factory.mktemp('weights') / 'squeezenet.pth'
    with np.load(SQUEEZENET) as arrays:
        torch.save({name: torch.from_numpy(arrays[name]) for name in arrays.files}, path)
    return str(path)


@pytest.fixture(scope='module')
def random_backbones(tmp_path_factory):
    """Files of the right shape with random weights, under torchvision's names."""
    folder = tmp_path_factory.mktemp('random')
    torch.manual_seed(0)
    models = {
        'alex': torchvision.models.AlexNet(),
        'squeeze': torchvision.models.SqueezeNet('1_1'),
        'vgg': torch.nn.ModuleDict({'features': vgg.make_layers(vgg.cfgs['D'])}),  # VGG16 without its large classifier
    }
    for net, model in models.items():
        torch.save(model.state_dict(), folder / f'{net}.pth')
    return folder


@pytest.fixture
def random_squeeze(random_backbones):
    return str(random_backbones / 'squeeze.pth')


def test_lpips_measures_distance(squeezenet):
    loss = LPIPSLoss(net='squeeze', weights=squeezenet)
    clean = torch.nn.functional.interpolate(images(0, (1, 3, 8, 8)), size=64, mode='bicubic').clamp(0, 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    values = [loss((clean + sigma * noise).clamp(0, 1), clean).item() for sigma in (0, 0.02, 0.08, 0.3)]
    assert values[0] == 0 and all(np.diff(values) > 0.005), values


@pytest.mark.filterwarnings('ignore::UserWarning')  # lpips calls torchvision the old way
def test_lpips_equals_the_package(random_squeeze):
    """Built by hand from torchvision's network: same slices, same heads."""
    reference = lpips.LPIPS(net='squeeze', pnet_rand=True, verbose=False)
    trunk = torchvision.models.squeezenet1_1()
    trunk.load_state_dict(torch.load(random_squeeze))
    for name, weight in trunk.features.state_dict().items():
        owner = next(part for part in reference.net.children() if name.split('.')[0] in dict(part.named_children()))
        owner.get_parameter(name).data = weight
    pred, target = images(0, (2, 3, 40, 44)), images(1, (2, 3, 40, 44))
    expected = 0.5 * reference(2 * pred - 1, 2 * target - 1).mean()
    torch.testing.assert_close(LPIPSLoss(0.5, 'squeeze', random_squeeze)(pred, target), expected)


@pytest.mark.parametrize('net', BACKBONES)
def test_lpips_loads_every_backbone_strictly(net, random_backbones, capsys):
    state = torch.random.get_rng_state()
    network = build_lpips(net, str(random_backbones / f'{net}.pth'))
    assert torch.equal(state, torch.random.get_rng_state()), 'building a metric must not change a training run'
    assert capsys.readouterr().out == ''
    saved = torch.load(random_backbones / f'{net}.pth')
    loaded = {f'features.{name.split(".", 1)[1]}': value for name, value in network.net.state_dict().items()}
    assert loaded and all(torch.equal(value, saved[name]) for name, value in loaded.items())
    heads = torch.load(Path(lpips.__file__).parent / 'weights' / 'v0.1' / f'{net}.pth', map_location='cpu')
    assert all(torch.equal(network.state_dict()[name], value) for name, value in heads.items())


def test_lpips_is_frozen_and_stays_in_eval_mode(random_squeeze):
    loss = build_loss({'type': 'LPIPSLoss', 'net': 'squeeze', 'weights': random_squeeze}).train()
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules())
    pred = images(0, (1, 3, 32, 32)).requires_grad_()
    value = loss(pred, images(1, (1, 3, 32, 32)))
    value.backward()
    assert value.item() == loss(pred, images(1, (1, 3, 32, 32))).item(), 'no dropout'
    assert pred.grad.isfinite().all() and pred.grad.abs().sum() > 0


def test_lpips_gradient_is_finite_at_equality(random_squeeze):
    pred = images(0, (1, 3, 32, 32)).requires_grad_()
    LPIPSLoss(net='squeeze', weights=random_squeeze)(pred, pred.detach()).backward()
    assert pred.grad.isfinite().all()


def test_errors_say_where_missing_weights_are_expected(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))

    def no_download(*args, **kwargs):
        raise AssertionError('tried to download')

    monkeypatch.setattr('urllib.request.urlopen', no_download)
    message = rf'{tmp_path}/hub/checkpoints/alexnet-owt-\w+\.pth: `dpmambair fetch alex` downloads https://\S+/alexnet'
    with pytest.raises(FileNotFoundError, match=message):
        LPIPSLoss()
    with pytest.raises(
        FileNotFoundError, match=r"backbone 'vgg' in \S*/nowhere.pth: `dpmambair fetch vgg` downloads \S*vgg16"
    ):
        LPIPSLoss(net='vgg', weights=str(tmp_path / 'nowhere.pth'))


def test_weights_are_found_in_torchs_cache(random_squeeze, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    path = Path(backbone_path('squeeze'))
    path.parent.mkdir(parents=True)
    path.write_bytes(Path(random_squeeze).read_bytes())
    pred, target = images(0, (1, 3, 32, 32)), images(1, (1, 3, 32, 32))
    assert LPIPSLoss(net='squeeze')(pred, target) == LPIPSLoss(net='squeeze', weights=random_squeeze)(pred, target)


@pytest.mark.parametrize(('net', 'file'), [('alex', 'squeeze'), ('vgg', 'alex'), ('squeeze', 'vgg')])
def test_weights_of_another_network_are_refused(net, file, random_backbones):
    message = rf"{file}.pth does not contain the LPIPS backbone '{net}' \({Path(BACKBONES[net].url).name}\): \d+ of its"
    with pytest.raises(ValueError, match=message):
        build_lpips(net, str(random_backbones / f'{file}.pth'))


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="net must be one of alex, vgg, squeeze, got 'vgg19'"):
        LPIPSLoss(net='vgg19')


class Malicious:
    def __reduce__(self):
        return print, ('executed',)


def test_weights_cannot_execute_code(tmp_path, capsys):
    torch.save({'features.0.weight': Malicious()}, tmp_path / 'bad.pth')
    with pytest.raises(Exception, match='[Ww]eights.only'):
        build_lpips('alex', str(tmp_path / 'bad.pth'))
    assert 'executed' not in capsys.readouterr().out
