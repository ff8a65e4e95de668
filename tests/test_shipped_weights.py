"""The weights shipped with the package, and `restore` and `load` without a file."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_psnr
from skimage import data
from support.commands import command

from dpmambair_basicsr import load
from dpmambair_basicsr.data.degradations import degrade, to_uint8
from dpmambair_basicsr.files.checkpoints import read_checkpoint
from dpmambair_basicsr.files.images import to_float
from dpmambair_basicsr.inference.restorer import SHIPPED_WEIGHTS

SHARED = Path(__file__).resolve().parents[2] / 'shared'
TRIAL = SHARED / 'weights/dpmambair_small_trial.pth'
POLYU = SHARED / 'data/pairs/noise/PolyU'


@pytest.fixture(scope='module')
def photograph() -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[:128, 160:320])


@pytest.fixture(scope='module')
def net():
    return load()


def test_the_file_is_small_in_half_precision_and_knows_its_network():
    checkpoint = read_checkpoint(str(SHIPPED_WEIGHTS))
    assert SHIPPED_WEIGHTS.stat().st_size <= 12e6
    assert {value.dtype for value in checkpoint['params'].values()} == {torch.float16}
    assert sum(value.numel() for value in checkpoint['params'].values()) <= 6e6
    assert checkpoint['network_g']['type'] == 'DPMambaIR'


def test_shipped_weights_match_the_trial_bit_for_bit(net, photograph):
    if not TRIAL.is_file():
        pytest.skip(f'{TRIAL} does not exist')
    own = net.embedding_of(photograph)
    assert np.array_equal(net.restore(photograph, embedding=own), load(TRIAL).restore(photograph))


def test_noise_of_real_cameras_is_not_mistaken_for_darkness(net):
    """Steered by their own embeddings, two of these five lose 34 and 28 dB, a third 4."""
    if not POLYU.is_dir():
        pytest.skip(f'{POLYU} does not exist')
    gains = []
    for noisy in sorted((POLYU / 'LQ').iterdir())[:5]:
        image, clean = (cv2.imread(str(file))[128:256, 128:256, ::-1] for file in (noisy, POLYU / 'GT' / noisy.name))
        before, after = (calculate_psnr(part, clean, crop_border=0) for part in (image, net.restore(image.copy())))
        gains.append(after - before)
    assert min(gains) > -2 and np.mean(gains) > -0.5


@pytest.mark.parametrize('kind', ['haze', 'lowlight', 'rain', 'noise'])
def test_the_detected_class_steers_if_the_file_says_so(kind, net, photograph):
    image = to_uint8(degrade(to_float(photograph), kind, np.random.default_rng(0)))
    assert net.find(image).kind == kind
    steered = kind in net.classifier.steered
    assert steered == (kind in ('rain', 'noise')), 'the strength of haze and darkness is in the embedding'
    embedding = net.classifier.embedding_of(kind) if steered else net.embedding_of(image)
    assert np.array_equal(net.restore(image), net.restore(image, embedding=embedding))
    other = net.embedding_of(image) if steered else net.classifier.embedding_of(kind)
    assert not np.array_equal(net.restore(image), net.restore(image, embedding=other))


@pytest.mark.parametrize('kind, gain', [('rain', 5), ('noise', 5), ('lowlight', 7)])
def test_restoring_a_trained_degradation_gains_several_dB(kind, gain, net, photograph):
    """Any change to what the network computes, such as the position of a prompt, would lose this."""
    degraded = to_uint8(degrade(to_float(photograph), kind, np.random.default_rng(0)))
    before, after = (calculate_psnr(image, photograph, crop_border=0) for image in (degraded, net.restore(degraded)))
    assert after > before + gain


def test_the_command_needs_no_weights_and_says_once_which_it_uses(net, photograph, tmp_path):
    pictures = tmp_path / 'pictures'
    pictures.mkdir()
    degraded = to_uint8(degrade(to_float(photograph), 'rain', np.random.default_rng(0)))
    for name in ('a.png', 'b.png'):
        cv2.imwrite(str(pictures / name), degraded[..., ::-1])
    result = command('restore', 'pictures', '-o', 'out', cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count(SHIPPED_WEIGHTS.name) == 1 and 'trial' in result.stdout
    restored = cv2.imread(str(tmp_path / 'out/a.png'))[..., ::-1]
    assert np.abs(restored.astype(int) - net.restore(degraded)).max() <= 1  # another process, other threads
