"""scripts/train_small.py: from a folder of photographs to weights that `restore` uses, in slices."""

import shutil

import cv2
import numpy as np
import pytest
import yaml
from skimage import data
from support.commands import PACKAGE_PARENT, warm_python

from dpmambair_basicsr import load
from dpmambair_basicsr.files.checkpoints import read_checkpoint

SCRIPT = PACKAGE_PARENT / 'scripts' / 'train_small.py'
TINY = [
    'num_gpu=0', 'network_g:embed_dim=8', 'network_g:extractor_channels=[4,4]', 'train:total_iter=3',
    'train:scheduler:periods=[3]', 'datasets:train:gt_size=16', 'datasets:train:batch_size_per_gpu=1',
    'datasets:train:num_worker_per_gpu=0', 'datasets:train:dataset_enlarge_ratio=8', 'logger:print_freq=1',
    'logger:save_checkpoint_freq=1', 'datasets:train:prefetch_mode=~', 'datasets:train:pin_memory=false',
]  # fmt: skip
BY_STAGE = {
    'train_small_extractor': ['channels=4', 'num_fusion_blocks=1', 'num_refine_blocks=1'],
    'train_small': ['dim=8', 'num_blocks=[1,1,1,1]', 'num_refinement_blocks=0', 'd_inner=[8,8,8,8]', 'd_state=2'],
}


@pytest.fixture
def photos(tmp_path):
    (tmp_path / 'photos').mkdir()
    for name in ('astronaut', 'coffee', 'chelsea'):
        assert cv2.imwrite(str(tmp_path / f'photos/{name}.png'), getattr(data, name)()[:256, :270, ::-1])
    return tmp_path


def train_small(folder, *arguments, checkout=PACKAGE_PARENT):
    return warm_python(checkout / 'scripts/train_small.py', *arguments, cwd=folder)


@pytest.fixture
def tiny_checkout(tmp_path):
    """The script beside option files of tiny networks: the same keys cannot be forced on both stages."""
    folder = tmp_path / 'checkout'
    shutil.copytree(PACKAGE_PARENT / 'scripts', folder / 'scripts')
    (folder / 'options').mkdir()
    for stage, network in BY_STAGE.items():
        opt = yaml.safe_load((PACKAGE_PARENT / f'options/{stage}.yml').read_text(encoding='utf-8'))
        opt['network_g'] |= {key: yaml.safe_load(value) for key, value in (text.split('=') for text in network)}
        opt.get('val', {})['val_freq'] = 2
        (folder / f'options/{stage}.yml').write_text(yaml.safe_dump(opt, sort_keys=False))
    return folder


def test_photographs_become_weights_that_restore_and_classify(photos, tiny_checkout):
    done = train_small(photos, 'photos', '--', '--force_yml', *TINY, checkout=tiny_checkout)
    assert done.returncode == 0, done.stdout
    assert sorted(path.name for path in (photos / 'datasets/small/train').iterdir()) == [
        '00001_chelsea.png',
        '00002_coffee.png',
    ]
    weights = photos / 'experiments/train_small/small.safetensors'
    net = load(weights)
    assert net.classifier.names[0] == 'clean' and read_checkpoint(str(weights))['network_g']['dim'] == 8
    image = data.astronaut()[:40, :48]
    assert net.find(image).kind in net.classifier.names and net.restore(image).shape == image.shape
    stages = [photos / f'experiments/{stage}/models/net_g_latest.pth' for stage in BY_STAGE]
    before = [stage.stat().st_mtime_ns for stage in stages]
    again = train_small(photos, 'photos', '--', '--force_yml', *TINY, checkout=tiny_checkout)
    assert again.returncode == 0 and [stage.stat().st_mtime_ns for stage in stages] == before, 'what is done stays'


def test_a_slice_ends_in_time_and_the_next_one_continues(photos, tiny_checkout):
    """Slices grow until one has trained something, however busy the machine; the next one then continues."""
    endless = [value.replace('=3', '=100000').replace('[3]', '[100000]') for value in TINY]
    seen = [0]
    minutes = 0.2
    while minutes < 8:
        done = train_small(
            photos, 'photos', '--minutes', minutes, '--', '--force_yml', *endless, checkout=tiny_checkout
        )
        assert done.returncode == 3, done.stdout
        stage = photos / 'experiments/train_small_extractor'
        assert not (stage / 'models/net_g_latest.pth').exists() and not (photos / 'experiments/train_small').exists()
        seen.append(max((int(state.stem) for state in stage.glob('training_states/*.state')), default=0))
        assert seen[-1] > seen[-2] or seen[-1] == 0, 'never from zero again'
        if seen[-2] > 0:
            break
        minutes *= 1 if seen[-1] > 0 else 2
    assert 0 < seen[-2] < seen[-1]


def test_too_few_or_too_small_photographs_are_refused(photos):
    for name in ('coffee', 'chelsea'):
        (photos / f'photos/{name}.png').unlink()
    done = train_small(photos, 'photos')
    assert done.returncode == 1 and 'photos: 1 photographs; at least two are needed' in done.stdout
    assert cv2.imwrite(str(photos / 'photos/small.png'), np.zeros((200, 300, 3), np.uint8))
    done = train_small(photos, 'photos')
    assert done.returncode == 1 and 'small.png: 300 x 200 pixels; at least 256 are needed' in done.stdout
    assert not (photos / 'datasets/small').exists()
