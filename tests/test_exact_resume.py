"""N iterations, or k and then `--auto_resume`: the same parameters, averages, optimizers, rates and best metrics."""

import random
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from basicsr.data import build_dataloader
from basicsr.data.data_sampler import EnlargedSampler
from support import forked
from support.forked import changed, train

import dpmambair_basicsr
from dpmambair_basicsr.files.checkpoints import read_checkpoint, write_safetensors
from dpmambair_basicsr.training.state import network_file

dpmambair_basicsr.register()

TOTAL = 8  # iterations, in epochs of three
GAN = {
    'model_type': 'RestorationGANModel',
    'network_d': {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 2},
    'train.optim_d': {'type': 'Adam', 'lr': 1e-3},
    'train.gan_opt': {'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 0.1},
}
BLUR = {'kernel_list': ['iso', 'aniso'], 'kernel_prob': [0.5, 0.5], 'sinc_prob': 0.1, 'blur_sigma': [0.2, 3]}
BLUR |= {'betag_range': [0.5, 4], 'betap_range': [1, 2], 'blur_kernel_size': 21}
ORDER = {
    'resize_prob': [0.2, 0.7, 0.1], 'resize_range': [0.15, 1.5], 'gaussian_noise_prob': 0.5, 'noise_range': [1, 30],
    'poisson_scale_range': [0.05, 3], 'gray_noise_prob': 0.4, 'jpeg_range': [30, 95],
}  # fmt: skip
KINDS = {
    'paired': {},
    'two workers': {'datasets.train.num_worker_per_gpu': 2, 'manual_seed': None},
    'prefetched, progressive': {
        'datasets.train.num_worker_per_gpu': 1,
        'datasets.train.prefetch_mode': 'cpu',
        'datasets.train.progressive': {'gt_sizes': [8, 8], 'batch_sizes': [2, 1], 'iters': [4, 4]},
    },
    'GAN': GAN,
    'batch augmentation': {'train.batch_augment': {'mixup': {'alpha': 0.4, 'prob': 0.5}, 'cutmix': {'prob': 0.5}}},
    'GAN with LDL': GAN | {'train.ldl_opt': {'type': 'L1Loss', 'loss_weight': 1.0}},
    'optimizer of a package': {'train.optim_g': {'type': 'prodigyopt.Prodigy', 'lr': 1.0, 'weight_decay': 0.01}},
    'safetensors': {'logger.save_format': 'safetensors'},
    'GAN, safetensors': GAN | {'logger.save_format': 'safetensors'},
    'of BasicSR': {
        'model_type': 'SRModel',
        'datasets.train.type': 'PairedImageDataset',
        'datasets.train.io_backend': {'type': 'disk'},
        'datasets.train.dataset_enlarge_ratio': 2,
    },
}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return forked.write_images(tmp_path_factory.mktemp('images') / 'images')


def contents(folder):
    """What is compared of a finished run."""
    names = ['models/net_g_latest.pth', f'training_states/{TOTAL}.state']
    for optional in ('net_d_latest', 'net_g_best'):
        if network_file(folder / 'experiments/run/models', optional).exists():
            names.append(f'models/{optional}.pth')
    files = {name: Path(folder, 'experiments/run', name) for name in names}
    return {
        name: read_checkpoint(str(network_file(file.parent, file.stem) if file.suffix == '.pth' else file))
        for name, file in files.items()
    }


def assert_equal(value, other, path=''):
    assert type(value) is type(other), path
    if isinstance(value, dict):
        assert value.keys() == other.keys(), path  # a safetensors file does not preserve the order
        for key in value:
            assert_equal(value[key], other[key], f'{path}.{key}')
    elif isinstance(value, list):
        assert len(value) == len(other), path
        for index, pair in enumerate(zip(value, other, strict=True)):
            assert_equal(*pair, f'{path}[{index}]')
    else:
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, path


def resumed_at(iteration, folder, target):
    """A copy of a run as if it had been interrupted after an iteration. A later best is kept: it is found again."""
    shutil.copytree(folder / 'experiments', target / 'experiments')
    for file in (target / 'experiments/run/training_states').iterdir():
        if int(file.name.partition('.')[0]) > iteration:
            file.unlink()
    return target


def check(opt, folder, iterations=(2, 3, 4), train=train):
    """Inside an epoch, at its end, and after the first iteration of the next."""
    train(opt, folder / 'straight')
    expected = contents(folder / 'straight')
    for iteration in iterations:
        target = resumed_at(iteration, folder / 'straight', folder / f'resumed at {iteration}')
        log = train(opt, target, '--auto_resume')
        assert f'iter: {iteration}\n' in log.partition('Start training from')[2]
        assert_equal(contents(target), expected)
    return expected


@pytest.mark.parametrize('kind', KINDS)
def test_a_resumed_training_ends_as_an_uninterrupted_one(kind, images, tmp_path):
    if kind == 'optimizer of a package':
        pytest.importorskip('prodigyopt')
    opt = changed(forked.options(images), {'train.total_iter': TOTAL, 'logger.save_checkpoint_freq': 1})
    opt = changed(opt, KINDS[kind])
    expected = check(opt, tmp_path)
    assert {'params', 'params_ema'} <= expected['models/net_g_latest.pth'].keys()
    assert ('models/net_g_best.pth' in expected) == (kind != 'of BasicSR')
    best = expected[f'training_states/{TOTAL}.state']['exact']['best']['val set']['psnr']
    assert best['val'] > 0 and best['iter'] % 2 == 0
    first = forked.load(tmp_path / 'straight', 'training_states/2.state')['exact']['best']
    assert first['val set']['psnr']['iter'] == 2, 'the state has the validation of its own iteration'
    suffixes = {file.suffix for file in (tmp_path / 'straight/experiments/run/models').iterdir()}
    assert suffixes == {'.safetensors' if 'safetensors' in kind else '.pth'}


@pytest.mark.parametrize('formats', [('pth', 'safetensors'), ('safetensors', 'pth')])
def test_a_resume_may_change_the_format_of_the_networks(formats, images, tmp_path):
    opt = changed(forked.options(images), {'train.total_iter': TOTAL, 'logger.save_checkpoint_freq': 1})
    before, after = (changed(opt, {'logger.save_format': save_format}) for save_format in formats)
    train(before, tmp_path / 'straight')
    target = resumed_at(3, tmp_path / 'straight', tmp_path / 'resumed')
    train(after, target, '--auto_resume')
    assert_equal(contents(target), contents(tmp_path / 'straight'))
    written = target / f'experiments/run/models/net_g_{TOTAL}.{formats[1]}'
    assert written.exists() and network_file(written.parent, written.stem) == written, (
        'what is read is what was written'
    )


@pytest.mark.parametrize('formats', [('pth', 'safetensors'), ('safetensors', 'pth')])
def test_a_changed_format_leaves_no_files_of_the_other(formats, images, tmp_path):
    opt = {'train.total_iter': 4, 'logger.keep_last': 2}
    before, after = (changed(forked.options(images), opt | {'logger.save_format': suffix}) for suffix in formats)
    train(before, tmp_path)
    models = tmp_path / 'experiments/run/models'
    kept = ['2', '4', 'best', 'latest']
    assert {file.name for file in models.iterdir()} == {f'net_g_{name}.{formats[0]}' for name in kept}
    best = read_checkpoint(str(models / f'net_g_best.{formats[0]}'))['best']
    train(changed(after, {'train.total_iter': 8}), tmp_path, '--auto_resume')
    kept = ['6', '8', 'best', 'latest']
    assert {file.name for file in models.iterdir()} == {f'net_g_{name}.{formats[1]}' for name in kept}
    assert read_checkpoint(str(models / f'net_g_best.{formats[1]}'))['best']['iter'] > best['iter'], 'it was replaced'


def test_a_network_converted_beside_its_checkpoint_is_neither_resumed_from_nor_removed(images, tmp_path):
    """net_g_3.safetensors, of the average alone, is the user's."""
    opt = changed(forked.options(images), {'train.total_iter': TOTAL, 'logger.save_checkpoint_freq': 1})
    train(opt, tmp_path / 'straight')
    target = resumed_at(3, tmp_path / 'straight', tmp_path / 'resumed')
    models = target / 'experiments/run/models'
    for iteration in (1, 3):
        write_safetensors(
            str(models / f'net_g_{iteration}.safetensors'), forked.load(target, 'models/net_g_3.pth')['params_ema']
        )
    train(changed(opt, {'logger.keep_last': 2}), target, '--auto_resume')
    assert_equal(contents(target), contents(tmp_path / 'straight'))
    assert {file.name for file in models.glob('*.safetensors')} == {'net_g_1.safetensors', 'net_g_3.safetensors'}
    assert not (models / 'net_g_3.pth').exists()


def test_mixtures_and_synthetic_degradations_resume_bit_exactly(images, tmp_path):
    parts = {'noise': {}, 'rain': {'type': 'SyntheticDegradationDataset', 'degradations': ['rain', 'jpeg']}}
    for part in parts.values():
        part |= {
            key: images[key] for key in ('dataroot_gt', 'dataroot_lq') if 'type' not in part or key == 'dataroot_gt'
        }
    mixture = {'type': 'MixedDegradationDataset', 'sampling': 'uniform', 'datasets': parts}
    opt = forked.options(images)
    opt['datasets']['train'] = {
        key: value for key, value in opt['datasets']['train'].items() if not key.startswith('dataroot')
    } | mixture
    check(changed(opt, {'train.total_iter': TOTAL, 'logger.save_checkpoint_freq': 1}), tmp_path, iterations=(3,))


def real_world(folder):
    """Real-ESRGAN's degradation and pool of pairs, with photographs large enough for it."""
    (folder / 'photos').mkdir()
    for index in range(6):
        photo = skimage.data.astronaut()[index * 10 : index * 10 + 401, :401, ::-1]
        assert cv2.imwrite(str(folder / 'photos' / f'{index}.png'), photo)
    names = ''.join(f'{index}.png (401,401,3)\n' for index in range(6))
    (folder / 'photos' / 'meta_info.txt').write_text(names)
    opt = forked.options({})
    del opt['val'], opt['datasets']['val'], opt['datasets']['train']['gt_size']
    opt['datasets']['train'] |= {
        'type': 'RealESRGANDataset', 'io_backend': {'type': 'disk'}, 'dataroot_gt': str(folder / 'photos'),
        'meta_info': str(folder / 'photos' / 'meta_info.txt'), 'final_sinc_prob': 0.8,
        **{f'{key}{order}': value for key, value in BLUR.items() for order in ('', '2')},
    }  # fmt: skip
    opt |= {f'{key}{order}': value for key, value in ORDER.items() for order in ('', '2')}
    opt |= {'second_blur_prob': 0.8, 'gt_size': 32, 'queue_size': 4, 'scale': 4, 'model_type': 'RealWorldSRModel'}
    opt['network_g'] = {'type': 'MSRResNet', 'num_feat': 4, 'num_block': 1, 'upscale': 4}
    return changed(opt, {'train.total_iter': TOTAL, 'logger.save_checkpoint_freq': 1})


def train_in_two_processes(opt, folder, *arguments):
    runs = forked.start_processes(opt, folder, *arguments)
    assert [run.status() for run in runs] == [0, 0], runs[0].log() + runs[1].log()
    return runs[0].log()


def test_two_processes_resume_bit_exactly(images, tmp_path):
    """With a buffer and without EMA, BasicSR's validation would hang: ours runs in the first process only.

    Without manual_seed each process draws one, and the first process's is saved.
    """
    opt = changed(forked.options(images), {'train.total_iter': TOTAL, 'logger.save_checkpoint_freq': 1})
    changes = {'train.ema_decay': 0, 'datasets.train.dataset_enlarge_ratio': 2, 'datasets.train.num_worker_per_gpu': 1}
    changes['manual_seed'] = None
    check(changed(opt, changes), tmp_path, iterations=(2, 3), train=train_in_two_processes)


def test_the_pools_of_training_pairs_of_both_processes_are_kept(tmp_path):
    expected = check(real_world(tmp_path), tmp_path, iterations=(4,), train=train_in_two_processes)
    assert len(expected[f'training_states/{TOTAL}.state']['exact']['pool']['queue_lr']) == 4


class Numbers(torch.utils.data.Dataset):
    """The output of the three random generators for an item."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {'numbers': torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])}


def numbers(epoch, seed=1, workers=0, rank=0):
    """The numbers of an epoch with every item twice, shared by two processes."""
    opt = {'phase': 'train', 'num_worker_per_gpu': workers, 'batch_size_per_gpu': 1}
    sampler = EnlargedSampler(Numbers(), 2, rank, ratio=2)
    loader = build_dataloader(sampler.dataset, opt, num_gpu=0, sampler=sampler, seed=seed)
    sampler.set_epoch(epoch)
    return [tuple(batch['numbers'][0].tolist()) for batch in loader]


def test_augmentation_differs_between_epochs_and_repeats_for_a_seed():
    runs = [numbers(0), numbers(1), numbers(0, seed=2), numbers(0, rank=1)]
    drawn = [number for run in runs for item in run for number in item]
    assert len(drawn) == len(set(drawn)) == 4 * 5 * 3, 'no two items, epochs, seeds or processes agree'
    assert numbers(0, workers=2) == numbers(0) and numbers(1, workers=1) == numbers(1)


def test_a_forced_seed_is_used(tmp_path):
    """BasicSR seeds before it applies --force_yml: the log would show this seed, but training would use another."""
    opt = forked.options(forked.write_images(tmp_path / 'images'))
    opt.pop('manual_seed')
    weights = {}
    for name, seed in {'a': 7, 'b': 7, 'c': 8}.items():
        train(opt, tmp_path / name, '--force_yml', f'manual_seed={seed}')
        weights[name] = forked.load(tmp_path / name, 'models/net_g_latest.pth')['params']
    assert all(torch.equal(weights['a'][key], value) for key, value in weights['b'].items())
    assert not all(torch.equal(weights['a'][key], value) for key, value in weights['c'].items())
