"""Projects of every kind train their own networks as before `dropin`, and ours in their own loop."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support.commands import PACKAGE_PARENT, basicsr_source, stock_options, warm_python, write_images, write_options
from support.projects import (
    WHERE_IT_STARTS,
    output,
    output_of_script,
    with_a_package_of_its_own,
    with_own_losses,
    without_registry,
    without_vgg,
)
from test_dropin import tree

from dpmambair_basicsr.archs import VmambaIR

SMALL = {'dim': 4, 'num_blocks': [1] * 4, 'num_refinement_blocks': 0, 'd_state': 2}


def fork(folder):
    return with_own_losses(without_vgg(basicsr_source(folder)))


def old_fork(folder):
    return without_registry(basicsr_source(folder))


def package(folder):
    return with_a_package_of_its_own(folder / 'package')


@pytest.fixture
def options(tmp_path):
    """BasicSR's own model, data, loss and optimizer, with random crops and flips."""
    opt = stock_options(write_images(tmp_path / 'images'))
    opt['train'] |= {'optim_g': {'type': 'Adam', 'lr': 1.0e-3}, 'total_iter': 4}
    opt['val']['val_freq'] = opt['logger']['save_checkpoint_freq'] = 4
    return opt


def losses(log: str) -> list[str]:
    return re.findall(r'l_(?:g_)?pix: (\S+)', log)


def weights(project, name) -> dict:
    return torch.load(project / f'experiments/{name}/models/net_g_4.pth', weights_only=True)['params']


@dataclass(frozen=True)
class Kind:
    """A kind of project: how it is made, its command, one of its networks, and what `dropin` says about ours there."""

    make: Callable
    script: str
    own: str
    said: list[str]
    path: str = ''  # needed on Python's path by its command


KINDS = [
    Kind(fork, 'basicsr/train.py', 'MSRResNet', ['dpmambair_PSNRLoss', 'not available: losses VGGPerceptualLoss: ']),
    Kind(old_fork, 'basicsr/train.py', 'MSRResNet', ['all other programs of the project import the basicsr in']),
    Kind(package, 'own/train.py', 'OwnNet', ['models: RestorationModel', 'It did not start before: '], path='.'),
]


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.make.__name__)
def test_own_networks_train_as_before_and_ours_in_the_same_loop(kind, options, tmp_path):
    project = kind.make(tmp_path)
    path = f'import sys; sys.path.insert(1, {kind.path!r})' if kind.path else ''
    options['network_g']['type'] = kind.own
    own_file = write_options(options | {'name': 'own'}, tmp_path / 'own.yml')
    assert '-opt' in output_of_script(kind.script, '--help', cwd=project, first=WHERE_IT_STARTS)
    first = output_of_script(kind.script, '-opt', own_file, cwd=project, first=WHERE_IT_STARTS)
    assert len(losses(first)) == 4
    weights_before = weights(project, 'own')
    shutil.rmtree(project / 'experiments')

    before = tree(project)
    outcome = warm_python(
        '-m', 'dpmambair_basicsr.dropin', '.', cwd=project, PYTHONPATH=f'{PACKAGE_PARENT}{os.pathsep}{kind.path}'
    )
    assert outcome.returncode == 0, outcome.stdout
    assert all(text in outcome.stdout for text in kind.said), outcome.stdout
    assert 'VmambaIR' in outcome.stdout.partition('archs: ')[2].splitlines()[0]

    assert '-opt' in output_of_script(kind.script, '--help', cwd=project, first=path)
    second = output_of_script(kind.script, '-opt', own_file, cwd=project, first=path)
    assert losses(second) == losses(first)
    assert weights(project, 'own').keys() == weights_before.keys()
    assert all(torch.equal(value, weights_before[name]) for name, value in weights(project, 'own').items())

    options['datasets']['train']['gt_size'] = 32
    options['network_g'] = {'type': 'VmambaIR', 'scale': 4, **SMALL}
    if kind.make is fork:
        options['train']['pixel_opt'] = {'type': 'dpmambair_PSNRLoss'}
    file = write_options(options | {'name': 'ours'}, tmp_path / 'ours.yml')
    ours = output_of_script(kind.script, '-opt', file, cwd=project, first=path)
    assert len(losses(ours)) == 4 and '# psnr:' in ours and 'End of training' in ours, ours
    VmambaIR(scale=4, **SMALL).load_state_dict(weights(project, 'ours'))

    removed = warm_python('-m', 'dpmambair_basicsr.dropin', '.', '--remove', cwd=project)
    assert removed.returncode == 0, removed.stdout
    shutil.rmtree(project / 'experiments')
    assert tree(project) == before


# The kinds of BasicSR's own option files, reduced: changes to STOCK.
OF_BASICSR = {
    'EDSR': {
        'network_g': {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 4},
    },
    'SwinIR': {
        'model_type': 'SwinIRModel',
        'network_g': {
            'type': 'SwinIR', 'upscale': 4, 'in_chans': 3, 'img_size': 8, 'window_size': 4, 'depths': [1],
            'embed_dim': 8, 'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffle', 'resi_connection': '1conv',
        },
    },
    'ESRGAN': {
        'model_type': 'ESRGANModel',
        'network_g': {
            'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'num_grow_ch': 4,
        },
        'network_d': {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4},
        'train': {
            'optim_d': {'type': 'Adam', 'lr': 1e-3},
            'gan_opt': {'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 0.1},
            'net_d_iters': 1,
            'net_d_init_iters': 0,
            'ema_decay': 0.9,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize('name', OF_BASICSR)
def test_trainings_of_basicsr_are_the_same_with_our_import(name, options, tmp_path):
    checkout = basicsr_source(tmp_path)
    changes = OF_BASICSR[name]
    options |= changes | {'name': 'own', 'train': options['train'] | changes.get('train', {})}
    options['train']['scheduler']['milestones'] = [2]
    file = write_options(options, tmp_path / 'own.yml')
    logs, saved = [], []
    for first in (WHERE_IT_STARTS, 'import dpmambair_basicsr'):
        logs.append(losses(output_of_script('basicsr/train.py', '-opt', file, cwd=checkout, first=first)))
        saved.append(torch.load(checkout / 'experiments/own/models/net_g_4.pth', weights_only=True))
        shutil.rmtree(checkout / 'experiments')
    assert len(logs[0]) == 4 and logs[0] == logs[1]
    for key, state in saved[0].items():
        assert all(torch.equal(value, saved[1][key][part]) for part, value in state.items())


LOAD = """
import sys
import torch
from dpmambair_basicsr import load
print('sizes', load(sys.argv[1]).restore(torch.zeros(7, 5, 3, dtype=torch.uint8).numpy()).shape)
"""


def old_fork_with_init(folder):
    """Like some forks of Restormer: still without registry."""
    project = old_fork(folder)
    (project / 'basicsr/__init__.py').touch()
    return project


def command(name, *arguments, **options):
    return output('-m', f'dpmambair_basicsr.{name}', *arguments, **options)


@pytest.mark.parametrize('make', [fork, old_fork, old_fork_with_init, package], ids=lambda make: make.__name__)
def test_our_commands_work_in_a_projects_folder_or_say_what_is_missing(make, options, tmp_path):
    project = make(tmp_path)
    options |= {
        'name': 'ours',
        'model_type': 'RestorationModel',
        'network_g': {'type': 'VmambaIR', 'scale': 4, **SMALL},
    }
    options['datasets']['train']['gt_size'] = 32
    file = write_options(options, tmp_path / 'ours.yml')
    weights = project / 'experiments/ours/models/net_g_4.pth'
    test = {key: options[key] for key in ('name', 'model_type', 'scale', 'num_gpu', 'network_g')}
    test |= {'datasets': {'test': options['datasets']['val']}, 'path': {'pretrain_network_g': str(weights)}}
    test['val'] = {'save_img': False, 'metrics': options['val']['metrics']}
    test_file = write_options(test, tmp_path / 'test.yml')
    if make is old_fork_with_init:
        for name, arguments in (('train', file), ('test', test_file)):
            said = command(name, '-opt', arguments, cwd=project, expected=1).splitlines()
            assert said[-1].startswith(f'dpmambair_basicsr.{name}: needs BasicSR 1.3 or newer, and {project}'), said
            assert 'Traceback' not in ''.join(said)
        weights.parent.mkdir(parents=True)
        net = VmambaIR(scale=4, **SMALL)
        torch.save({'params': net.state_dict(), 'network_g': options['network_g']}, weights)
    else:
        log = command('train', '-opt', file, cwd=project)
        assert len(losses(log)) == 4 and '# psnr:' in log, log
        assert '# psnr:' in command('test', '-opt', test_file, cwd=project)
    lq = options['datasets']['val']['dataroot_lq']
    assert '4 restored, 0 failed' in command('restore', '-w', weights, lq, '-o', 'restored', cwd=project)
    assert 'sizes (28, 20, 3)' in output('-c', LOAD, weights, cwd=project)
