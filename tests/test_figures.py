"""`python -m dpmambair_basicsr figures`, with tiny networks: the numbers in each figure, and that it is drawn."""

import csv
import sys

import cv2
import numpy as np
import pytest
import torch
from support import commands, pipelines
from torch.nn import functional as F

import dpmambair_basicsr
from dpmambair_basicsr.archs import DegradationAutoencoder, DPMambaIR
from dpmambair_basicsr.archs.blocks import planar_scan
from dpmambair_basicsr.inference import figures
from dpmambair_basicsr.inference.frequency_gap import RINGS, amplitudes, frequency_gap
from dpmambair_basicsr.inference.step_sizes import recorded_step_sizes
from dpmambair_basicsr.results.run import read_run

pytest.importorskip('matplotlib')
dpmambair_basicsr.register()

SMALL = {'dim': 16, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2, 'd_inner': [8] * 4}
SMALL |= {'embed_dim': 8, 'extractor_channels': [8, 8]}
STAGE_1 = {'embed_dim': 8, 'extractor_channels': [8, 8], 'channels': 4, 'num_fusion_blocks': 1, 'num_refine_blocks': 1}
BLOCKS = [f'{part}_level{level}.0.attn' for part, level in zip(['encoder'] * 3, (1, 2, 3), strict=True)]
BLOCKS += ['latent.0.attn', *(f'decoder_level{level}.0.attn' for level in (3, 2, 1)), 'refinement.0.attn']


def add_noise(image):
    return (image + np.random.default_rng(0).normal(0, 60, image.shape)).clip(0, 255).astype(np.uint8)


def darken(image):
    return image // 8


KINDS = {'dark': darken, 'noisy': add_noise}


def randomised(net, seed):
    """With prompts and alphas that have an effect."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if 'modulation' in name or name.endswith('.alpha'):
                parameter += 0.3 * torch.randn_like(parameter)
    return net


def save(net, options, file):
    torch.save({'params': net.state_dict(), 'network_g': {'type': type(net).__name__, **options}}, file)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """data/{dark,noisy}/{LQ,GT}, with.pth, without.pth (HEB), same.pth, which returns its input, and stage1.pth."""
    folder = tmp_path_factory.mktemp('figures')
    rng = np.random.default_rng(0)
    for kind, degrade in KINDS.items():
        for name in range(3):
            clean = cv2.resize(
                rng.integers(60, 200, (6, 6, 3), dtype=np.uint8), (45, 38), interpolation=cv2.INTER_CUBIC
            )
            for side, image in {'LQ': degrade(clean), 'GT': clean}.items():
                file = folder / 'data' / kind / side / f'{name}.png'
                file.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(file), image)
    for seed, (name, high_frequency) in enumerate({'with': True, 'without': False, 'same': True}.items()):
        torch.manual_seed(seed)
        options = SMALL | {'high_frequency': high_frequency}
        net = randomised(DPMambaIR(**options), seed)
        if name == 'same':
            torch.nn.init.zeros_(net.output.weight)
        save(net, options, folder / f'{name}.pth')
    save(DegradationAutoencoder(**STAGE_1), STAGE_1, folder / 'stage1.pth')
    return folder


def run(folder, *arguments) -> None:
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['figures', *arguments])
        figures.main()


def figure(folder, *arguments) -> list[dict[str, str]]:
    """The rows of a figure's table, as written by the command."""
    run(folder, *arguments, '-o', 'made/figure.png')
    return table(folder)


def table(folder) -> list[dict[str, str]]:
    drawing = cv2.imread(str(folder / 'made/figure.png'))
    assert drawing.shape[1] > 500 and drawing.std() > 5
    with (folder / 'made/figure.csv').open(encoding='utf-8', newline='') as stream:
        return list(csv.DictReader(stream))


def test_spectra_of_equal_halved_and_blurred_images():
    image = np.random.default_rng(0).random((96, 128, 3))
    gap, difference = frequency_gap([amplitudes(image, image)])
    assert not gap.any() and not difference.any() and gap.shape == (RINGS,)
    gap, difference = frequency_gap([amplitudes(image, image / 2 + 0.3)])
    assert gap == pytest.approx(6.0206, abs=1e-4) and difference == pytest.approx(0.5)
    gap, difference = frequency_gap([amplitudes(image, cv2.GaussianBlur(image, (0, 0), 1))])
    assert abs(gap[0]) < 0.5 and gap[-1] > 10 and difference[0] < 0.1 and difference[-1] > 0.8


def test_frequency_figure_compares_spectra(folder):
    """A network that returns its input has the spectrum of the degraded images; another one does not."""
    rows = figure(folder, 'frequency', '-w', 'same.pth', 'with HEB=with.pth', '-d', 'data')
    networks = {row['network'] for row in rows}
    assert networks == {'same', 'with HEB', 'degraded image'} and len(rows) == 3 * 3 * RINGS

    def curve(network, kind, column='missing amplitude (dB)'):
        return [float(row[column]) for row in rows if (row['network'], row['degradation']) == (network, kind)]

    for kind in (*KINDS, 'all'):
        assert curve('same', kind) == curve('degraded image', kind) != curve('with HEB', kind)
    assert curve('same', 'dark')[:4] == pytest.approx([20 * np.log10(8)] * 4, abs=0.5), 'an eighth of the brightness'
    for column in ('missing amplitude (dB)', 'relative difference'):
        both = [curve('with HEB', kind, column) for kind in KINDS]
        assert curve('with HEB', 'all', column) == pytest.approx(np.mean(both, axis=0))


@pytest.mark.parametrize('options', [{}, {'prompt': []}, {'directions': 4}, {'insertion': 'concat'}], ids=str)
def test_step_sizes_are_those_of_the_scans(options, monkeypatch):
    """Compared with the arguments of each scan."""
    torch.manual_seed(0)
    net, called = randomised(DPMambaIR(**SMALL | options), 0).eval(), []

    def omni_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, *rest):
        rank = dt_projs_weight.shape[2]
        weight = x_proj_weight[..., :rank, :].expand(len(x), -1, -1, -1)
        low = torch.einsum('bkrd,bdl->bkrl', weight, x.flatten(2))
        delta = F.softplus(torch.einsum('kdr,bkrl->bkdl', dt_projs_weight, low) + dt_projs_bias[..., None])
        called.append((delta.mean(dim=(1, 2, 3)), A))
        return scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, *rest)

    scan = planar_scan.omni_scan
    monkeypatch.setattr(planar_scan, 'omni_scan', omni_scan)
    with torch.no_grad(), recorded_step_sizes(net) as found:
        net(torch.rand(2, 3, 16, 24))
    assert list(found) == BLOCKS and len(called) == len(BLOCKS)
    for name, (delta, A) in zip(BLOCKS, called, strict=True):
        (size,) = found[name]
        scale = (A / -net.get_submodule(name).A_logs.exp()).flatten(A.dim() - 2).mean(dim=-1)  # of each image, in A
        torch.testing.assert_close(size, delta * scale)


def test_step_sizes_are_grouped_by_degradation(folder):
    rows = figure(folder, 'delta', '-w', 'with.pth', '-d', 'data', '--count', '2')
    assert [(row['degradation'], row['block'], row['images']) for row in rows] == [
        (kind, block, '2') for kind in KINDS for block in BLOCKS
    ]
    restorer = dpmambair_basicsr.load(folder / 'with.pth')
    with recorded_step_sizes(restorer.net) as found:
        for name in range(2):
            restorer.restore(cv2.imread(str(folder / 'data/noisy/LQ' / f'{name}.png'))[..., ::-1].copy(), tile=0)
    sizes = {row['block']: float(row['mean Δ']) for row in rows if row['degradation'] == 'noisy'}
    assert sizes == pytest.approx({block: np.mean(values) for block, values in found.items()}, rel=1e-5)
    for block in BLOCKS:
        ratios = [float(row['Δ / mean']) for row in rows if row['block'] == block]
        assert np.mean(ratios) == pytest.approx(1) and ratios[0] != ratios[1]


def test_extractor_figure_shows_psnr_and_separates_degradations(folder, tmp_path):
    """The PSNR is that of a test of stage 1; any extractor separates darkness from noise."""
    rows = {row['degradation']: row for row in figure(folder, 'extractor', '-w', 'stage1.pth', '-d', 'data')}
    assert list(rows) == [*KINDS, 'all'] and rows['all']['images'] == '6' and rows['dark']['embedding'] == '8'
    data = {
        f'test_{kind}': {'name': kind, 'type': 'PairedDegradationDataset'}
        | {f'dataroot_{side.lower()}': str(folder / 'data' / kind / side) for side in ('LQ', 'GT')}
        for kind in KINDS
    }
    opt = {'name': 'stage1', 'model_type': 'DegradationExtractorModel', 'scale': 1, 'num_gpu': 0, 'datasets': data}
    opt |= {'network_g': {'type': 'DegradationAutoencoder', **STAGE_1}, 'manual_seed': 0}
    opt |= {'path': {'pretrain_network_g': str(folder / 'stage1.pth')}}
    opt |= {'val': {'save_img': False, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}}}
    pipelines.test(commands.write_options(opt, tmp_path / 'stage1.yml'), cwd=tmp_path)
    for part in read_run(tmp_path / 'results/stage1').sets:
        assert float(rows[part.name]['reconstruction PSNR (dB)']) == pytest.approx(part.restored['psnr'], abs=1e-3)
        assert float(rows[part.name]['classification accuracy']) == 1


def test_alpha_figure_is_drawn_by_the_command(folder):
    """By the command that users type."""
    command = (
        '-m',
        'dpmambair_basicsr',
        'figures',
        'alpha',
        '-w',
        'one=with.pth',
        'two=same.pth',
        '-o',
        'made/figure.png',
    )
    done = commands.warm_python(*command, cwd=folder)
    assert done.returncode == 0 and 'made/figure.png, made/figure.csv' in done.stdout
    rows = table(folder)
    expected = [
        (name, block, torch.load(folder / file, weights_only=True)['params'][f'{block}.high_frequency.alpha'].item())
        for name, file in {'one': 'with.pth', 'two': 'same.pth'}.items()
        for block in BLOCKS
    ]
    assert [(row['network'], row['block'], float(row['alpha'])) for row in rows] == expected


@pytest.mark.parametrize(
    ('arguments', 'message'),
    {
        ('alpha', '-w', 'without.pth', '-o', 'x.png'): 'without.pth: contains no high-frequency enhancement block',
        ('alpha', '-w', 'with.pth', '-o', 'x.jpg'): 'x.jpg: must end in .png',
        ('alpha', '-w', 'with.pth', '-o', 'with.pth/x.png'): 'with.pth: it is a file; expected a folder',
        ('alpha', '-w', 'with.pth', 'a/with.pth', '-o', 'x.png'): 'two networks are called with; write NAME=with.pth',
        ('alpha', '-w', 'with.pth', '-d', 'data', '-o', 'x.png'): '-d: required by all figures except alpha',
        ('frequency', '-w', 'with.pth', '-o', 'x.png'): '-d: required by all figures except alpha',
        ('frequency', '-w', 'with.pth', '-d', 'made', '-o', 'x.png'): 'made: neither it nor any of its sub-folders',
        ('frequency', '-w', 'with.pth', '-d', 'broken', '-o', 'x.png'): 'broken/LQ/0.png: not a picture',
        ('extractor', '-w', 'with.pth', '-d', 'data', '-o', 'x.png'): 'with.pth: contains a DPMambaIR; reconstruction',
        ('delta', '-w', 'no.pth', '-d', 'data', '-o', 'x.png'): 'no.pth',
        ('delta', '-w', 'with.pth', '-d', 'data', '-o', 'x.png', '--count', '0'): '--count: must be 1 or more',
    }.items(),
)  # fmt: skip
def test_figures_that_cannot_be_drawn_are_refused_in_one_line(folder, arguments, message, capsys):
    (folder / 'made').mkdir(exist_ok=True)
    for side in ('LQ', 'GT'):
        (folder / 'broken' / side).mkdir(parents=True, exist_ok=True)
        (folder / 'broken' / side / '0.png').write_bytes(b'broken')
    with pytest.raises(SystemExit) as end:
        run(folder, *arguments)
    assert end.value.code != 0 and message in f'{end.value} {capsys.readouterr().err}'
    assert not (folder / 'x.png').exists() and not (folder / 'x.csv').exists()
