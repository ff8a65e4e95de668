"""`val.tile`: validation and tests use the tiles of `restore`, bit-exactly; what happens out of memory."""

from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.models import build_model
from basicsr.utils.registry import ARCH_REGISTRY, METRIC_REGISTRY
from support import pipelines
from support.commands import warm_python
from support.pipelines import write_pairs

from dpmambair_basicsr import load
from dpmambair_basicsr.inference.memory import OutOfMemory
from dpmambair_basicsr.inference.restorer import Restorer
from dpmambair_basicsr.models.validation_monitor import folder_of_set

SMALL = {'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
VMAMBAIR = {'type': 'VmambaIR', 'dim': 4, **SMALL}
DPMAMBAIR = {'type': 'DPMambaIR', 'dim': 8, **SMALL, 'd_inner': [8] * 4, 'embed_dim': 8, 'extractor_channels': [4, 4]}
AUTOENCODER = {'type': 'DegradationAutoencoder', 'embed_dim': 8, 'extractor_channels': [4, 4], 'channels': 4}
TILES = {'tile': 24, 'overlap': 8, 'one_pass': True}


def model_of(network, val, model_type='RestorationModel', **changes):
    torch.manual_seed(0)
    opt = {'name': 'model', 'model_type': model_type, 'num_gpu': 0, 'dist': False, 'rank': 0, 'is_train': False}
    model = build_model({**opt, 'datasets': {}, 'path': {}, 'network_g': network, 'val': val, **changes})
    with torch.no_grad():  # at the start, the network is nearly the identity
        for parameter in model.net_g.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def output_of(model, lq, **data):
    model.feed_data({'lq': lq, 'gt': lq, **data})
    model.test()
    return model.output


@pytest.mark.parametrize('val', [{'tile': 24}, TILES], ids=str)
@pytest.mark.parametrize(
    ('model_type', 'network'),
    [
        ('RestorationModel', VMAMBAIR),
        ('RestorationModel', DPMAMBAIR),
        ('RestorationGANModel', {**VMAMBAIR, 'scale': 4}),
        ('RealWorldSRGANModel', {**VMAMBAIR, 'scale': 2}),
    ],
    ids=str,
)
def test_tiles_equal_those_of_restore(model_type, network, val):
    model = model_of(network, val, model_type)
    lq = torch.rand(1, 3, 37, 59)
    output = output_of(model, lq)
    restored = Restorer(model.net_g, torch.device('cpu')).restore(lq[0], **val)
    assert torch.equal(output[0].clamp(0, 1), restored)
    whole = output_of(model_of(network, {}, model_type), lq)
    assert output.shape == whole.shape and not torch.equal(output, whole)


def test_a_tile_that_holds_the_image_changes_nothing():
    lq = torch.rand(2, 3, 21, 30)
    for network in (VMAMBAIR, DPMAMBAIR):
        outputs = [output_of(model_of(network, val), lq) for val in ({}, {'tile': 0}, {'tile': 64}, {'tile': None})]
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_the_label_reaches_the_tiles():
    network, lq = {**DPMAMBAIR, 'degradation': 'class'}, torch.rand(1, 3, 37, 59)
    model = model_of(network, TILES)
    first, second = (output_of(model, lq, label=torch.tensor([label])) for label in (1, 2))
    assert first.shape == lq.shape and not torch.equal(first, second)


def test_stage_1_gives_the_same_output_in_tiles():
    """Its convolutions reach 26 pixels; the embedding is that of the whole image."""
    lq, gt = torch.rand(1, 3, 150, 40) * torch.linspace(0, 1, 150)[:, None], torch.rand(1, 3, 150, 40)
    outputs = []
    for val in ({}, {'tile': 120, 'overlap': 112}):
        model = model_of(AUTOENCODER, val, 'DegradationExtractorModel')
        model.feed_data({'lq': lq, 'gt': gt})
        model.test()
        outputs.append(model.output)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def options(folder, **val):
    data = {'type': 'PairedDegradationDataset', 'degradation': 'noise', 'io_backend': {'type': 'disk'}}
    train = write_pairs(folder / 'train', [(32, 32)] * 2)
    return {
        'name': 'run',
        'model_type': 'RestorationModel',
        'scale': 1,
        'num_gpu': 0,
        'manual_seed': 0,
        'datasets': {
            'train': {
                'name': 'train',
                **data,
                **train,
                'gt_size': 16,
                'batch_size_per_gpu': 2,
                'num_worker_per_gpu': 0,
            },
            'val': {'name': 'set', **data, **write_pairs(folder / 'val', [(45, 61)])},
        },
        'network_g': VMAMBAIR,
        'path': {'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None},
        'train': {
            'optim_g': {'type': 'AdamW', 'lr': 0.01},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [100]},
            'total_iter': 3,
            'ema_decay': 0.5,
            'pixel_opt': {'type': 'L1Loss'},
        },
        'val': {
            'val_freq': 3,
            'save_img': True,
            'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}},
            **val,
        },
        'logger': {'print_freq': 1, 'save_checkpoint_freq': 3, 'use_tb_logger': False},
    }


def write(opt, file):
    file.write_text(yaml.safe_dump(opt, sort_keys=False))
    return file


def test_training_and_testing_save_the_images_that_restore_gives(tmp_path):
    opt = options(tmp_path, **TILES)
    pipelines.train(write(opt, tmp_path / 'train.yml'), cwd=tmp_path)
    weights = tmp_path / 'experiments/run/models/net_g_3.pth'
    restored = load(weights).restore(cv2.imread(opt['datasets']['val']['dataroot_lq'] + '/00.png')[..., ::-1], **TILES)
    opt['val']['suffix'] = None
    opt['datasets'] = {'test': opt['datasets']['val'] | {'name': 'set'}}
    opt['path'] |= {'pretrain_network_g': str(weights), 'param_key_g': 'params_ema'}
    pipelines.test(write(opt, tmp_path / 'test.yml'), cwd=tmp_path)
    for file in ('experiments/run/visualization/00/00_3.png', 'results/run/visualization/set/00_run.png'):
        np.testing.assert_array_equal(cv2.imread(str(tmp_path / file))[..., ::-1], restored)


def test_validation_images_of_several_sets_are_in_a_folder_each(tmp_path):
    opt = options(tmp_path)
    opt['datasets']['val_2'] = opt['datasets']['val'] | write_pairs(tmp_path / 'other', [(30, 40)]) | {'name': 'other'}
    pipelines.train(write(opt, tmp_path / 'train.yml'), cwd=tmp_path)
    folder, network = tmp_path / 'experiments/run', load(tmp_path / 'experiments/run/models/net_g_3.pth')
    folders = {str(path.parent.relative_to(folder / 'visualization')) for path in folder.rglob('*.png')}
    assert folders == {'set/00', 'other/00'}
    for phase, name in (('val', 'set'), ('val_2', 'other')):
        restored = network.restore(cv2.imread(opt['datasets'][phase]['dataroot_lq'] + '/00.png')[..., ::-1])
        saved = cv2.imread(str(folder / f'visualization/{name}/00/00_3.png'))[..., ::-1]
        np.testing.assert_array_equal(saved, restored)


def test_the_folder_of_images_is_as_before_after_a_failed_validation():
    sets = {phase: {'name': phase} for phase in ('train', 'val_1', 'val_2')}
    opt = {'is_train': True, 'datasets': sets, 'path': {'visualization': 'a'}}
    with pytest.raises(KeyError), folder_of_set(opt, 'val_1'):
        assert opt['path'] == {'visualization': 'a/val_1'}
        raise KeyError
    assert opt['path'] == {'visualization': 'a'}


# Out of memory

# A network that allocates 40 kB per pixel, and an address space of 2 GiB in addition to the program's.
LIMITED = """
import re, resource, sys, runpy, torch
from pathlib import Path
import dpmambair_basicsr
from basicsr.utils.registry import ARCH_REGISTRY

@ARCH_REGISTRY.register()
class Hungry(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 3, 1)
    def forward(self, x):
        torch.empty(x.shape[-2] * x.shape[-1], 10_000)
        return self.body(x)

used = int(re.search(r'VmSize:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31,) * 2)
sys.argv = [sys.argv[1], *sys.argv[2:]]
runpy.run_module(f'dpmambair_basicsr.{sys.argv[0]}', run_name='__main__')
"""
on_linux = pytest.mark.skipif(not Path('/proc/self/status').is_file(), reason='needs /proc: a limit of the memory')


def limited(command, *arguments, cwd):
    return warm_python('-c', LIMITED, command, *arguments, cwd=cwd)


@pytest.fixture
def hungry(tmp_path):
    """(option file, its options) of a training whose only validation image is too large."""
    opt = options(tmp_path)
    opt['network_g'] = {'type': 'Hungry'}
    opt['train']['total_iter'] = 5
    opt['logger']['save_checkpoint_freq'] = 2
    opt['datasets']['val'] |= write_pairs(tmp_path / 'large', [(350, 400)])
    return write(opt, tmp_path / 'train.yml'), opt


@on_linux
def test_an_image_too_large_for_memory_loses_nothing_and_a_smaller_tile_is_suggested(hungry, tmp_path):
    file, opt = hungry
    name = f'{opt["datasets"]["val"]["dataroot_lq"]}/00.png'
    advice = 'val.tile: 200 (--force_yml val:tile=200) needs less'
    line = f'dpmambair_basicsr.train: {name}: 400 x 350 pixels: out of memory; {advice}'
    states = tmp_path / 'experiments/run/training_states'
    for resume in ((), ('--auto_resume',)):
        done = limited('train', '-opt', file, *resume, cwd=tmp_path)
        assert done.returncode == 1 and done.stdout.splitlines()[-1] == line, done.stdout
        assert 'Traceback' not in done.stdout
        assert sorted(state.name for state in states.iterdir()) == ['2.state', '3.state']
    assert 'The training ended before iteration 3 was validated; this comes first.' in done.stdout
    done = limited('train', '-opt', file, '--auto_resume', '--force_yml', 'val:tile=200', cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    straight = tmp_path / 'straight'
    straight.mkdir()
    pipelines.train(write({**opt, 'network_g': {'type': 'Hungry'}}, straight / 'train.yml'), cwd=straight)
    for network in ('net_g_4.pth', 'net_g_latest.pth'):
        pair = [torch.load(folder / 'experiments/run/models' / network) for folder in (tmp_path, straight)]
        torch.testing.assert_close(*(weights['params_ema'] for weights in pair), rtol=0, atol=0)
    best = torch.load(tmp_path / 'experiments/run/models/net_g_best.pth')['best']
    assert best['tiles'] == {'tile': 200}


@on_linux
def test_a_test_and_restore_suggest_it_too(hungry, tmp_path):
    _, opt = hungry
    weights, lq = tmp_path / 'net_g.pth', opt['datasets']['val']['dataroot_lq']
    torch.save({'params': torch.nn.Sequential(OrderedDict(body=torch.nn.Conv2d(3, 3, 1))).state_dict()}, weights)
    opt['datasets'] = {'test': opt['datasets']['val'] | {'name': 'set'}}
    opt['path'] |= {'pretrain_network_g': str(weights)}
    opt['val']['suffix'] = None
    file = write(opt, tmp_path / 'test.yml')
    done = limited('test', '-opt', file, '--force_yml', 'val:tile=240', cwd=tmp_path)
    line = f'{lq}/00.png: 400 x 350 pixels in tiles of 240: out of memory; val.tile: 120 (--force_yml val:tile=120)'
    assert done.returncode == 1 and line in done.stdout.splitlines()[-1], done.stdout

    arguments = ('-w', weights, '--opt', file, lq, '-o', 'restored')
    # The tile depends on the size of the image; no smaller one is used automatically: it would change the result.
    cases = {(): ' in tiles of 320: out of memory; tile=160 (--tile 160)'}
    cases['--tile', '0'] = ': out of memory; tile=200 (--tile 200)'
    for tile, advice in cases.items():
        done = limited('restore', *arguments, *tile, cwd=tmp_path)
        message = f'{lq}/00.png: 400 x 350 pixels{advice} needs less'
        assert done.returncode == 1 and message in done.stdout, done.stdout
    done = limited('restore', *arguments, '--tile', '200', cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / 'restored/00.png').is_file(), done.stdout


@ARCH_REGISTRY.register()
class Hungry(torch.nn.Module):
    """Like that of LIMITED, with enough memory."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.body(x)


@METRIC_REGISTRY.register()
def calculate_hungry(img, img2, **kwargs):
    return np.empty(2**52)  # no machine has 32 PiB


def test_a_metric_out_of_memory_is_distinguished(tmp_path):
    opt = options(tmp_path)
    opt['val'] |= {'suffix': None, 'metrics': {'hungry': {'type': 'calculate_hungry'}}}
    opt['datasets'] = {'test': opt['datasets']['val']}
    with pytest.raises(OutOfMemory, match=r'^out of memory in a metric of .*00.png, or where .*Unable to allocate'):
        pipelines.test(write(opt, tmp_path / 'test.yml'), cwd=tmp_path)


def test_the_best_with_other_tiles_is_not_comparable(tmp_path):
    opt = options(tmp_path)
    opt['logger']['save_checkpoint_freq'] = 3
    pipelines.train(write(opt, tmp_path / 'train.yml'), cwd=tmp_path)
    opt['train']['total_iter'] = 6
    for tile, told in ((24, True), (24, False), (0, True)):
        opt['val']['tile'] = tile
        opt['train']['total_iter'] += 3
        log = pipelines.train(write(opt, tmp_path / 'train.yml'), '--auto_resume', cwd=tmp_path)
        assert ('was the best by another measure' in log) is told, tile
