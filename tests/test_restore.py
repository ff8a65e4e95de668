"""From a checkpoint to restored images: options in checkpoints, `load`, tiles."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from basicsr.models import build_model
from basicsr.models.sr_model import SRModel
from basicsr.utils import tensor2img
from support.commands import python
from support.restorers import CPU, DPMAMBAIR, SMALL, VMAMBAIR, photo, restorer_of
from torch import nn
from torch.nn import functional as F

import dpmambair_basicsr
from dpmambair_basicsr import convert, load
from dpmambair_basicsr.archs import degradation_extractor_arch
from dpmambair_basicsr.archs.blocks import ImageMean
from dpmambair_basicsr.files.checkpoints import read_weights
from dpmambair_basicsr.inference.memory import OutOfMemory, PeakMemory
from dpmambair_basicsr.inference.restorer import Restorer
from dpmambair_basicsr.inference.tiles import blend_weights, tile_spans, tiled
from dpmambair_basicsr.ops import use_backend


def save_model(folder, network, training=True, **changes):
    """A model with a checkpoint in folder, written by BasicSR's `save`; (model, path)."""
    torch.manual_seed(0)
    opt = {
        'name': 'model',
        'model_type': 'RestorationModel',
        'num_gpu': 0,
        'dist': False,
        'rank': 0,
        'is_train': training,
        'datasets': {'train': {}},
        'network_g': network,
        'path': {'models': str(folder), 'training_states': str(folder)},
        'train': {
            'optim_g': {'type': 'AdamW', 'lr': 1e-2},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [9]},
            'total_iter': 9,
            'ema_decay': 0.5,
            'pixel_opt': {'type': 'L1Loss'},
        },
        **changes,
    }
    model = build_model(opt)
    model.save(0, 3)
    return model, folder / 'net_g_3.pth'


# Checkpoints know their network


def test_a_checkpoint_holds_the_options_of_its_network_as_plain_values(tmp_path):
    network = {**DPMAMBAIR, 'insertion': 'none', 'num_blocks': (1, 1, 1, 1)}
    model, path = save_model(tmp_path, network)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.keys() == {'params', 'params_ema', 'network_g'}
    assert type(checkpoint['network_g']) is dict
    assert checkpoint['network_g'] == {**network, 'num_blocks': [1, 1, 1, 1]} == {**model.opt['network_g'], **SMALL}
    assert read_weights(str(path), 'params_ema').keys() == model.net_g.state_dict().keys()


def test_the_discriminator_has_a_file_of_its_own(tmp_path):
    parts = {'network_d': {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}}
    model, _ = save_model(tmp_path, VMAMBAIR)
    model.opt |= parts
    model.save_network(nn.Conv2d(1, 1, 1), 'net_d', 3)
    checkpoint = torch.load(tmp_path / 'net_d_3.pth', weights_only=True)
    assert checkpoint.keys() == {'params', 'network_d'} and checkpoint['network_d'] == parts['network_d']


def test_basicsr_loads_the_file_by_its_own_code(tmp_path):
    network = {'type': 'MSRResNet', 'num_feat': 4, 'num_block': 1, 'upscale': 4}
    model, path = save_model(tmp_path, network)
    assert 'network_g' in torch.load(path, weights_only=True)
    with torch.no_grad():
        model.net_g_ema.conv_first.weight.add_(1)
    model.save(0, 3)
    for key, source in (('params', model.net_g), ('params_ema', model.net_g_ema)):
        opt = {**model.opt, 'is_train': False, 'path': {'pretrain_network_g': str(path), 'param_key_g': key}}
        loaded = SRModel(opt).net_g
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in source.state_dict().items())


def test_our_models_load_files_with_and_without_options(tmp_path):
    model, path = save_model(tmp_path, VMAMBAIR)
    old = tmp_path / 'old.pth'
    torch.save({key: value for key, value in torch.load(path).items() if key != 'network_g'}, old)
    for file in (path, old):
        again, _ = save_model(tmp_path, VMAMBAIR, path={**model.opt['path'], 'pretrain_network_g': str(file)})
        for name, value in model.net_g_ema.state_dict().items():
            assert torch.equal(again.net_g_ema.state_dict()[name], value)


# load


def test_importing_load_imports_neither_torch_nor_basicsr(tmp_path):
    code = (
        'import sys; from dpmambair_basicsr import load; print({"torch", "basicsr", "numpy", "cv2"} & {*sys.modules})'
    )
    process = python('-c', code, cwd=tmp_path)
    assert process.stdout.strip() == 'set()', process.stdout


@pytest.mark.parametrize('network', [VMAMBAIR, {**VMAMBAIR, 'scale': 4}, {**DPMAMBAIR, 'insertion': 'none'}])
def test_restore_gives_what_validation_gives(network, tmp_path):
    model, path = save_model(tmp_path, network)
    with torch.no_grad():  # so that the average differs
        for parameter in model.net_g_ema.parameters():
            parameter.mul_(1.1)
    model.save(0, 3)
    image = photo(21, 30)
    tensor = torch.from_numpy(image).permute(2, 0, 1) / 255
    model.feed_data({'lq': tensor[None], 'gt': tensor[None]})
    model.test()
    net = load(path)
    result = net.restore(image)
    assert result.dtype == np.uint8 and net.scale == network.get('scale', 1)
    np.testing.assert_array_equal(result, tensor2img(model.output, rgb2bgr=False))
    torch.testing.assert_close(net.restore(tensor), model.output[0].clamp(0, 1))


def test_images_batches_and_dtypes_are_restored():
    net = restorer_of(VMAMBAIR)
    image = photo(17, 9)
    tensor = torch.from_numpy(image).permute(2, 0, 1) / 255
    expected = net.restore(tensor)
    assert expected.shape == tensor.shape and expected.min() >= 0 and expected.max() <= 1
    fine = net.restore(image.astype(np.uint16) * 257)
    assert fine.dtype == np.uint16
    np.testing.assert_allclose(fine / 65535, expected.permute(1, 2, 0), atol=2e-5)
    batch = net.restore(torch.stack([tensor, tensor.flip(2)]))
    assert torch.equal(batch[0], expected) and torch.equal(batch[1], net.restore(tensor.flip(2)))
    assert net.restore(tensor.double()).dtype == torch.float64
    np.testing.assert_array_equal(net.restore(image[::-1, ::-1]), net.restore(image[::-1, ::-1].copy()))
    assert net.restore(image[:1, :1]).shape == (1, 1, 3)


@pytest.mark.parametrize(
    'image',
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
    ],
)
def test_invalid_images_are_refused(image):
    with pytest.raises(ValueError, match=r'^image: '):
        restorer_of(VMAMBAIR).restore(image)


def test_errors_of_load_name_file_and_key(tmp_path):
    _, path = save_model(tmp_path, VMAMBAIR)
    checkpoint = torch.load(path)
    files = {
        'old': {'params': {**checkpoint['params'], 'another': torch.zeros(1)}},
        'foreign': {'params': {'conv.weight': torch.zeros(1)}},
        'unknown': {**checkpoint, 'network_g': {**VMAMBAIR, 'type': 'VmambaIr'}},
        'typo': {**checkpoint, 'network_g': {**VMAMBAIR, 'dimm': 4}},
        'value': {**checkpoint, 'network_g': {**VMAMBAIR, 'scale': 5}},
        'misfit': {**checkpoint, 'network_g': {**VMAMBAIR, 'dim': 8}},
    }
    stage_1 = {'type': 'DegradationAutoencoder', 'embed_dim': 4, 'extractor_channels': [4], 'channels': 4}
    of_class = {**DPMAMBAIR, 'degradation': 'class'}
    for name, options in {'stage_1': stage_1, 'class': of_class}.items():
        net = getattr(dpmambair_basicsr.archs, options['type'])(**{k: v for k, v in options.items() if k != 'type'})
        files[name] = {'params': net.state_dict(), 'network_g': options}
    for name, content in files.items():
        torch.save(content, tmp_path / f'{name}.pth')
    (tmp_path / 'text.pth').write_text('no checkpoint')
    messages = {
        'old.pth': r'old.pth: does not fit VmambaIR:\n.* not in the network: another',
        'foreign.pth': "foreign.pth: has no key 'network_g', .*--opt.*network=",
        'unknown.pth': 'unknown.pth: network_g.type: unknown type VmambaIr, did you mean VmambaIR',
        'typo.pth': 'typo.pth: network_g: TypeError: .*dimm',
        'value.pth': 'value.pth: network_g: scale: must be one of',
        'misfit.pth': r'misfit.pth: does not fit VmambaIR:\n.* of another shape: patch_embed.proj.weight',
        'stage_1.pth': 'stage_1.pth: network_g.type: DegradationAutoencoder does not map one RGB image',
        'class.pth': 'class.pth: network_g.type: DPMambaIR does not map .*needs a label',
        'text.pth': 'text.pth: not a checkpoint that torch.load can read',
        '3.state': '3.state: it is not a state dict; keys of the file: epoch, iter',
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='missing.pth'):
        load(tmp_path / 'missing.pth')
    with pytest.raises(ValueError, match="device: must be one of auto, cpu, cuda, mps, got 'tpu9'"):
        load(path, device='tpu9')
    torch.save(checkpoint['params'], tmp_path / 'bare.pth')
    assert load(tmp_path / 'bare.pth', network=VMAMBAIR).scale == 1


WRAPPED = {
    'bare': lambda state: state,
    'params': lambda state: {'params': state},
    'model': lambda state: {'model': state, 'epoch': 3},
    'state_dict': lambda state: {'state_dict': state, 'optimizer': {}},
    'compiled': lambda state: {f'_orig_mod.{name}': value for name, value in state.items()},
    'parallel and compiled': lambda state: {'model': {f'module._orig_mod.{n}': v for n, v in state.items()}},
    'Lightning': lambda state: {'state_dict': {f'model.{name}': value for name, value in state.items()}},
}


@pytest.mark.parametrize(
    'network', [VMAMBAIR, {**VMAMBAIR, 'scale': 4, 'channel_fusion': 'modulate'}, DPMAMBAIR], ids=str
)
@pytest.mark.parametrize('wrapping', WRAPPED)
def test_other_programs_checkpoints_are_recognised_everywhere(network, wrapping, tmp_path, caplog, monkeypatch):
    """By load (hence restore and export), convert and spandrel."""
    net, image = restorer_of(network), photo(11, 13)
    with torch.no_grad():
        net.net.state_dict()['patch_embed.proj.weight'].mul_(3)
    expected = net.restore(image)
    torch.save(WRAPPED[wrapping](net.net.state_dict()), tmp_path / 'net.pth')
    with caplog.at_level('WARNING'):
        np.testing.assert_array_equal(load(tmp_path / 'net.pth').restore(image), expected)
    assert f'net.pth: holds no network_g; by names and shapes it is a {network["type"]}, dim ' in caplog.text
    assert ("channel_fusion 'modulate' is assumed" in caplog.text) == ('scale' in network)

    monkeypatch.setattr('sys.argv', ['convert', *map(str, (tmp_path / 'net.pth', tmp_path / 'net.safetensors'))])
    convert.main()
    caplog.clear()
    np.testing.assert_array_equal(load(tmp_path / 'net.safetensors').restore(image), expected)
    assert not caplog.text, 'it says what it is'

    spandrel = pytest.importorskip('spandrel')
    registry = spandrel.ArchRegistry()
    pytest.importorskip('dpmambair_basicsr.integrations.spandrel').install(registry)
    model = spandrel.ModelLoader(registry=registry).load_from_file(tmp_path / 'net.pth')
    assert model.architecture.id == network['type'] and model.scale == network.get('scale', 1)
    assert all(torch.equal(value, net.net.state_dict()[name]) for name, value in model.model.state_dict().items())


@pytest.mark.parametrize('name', ['latent.0.attn.out_norm.body.weight', 'encoder_level1.0.attn.A_logs'])
def test_a_part_of_a_network_or_other_shapes_are_not_recognised(name, tmp_path):
    state = restorer_of(DPMAMBAIR).net.state_dict()
    for changed in ({k: v for k, v in state.items() if k != name}, {**state, name: torch.zeros(())}):
        torch.save(changed, tmp_path / 'net.pth')
        with pytest.raises(ValueError, match=r'net.pth: .*(not recognised|does not fit DPMambaIR)'):
            load(tmp_path / 'net.pth')


def test_half_precision_is_close():
    image = photo(24, 24)
    for network in (VMAMBAIR, DPMAMBAIR):
        net = restorer_of(network)
        exact = net.restore(image).astype(int)
        net.half = True
        assert 0 < np.abs(net.restore(image) - exact).mean() < 0.05 * np.abs(exact - image).mean()


def test_self_ensemble_is_equivariant_to_rotation():
    net = restorer_of(VMAMBAIR, scale=2)
    image = photo(16, 24)
    result = net.restore(image, self_ensemble=True)
    turned = net.restore(np.rot90(image), self_ensemble=True)
    assert np.abs(np.rot90(result).astype(int) - turned).max() <= 1
    assert np.abs(np.rot90(net.restore(image)).astype(int) - net.restore(np.rot90(image))).max() > 1


def test_an_output_that_is_not_finite_is_an_error():
    net = restorer_of(VMAMBAIR)
    net.net.output.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match='the output of the network is not finite'):
        net.restore(photo(8, 8))


# Tiles


@pytest.mark.parametrize(('length', 'tile', 'overlap'), [(8, 64, 16), (200, 64, 16), (72, 64, 32), (4096, 100, 0)])
def test_spans_cover_the_image_and_weights_sum_to_one(length, tile, overlap):
    spans = tile_spans(length, tile, overlap, 8)
    assert spans[0][0] == 0 and spans[-1][1] == length
    for (first, end), (following, _) in zip(spans, spans[1:], strict=False):
        assert (end - first, first % 8) == (tile // 8 * 8, 0) and end - following >= overlap
    for scale in (1, 3):
        total = torch.zeros(length * scale)
        for (first, end), weight in zip(spans, blend_weights(spans, scale), strict=True):
            assert (weight >= 0).all()
            total[first * scale : end * scale] += weight
        torch.testing.assert_close(total, torch.ones(length * scale))


def test_impossible_tiles_are_refused():
    net = restorer_of(VMAMBAIR)
    for options in ({'tile': 7}, {'tile': 16, 'overlap': -1}):
        with pytest.raises(ValueError, match=r'^tile: '):
            net.restore(photo(16, 16), **options)
    with pytest.raises(ValueError, match=r'^tile: expected int, got 64\.0$'):
        net.restore(photo(16, 16), tile=64.0)
    with pytest.raises(ValueError, match=r'^overlap: expected int, got 0\.5$'):
        net.restore(photo(16, 16), tile=8, overlap=0.5)


class Local(nn.Module):
    """Each output pixel depends on the 8 pixels around it, and on the mean of the image if this is provided."""

    stride = 8

    def __init__(self, scale, with_mean):
        super().__init__()
        torch.manual_seed(0)
        self.scale = scale
        self.body = nn.Sequential(nn.Conv2d(3, 6, 9, padding=4), nn.Tanh(), nn.Conv2d(6, 3, 9, padding=4))
        if with_mean:
            self.embed = lambda image: image.mean(dim=(2, 3), keepdim=True)

    def forward(self, x, embedding=0):
        return F.interpolate(self.body(x) + x * embedding, scale_factor=self.scale)


@pytest.mark.parametrize(('scale', 'with_mean'), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize(('height', 'width', 'tile'), [(150, 201, 64), (40, 300, 96), (64, 64, 64)])
def test_tiles_change_nothing_if_they_cover_the_receptive_field(scale, with_mean, height, width, tile):
    """Up to 1e-6: the outer quarter of the overlap, 8 of 32 pixels, is only context."""
    net = Restorer(Local(scale, with_mean), CPU)
    image = torch.rand(3, height, width)
    whole, in_tiles = net.restore(image, tile=0), net.restore(image, tile=tile, overlap=32)
    torch.testing.assert_close(in_tiles, whole, atol=1e-6, rtol=0)
    if (height, width) != (64, 64):
        assert (net.restore(image, tile=tile, overlap=8) - whole).abs().max() > 1e-3


class Pooling(nn.Module):
    """Pixels only depend on each other through the mean over the image, and not equally in all its orientations."""

    stride = 8

    def __init__(self):
        super().__init__()
        self.mean = ImageMean()
        self.pattern = torch.linspace(0, 1, 64).view(8, 8)

    def forward(self, x):
        pattern = self.pattern.repeat(x.shape[2] // 8, x.shape[3] // 8)
        return x / 2 + self.mean(x * pattern) / 2


@pytest.mark.parametrize('self_ensemble', [False, True])
def test_tiles_share_the_means_of_the_image(self_ensemble):
    net, image = Restorer(Pooling(), CPU), torch.rand(3, 64, 192) * torch.linspace(0.1, 1, 192)
    options = {'tile': 64, 'overlap': 0, 'self_ensemble': self_ensemble}
    seen = []
    in_tiles = net.restore(image, **options, progress=lambda *counts: seen.append(counts))
    assert seen == [(done, 6) for done in range(1, 7)]
    whole = net.restore(image, tile=0, self_ensemble=self_ensemble)
    torch.testing.assert_close(in_tiles, whole, atol=1e-6, rtol=0)
    assert (net.restore(image, **options, one_pass=True) - whole).abs().max() > 0.01
    torch.testing.assert_close(net.restore(image, tile=0), Pooling()(image[None])[0])  # no mean is left behind


def test_one_tile_is_the_network_itself():
    x = torch.rand(1, 3, 40, 24)
    (band,) = tiled(lambda x: x.sin(), x, [(0, 40)], [(0, 24)], 1)
    assert torch.equal(band, x.sin())


def forgetful(network, seed=0):
    """A network whose scans forget within about two pixels, as a trained one may, unlike Mamba's initialisation."""
    net = restorer_of(network, seed)
    for name, parameter in net.net.named_parameters():
        if name.endswith('dt_projs_bias'):
            parameter.fill_(5.0)
        if name == 'output.weight':
            parameter.normal_(0, 0.1)
    return net


def test_shared_means_bring_tiles_closer_to_the_whole():
    net = forgetful(DPMAMBAIR)
    for name, parameter in net.net.named_parameters():
        if name.endswith('alpha'):
            parameter.fill_(0.3)
    image = torch.from_numpy(photo(64, 384)).permute(2, 0, 1) / 255
    whole = net.restore(image, tile=0)
    alone, shared = (net.restore(image, tile=128, overlap=64, one_pass=one) - whole for one in (True, False))
    assert shared.abs().mean() < 0.5 * alone.abs().mean()


def test_tiles_agree_to_a_thousandth_if_scans_forget():
    net = forgetful(DPMAMBAIR)
    image = torch.from_numpy(photo(64, 384)).permute(2, 0, 1) / 255
    whole = net.restore(image, tile=0)
    assert (whole - image).abs().mean() > 0.01
    assert (net.restore(image, tile=256, overlap=128) - whole).abs().max() < 1e-3


@pytest.mark.parametrize(('network', 'seed'), [(VMAMBAIR, 1), (DPMAMBAIR, 6)])
def test_long_range_scans_leave_no_seams(network, seed):
    """Tiles then differ from the whole image, but without steps: columns and rows are equally smooth."""
    net = restorer_of(network, seed=seed)
    net.net.output.weight.normal_(0, 0.1)
    x = torch.linspace(0, 1, 192)
    image = (0.5 + 0.2 * torch.sin(3 * x)[:, None] * torch.cos(4 * x)).expand(3, -1, -1).contiguous()

    def steps(result):
        """Mean difference between adjacent columns and rows, without the border of the image."""
        return [result.diff(dim=axis).abs().mean(dim=(0, 3 - axis))[8:-8] for axis in (1, 2)]

    whole = net.restore(image, tile=0)
    blended, cut = (net.restore(image, tile=64, overlap=overlap) for overlap in (32, 0))
    assert (blended - whole).abs().max() > 1e-2, 'otherwise there is nothing to see here'
    for of_whole, of_blended, of_cut in zip(steps(whole), steps(blended), steps(cut), strict=True):
        assert of_blended.max() < 1.1 * of_whole.max() < of_cut.max()
    for of_blended, of_cut in zip(steps(blended - whole), steps(cut - whole), strict=True):
        assert of_blended.max() < 0.2 * of_cut.max()


def test_the_embedding_of_a_large_image_is_computed_in_blocks(monkeypatch):
    torch.manual_seed(0)
    extractor = degradation_extractor_arch.DegradationExtractor(embed_dim=8, channels=[4, 4, 4, 4, 4, 4]).eval()
    image = torch.rand(2, 3, 401, 550)

    def embed():
        with PeakMemory([*extractor.parameters(), image]) as memory:
            return extractor(image), memory.peak

    with torch.no_grad():
        whole, needed = embed()
        monkeypatch.setattr(degradation_extractor_arch, 'BLOCK', 64)
        in_blocks, less = embed()
    torch.testing.assert_close(in_blocks, whole, rtol=1e-5, atol=1e-6)
    assert less < needed / 5
    assert torch.equal(extractor(image), whole), 'with gradients, it is one block'


@torch.no_grad()
def test_memory_is_bounded_by_the_tile():
    net = restorer_of(VMAMBAIR)
    image = torch.rand(3, 256, 256)

    def peak(tile):
        with PeakMemory([*net.net.parameters(), image]) as memory:
            net.restore(image, tile=tile)
        return memory.peak

    with use_backend('torch'):  # the estimate's; others need less
        assert peak(0) == pytest.approx(net.bytes_per_pixel * 256**2, rel=0.2)
    assert peak(0) < 1.2 * net.bytes_per_pixel * 256**2
    assert peak(64) < net.bytes_per_pixel * 64**2 + 5 * 4 * image.numel()


class Hungry(Local):
    """Runs out of memory on more than 4096 pixels, as a GPU does."""

    def forward(self, x, embedding=0):
        if x.shape[-2] * x.shape[-1] > 4096:
            raise torch.OutOfMemoryError('out of memory')
        return super().forward(x, embedding)


def test_out_of_memory_is_reported_with_a_smaller_tile():
    """No smaller tile is used automatically: it would change the result."""
    net = Restorer(Hungry(1, False), CPU)
    image = torch.rand(3, 100, 300)
    for options, message in {
        (): r'^300 x 100 pixels: out of memory; tile=150 \(--tile 150\) needs less',
        (('tile', 128),): r'^300 x 100 pixels in tiles of 128: out of memory; tile=64 \(--tile 64\)',
        (('tile', 0),): '^300 x 100 pixels: out of memory; tile=150 ',
    }.items():
        with pytest.raises(OutOfMemory, match=message):
            net.restore(image, **dict(options))
    whole = Restorer(Local(1, False), CPU).restore(image)
    torch.testing.assert_close(net.restore(image, tile=64), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ('options', 'changes'), [({}, {}), ({'self_ensemble': True}, {'channel_fusion': 'modulate', 'scale': 2})]
)
def test_threads_may_share_a_network_and_its_means(options, changes):
    """Images with different means, in tiles: each result is bit-exact with that of a single thread."""
    net = restorer_of(VMAMBAIR, **changes)
    net.net.get_submodule('tail.1' if changes else 'output').weight.normal_(0, 0.1)
    images = [torch.from_numpy(photo(32, 48, seed) // (seed + 1)).permute(2, 0, 1) / 255 for seed in range(2)]

    def in_tiles(image):
        return net.restore(image, tile=32, overlap=16, **options)

    alone = [in_tiles(image) for image in images]
    with ThreadPoolExecutor(2) as pool:
        together = [*pool.map(in_tiles, images * 2)]
    assert all(torch.equal(result, expected) for result, expected in zip(together, alone * 2, strict=True))
    assert not torch.equal(alone[0], net.restore(images[0], tile=32, overlap=16, one_pass=True, **options))
