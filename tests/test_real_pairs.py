"""options/test_all_in_one.yml on published pairs: downloads in miniature, prepare_data, the test, its table.

Haze is SOTS outdoor in RESIDE-6K's layout; low light, training pairs of LOL as its test pairs, without LSRW.
"""

import csv
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from support.commands import PACKAGE_PARENT, command

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable, and registers the networks)
from dpmambair_basicsr import prepare_data
from dpmambair_basicsr.archs import DPMambaIR

metrics = pytest.importorskip('skimage.metrics', reason='its metrics are the reference')
SHARED = Path(__file__).parents[2] / 'shared' / 'data'
OPTIONS = PACKAGE_PARENT / 'options' / 'test_all_in_one.yml'
DATASETS = yaml.safe_load(OPTIONS.read_text(encoding='utf-8'))['datasets'].values()
# Command of prepare_data: (images in the shared data, paths in the download, number)
DOWNLOADS = {
    'reside6k': ('pairs/haze/SOTS-outdoor', {'LQ': 'test/hazy', 'GT': 'test/GT'}, 2),
    'rain100h': ('pairs/rain/Rain100H', {'LQ': 'Rain100H/input', 'GT': 'Rain100H/target'}, 3),
    'snow100k': ('pairs/snow/Snow100K', {'LQ': 'Snow100K-L/synthetic', 'GT': 'Snow100K-L/gt'}, 1),
    'lol': ('pairs/lowlight/LOL-our485', {'LQ': 'eval15/low', 'GT': 'eval15/high'}, 2),
    'gopro': ('pairs/blur/GoPro', {'LQ': 'test/GOPR0384_11_00/blur', 'GT': 'test/GOPR0384_11_00/sharp'}, 1),
    'bsd400': ('clean/CBSD68', {'': 'BSD400'}, 2),
}
COUNTS = {'RESIDE6K': 2, 'Rain100H': 3, 'Snow100K': 1, 'LOL_LSRW': 2, 'GoPro': 1, 'BSD400_noise': 2, 'BSD400_jpeg': 2}
NETWORK = {
    **{'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 0, 'd_inner': [4, 4, 4, 4], 'd_state': 1},
    **{'embed_dim': 8, 'extractor_channels': [4, 4]},
}


@pytest.fixture(scope='module')
def tested(tmp_path_factory):
    """A project folder after prepare_data and the test."""
    if not SHARED.is_dir():
        pytest.skip(f'no published pairs: {SHARED} does not exist')
    folder = tmp_path_factory.mktemp('all_in_one')
    prepare = prepare_data.main
    for name, (source, places, count) in DOWNLOADS.items():
        for part, place in places.items():
            download = folder / 'downloads' / name / place
            download.mkdir(parents=True)
            for image in sorted((SHARED / source / part).iterdir())[:count]:
                (download / image.name).symlink_to(image)
        target = ('--output', str(folder / 'datasets'), '--part', 'test')
        prepare([name, str(folder / 'downloads' / name), *target, '--any-count'])
    torch.manual_seed(0)
    network = DPMambaIR(**NETWORK)
    torch.nn.init.normal_(network.output.weight, std=0.02)  # so that it changes the images
    torch.save({'params': network.state_dict()}, folder / 'tiny.pth')
    small = [f'network_g:{key}={value}' for key, value in NETWORK.items()]
    changes = ('num_gpu=0', *small, 'path:pretrain_network_g=tiny.pth')
    process = command('test', '-opt', OPTIONS, '--force_yml', *changes, cwd=folder)
    assert process.returncode == 0, process.stdout
    return folder, process.stdout


def measure(image, truth) -> dict[str, float]:
    image, truth = (cv2.imread(str(file)).astype(np.float64) for file in (image, truth))
    window = {'gaussian_weights': True, 'sigma': 1.5, 'use_sample_covariance': False, 'channel_axis': 2}
    return {
        'psnr': metrics.peak_signal_noise_ratio(truth, image, data_range=255),
        'ssim': metrics.structural_similarity(truth, image, data_range=255, **window),
    }


def mean_over(images, truths) -> dict[str, float]:
    """Mean over the images whose names begin with that of their GT image."""
    truths = {path.stem: path for path in Path(truths).iterdir()}
    values = [measure(path, truths[next(stem for stem in truths if path.stem.startswith(stem))]) for path in images]
    assert len(values) == len(truths)
    return {metric: np.mean([value[metric] for value in values]) for metric in ('psnr', 'ssim')}


@pytest.mark.parametrize('dataset', DATASETS, ids=lambda dataset: dataset['name'])
def test_metrics_match_scikit_image(dataset, tested):
    """Of the unrestored images as stored on disk (noise and JPEG as generated), and of the restored ones."""
    folder, _ = tested
    root, name = folder / 'results' / 'test_all_in_one', dataset['name']
    (part,) = (part for part in json.loads((root / 'results.json').read_text())['sets'] if part['name'] == name)
    assert part['count'] == COUNTS[name]
    truths = folder / dataset['dataroot_gt']
    images = (folder / dataset['dataroot_lq'] if 'dataroot_lq' in dataset else root / 'input' / name).iterdir()
    assert part['unrestored'] == pytest.approx(mean_over(images, truths), abs=1e-3)
    restored = mean_over((root / 'visualization' / name).iterdir(), truths)
    assert part['restored'] == pytest.approx(restored, abs=1e-3)
    assert abs(restored['psnr'] - part['unrestored']['psnr']) > 1e-2, 'the two could be mixed up'


def test_the_tables_have_all_rows_and_their_average(tested):
    folder, log = tested
    root = folder / 'results' / 'test_all_in_one'
    content = json.loads((root / 'results.json').read_text())
    assert [part['name'] for part in content['sets']] == list(COUNTS)
    kinds = [(metric, kind) for metric in ('psnr', 'ssim') for kind in ('restored', 'unrestored')]
    expected = [[part[kind][metric] for metric, kind in kinds] for part in content['sets']]
    expected.append(np.mean(expected, axis=0))
    assert [content['average'][kind][metric] for metric, kind in kinds] == pytest.approx(expected[-1])

    header, *rows = csv.reader((root / 'results.csv').read_text().splitlines())
    assert header[3:7] == ['psnr', 'psnr of the input', 'ssim', 'ssim of the input']
    assert [row[0] for row in rows] == [*COUNTS, 'average']
    assert [row[2] for row in rows] == [*map(str, COUNTS.values()), '']
    np.testing.assert_allclose([[float(cell) for cell in row[3:7]] for row in rows], expected)

    text = (root / 'results.md').read_text()
    assert text.strip() in log
    lines = [re.split(r' *\| *', line)[1:-1] for line in text.splitlines() if line.startswith('|')][2:]
    assert [line[0] for line in lines] == [*COUNTS, 'average']
    np.testing.assert_allclose([[float(cell) for cell in line[2:]] for line in lines], expected, atol=5e-5)
