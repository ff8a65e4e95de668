"""README, "Following one image": from option files to checkpoints and back, by the commands a user types."""

import ast
import re

import cv2
import numpy as np
import pytest
import torch
import yaml
from support.commands import PACKAGE_PARENT, command, write_options

from dpmambair_basicsr.data.degradations import degrade, to_uint8

EXTRACTOR = {'embed_dim': 16, 'extractor_channels': [4, 4, 6]}
NETWORK = {
    'type': 'DPMambaIR',
    'dim': 16,
    'num_blocks': [1, 1, 1, 1],
    'num_refinement_blocks': 1,
    'd_inner': [16, 16, 16, 16],
    'd_state': 2,
    **EXTRACTOR,
}
STAGE_1 = yaml.safe_load("""
name: stage1
model_type: DegradationExtractorModel
scale: 1
num_gpu: 0
manual_seed: 0
datasets:
  train:
    name: clean
    type: SyntheticDegradationDataset
    degradations: [haze, rain, snow, lowlight, blur, noise, jpeg]
    gt_size: 16
    use_hflip: true
    use_vflip: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 2
    dataset_enlarge_ratio: 10
network_g: {type: DegradationAutoencoder, channels: 4, num_fusion_blocks: 1, num_refine_blocks: 1}
path: {pretrain_network_g: ~, resume_state: ~}
train:
  optim_g: {type: AdamW, lr: 1.0e-3, weight_decay: 1.0e-4}
  scheduler: {type: CosineAnnealingRestartLR, periods: [10], restart_weights: [1], eta_min: 1.0e-6}
  total_iter: 2
  pixel_opt: {type: L1Loss}
logger: {print_freq: 1, save_checkpoint_freq: 2, use_tb_logger: false}
""")
STAGE_2_TRAIN = yaml.safe_load("""
optim_g: {type: AdamW, lr: 1.0e-3, weight_decay: 1.0e-4}
scheduler: {type: CosineAnnealingRestartLR, periods: [10], restart_weights: [1], eta_min: 1.0e-6}
total_iter: 4
ema_decay: 0.9
grad_clip_norm: 0.01
pbar: true
pixel_opt: {type: L1Loss, loss_weight: 1.0}
mse_opt: {type: MSELoss, loss_weight: 0.5}
fft_opt: {type: FFTLoss, loss_weight: 0.001}
""")


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A folder with images and option files, after training of stage 1 and stage 2."""
    folder = tmp_path_factory.mktemp('project')
    rng = np.random.default_rng(0)
    for number in range(3):
        clean = cv2.resize(rng.random((5, 6, 3), dtype=np.float32), (45, 37), interpolation=cv2.INTER_LINEAR)
        for name, image in {'GT': clean, 'LQ': degrade(clean, 'noise', rng)}.items():
            (folder / name).mkdir(exist_ok=True)
            assert cv2.imwrite(str(folder / name / f'{number}.png'), to_uint8(image))
    STAGE_1['datasets']['train']['dataroot_gt'] = str(folder / 'GT')
    STAGE_1['network_g'].update(EXTRACTOR)
    pairs = {
        'name': 'pairs',
        'type': 'PairedDegradationDataset',
        'degradation': 'noise',
        'dataroot_gt': str(folder / 'GT'),
        'dataroot_lq': str(folder / 'LQ'),
    }
    parts = {
        'noise': {key: pairs[key] for key in ('dataroot_gt', 'dataroot_lq')},
        'clean': {'type': 'SyntheticDegradationDataset', 'dataroot_gt': str(folder / 'GT'), 'degradations': ['rain']},
    }
    mixed = {key: value for key, value in STAGE_1['datasets']['train'].items() if not key.startswith('d')}
    mixed |= {'name': 'mixture', 'type': 'MixedDegradationDataset', 'sampling': 'uniform', 'datasets': parts}
    mixed['dataset_enlarge_ratio'] = 10
    val = {'save_img': True, 'suffix': None, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}}
    stage_2 = {
        **STAGE_1,
        'name': 'stage2',
        'model_type': 'RestorationModel',
        'network_g': NETWORK,
        'train': STAGE_2_TRAIN,
        'datasets': {'train': mixed, 'val': pairs},
        'val': {**val, 'val_freq': 4},
        'path': {
            'pretrain_network_g': None,
            'pretrain_network_e': str(folder / 'experiments/stage1/models/net_g_2.pth'),
            'experiments_root': str(folder / 'experiments' / 'stage2'),
        },
    }
    write_options(STAGE_1, folder / 'stage1.yml')
    write_options(stage_2, folder / 'stage2.yml')
    checkpoint = str(folder / 'experiments/stage2/models/net_g_4.pth')
    write_options(
        {
            **{key: stage_2[key] for key in ('model_type', 'scale', 'num_gpu', 'manual_seed', 'network_g')},
            'name': 'test',
            'datasets': {'test': pairs},
            'val': val,
            'path': {'pretrain_network_g': checkpoint, 'param_key_g': 'params_ema'},
        },
        folder / 'test.yml',
    )
    logs = {}
    for stage in ('stage1', 'stage2'):
        process = command('train', '-opt', f'{stage}.yml', cwd=folder)
        assert process.returncode == 0, process.stdout
        logs[stage] = process.stdout
    return folder, logs


def load(path):
    return torch.load(path, map_location='cpu', weights_only=True)


def test_each_step_of_the_readme_names_a_file_and_what_it_defines():
    table = (
        (PACKAGE_PARENT / 'README.md').read_text('utf-8').partition('## Following one image')[2].partition('\n## ')[0]
    )
    named = re.findall(r'\]\((dpmambair_basicsr/[^)]+\.py)\) `([\w.]+)`', table)
    assert len(named) >= 3
    for file, name in named:
        nodes = ast.parse((PACKAGE_PARENT / file).read_text('utf-8')).body
        for part in name.split('.'):
            inside = [item for node in nodes for item in ast.walk(node)]
            nodes = [item for item in inside if getattr(item, 'name', None) == part]
            assert nodes, f'{file}: {name}'


def test_every_loss_is_logged_by_name(project):
    _, logs = project
    for name in ('l_pix', 'l_mse', 'l_fft'):
        assert len(re.findall(rf'{name}: \d\.\d+e[+-]\d+', logs['stage2'])) == 4, logs['stage2']
    assert 'l_pix' in logs['stage1'] and 'l_mse' not in logs['stage1']


def test_the_shares_of_the_mixture_are_in_the_log_file_once(project):
    folder, _ = project
    file = min((folder / 'experiments/stage2').glob('train_stage2_*.log'))  # resuming appends
    shares = 'mixture: 6 items per epoch: noise 3 images, 50.0% of draws, clean 3 images, 50.0% of draws.'
    assert file.read_text().count(shares) == 1


def test_the_extractor_of_stage_1_is_in_the_checkpoint_unchanged(project):
    from dpmambair_basicsr.archs import DegradationAutoencoder

    folder, _ = project
    stage_1 = DegradationAutoencoder(**{k: v for k, v in STAGE_1['network_g'].items() if k != 'type'})
    stage_1.load_state_dict(load(folder / 'experiments/stage1/models/net_g_2.pth')['params'])
    expected = stage_1.extractor.merge().state_dict()
    saved = load(folder / 'experiments/stage2/models/net_g_4.pth')
    for name, value in expected.items():
        assert torch.equal(saved['params'][f'extractor.{name}'], value), name
        assert torch.equal(saved['params_ema'][f'extractor.{name}'], value), name
    assert not torch.equal(saved['params']['output.weight'], saved['params_ema']['output.weight'])


def test_the_checkpoint_gives_the_tested_images(project):
    """test.py and three lines of a user's program give the same image, at a size that is not a multiple of 8."""
    from dpmambair_basicsr.archs import DPMambaIR

    folder, _ = project
    process = command('test', '-opt', 'test.yml', cwd=folder)
    assert process.returncode == 0, process.stdout
    saved = cv2.imread(str(folder / 'results/test/visualization/pairs/1_test.png'))
    lq = cv2.cvtColor(cv2.imread(str(folder / 'LQ/1.png')), cv2.COLOR_BGR2RGB)
    assert saved.shape == lq.shape == (37, 45, 3)

    net = DPMambaIR(**{k: v for k, v in NETWORK.items() if k != 'type'})
    net.load_state_dict(load(folder / 'experiments/stage2/models/net_g_4.pth')['params_ema'])
    with torch.no_grad():
        output = net.eval()(torch.from_numpy(lq).permute(2, 0, 1)[None] / 255)
    image = output[0].flip(0).permute(1, 2, 0).clamp(0, 1).mul(255).round()
    np.testing.assert_allclose(saved, image.numpy(), atol=1)


def test_auto_resume_continues_from_any_directory(project, tmp_path):
    folder, _ = project
    process = command(
        'train',
        '-opt',
        folder / 'stage2.yml',
        '--auto_resume',
        '--force_yml',
        'train:total_iter=6',
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stdout
    assert 'Resuming training from epoch: 0, iter: 4' in process.stdout
    assert re.findall(r'iter: +(\d+), lr', process.stdout) == ['5', '6']
    assert not list(folder.glob('experiments/*archived*'))
