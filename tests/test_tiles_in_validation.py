"""`val.tile`: validations and tests in the tiles that `restore` takes, to the bit."""

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.models import build_model
from support import pipelines
from support.pipelines import write_pairs

from dpmambair_basicsr import load
from dpmambair_basicsr.inference.restorer import Restorer

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
def test_tiles_are_those_of_restore(model_type, network, val):
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


def test_stage_1_reconstructs_in_tiles_what_it_does_as_a_whole():
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
