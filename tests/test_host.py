"""The patches fix what fails in BasicSR 1.4.2 with current libraries. Training runs are in test_entry_points.py."""

import copy
import os
import pkgutil
import random
import socket
import sys
import threading
import types

import basicsr.data
import numpy as np
import pytest
import torch
from basicsr.data import degradations
from basicsr.data.prefetch_dataloader import CPUPrefetcher, PrefetchDataLoader
from basicsr.metrics import calculate_niqe
from basicsr.models.base_model import BaseModel
from basicsr.utils import dist_util, options
from support.commands import stock_options, write_images, write_options
from support.pipelines import train

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR 1.4.2 importable)
from dpmambair_basicsr.patches import resume
from dpmambair_basicsr.patches.apply import apply_patches
from dpmambair_basicsr.patches.imports import distutils_version
from dpmambair_basicsr.patches.registry import PATCHES


def test_every_patch_is_applied_once():
    apply_patches()
    for owner, attribute, _ in PATCHES:
        patched = getattr(pkgutil.resolve_name(owner), attribute)
        assert patched.patched_by == 'dpmambair_basicsr.patches.apply', attribute
        assert not hasattr(patched.__wrapped__, 'patched_by'), attribute


def test_stand_in_for_distutils_compares_versions():
    module = types.ModuleType('distutils.version')
    distutils_version(module)
    assert module.LooseVersion('0.29.2+cu132') >= module.LooseVersion('0.9.0')
    assert module.LooseVersion('0.8.2') < module.LooseVersion('0.13.0')


class Random(torch.utils.data.Dataset):
    """Two items that show the state of the random generators that BasicSR's datasets use."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {'python': random.random(), 'numpy': float(np.random.rand())}


def epochs(seed: int, rank: int = 0) -> list[list[float]]:
    options.set_random_seed(seed + rank)
    opt = {'phase': 'train', 'batch_size_per_gpu': 1, 'num_worker_per_gpu': 2}
    loader = basicsr.data.build_dataloader(Random(), opt, num_gpu=0, seed=seed)
    return [[float(item[kind]) for item in loader for kind in ('python', 'numpy')] for _ in range(2)]


def test_augmentation_differs_between_epochs_and_repeats_with_the_seed():
    first, second = epochs(seed=3)
    assert len(set(first + second)) == 16
    assert epochs(seed=3) == [first, second]
    assert epochs(seed=4)[0] != first


def test_random_jpeg_quality_may_be_fractional():
    image = np.random.default_rng(0).random((16, 16, 3), np.float32)
    assert degradations.random_add_jpg_compression(image, (30.2, 95.7)).shape == image.shape


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index == 1:
            raise ValueError('cannot read 1.png')
        return index


def prefetch(dataset) -> list:
    prefetcher = CPUPrefetcher(PrefetchDataLoader(num_prefetch_queue=1, dataset=dataset))
    return [prefetcher.next() for _ in range(3)]


def test_prefetching_passes_on_errors_and_still_ends():
    errors = []

    def consume():
        try:
            prefetch(Broken())
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=consume, daemon=True)  # since BasicSR would wait here forever
    thread.start()
    thread.join(timeout=20)
    assert errors == ['cannot read 1.png']
    assert prefetch(torch.arange(2)) == [0, 1, None]


def test_any_optimizer_of_torch_can_be_used():
    model, parameters = BaseModel.__new__(BaseModel), [torch.nn.Parameter(torch.ones(1))]
    assert type(model.get_optimizer('Adam', parameters, 0.1)) is torch.optim.Adam
    optimizer = model.get_optimizer('AdamW', parameters, 0.1, weight_decay=0.5)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults['weight_decay'] == 0.5
    with pytest.raises(NotImplementedError, match='AdmW.*did you mean AdamW'):
        model.get_optimizer('AdmW', parameters, 0.1)


def test_niqe_refuses_images_that_are_too_small():
    image = np.random.default_rng(0).integers(0, 256, (96, 192, 3), dtype=np.uint8)
    assert np.isfinite(calculate_niqe(image, crop_border=0))
    with pytest.raises(ValueError, match='two blocks of 96 x 96 pixels, the image has 96 x 190'):
        calculate_niqe(image[:, :190], crop_border=0)


@pytest.fixture
def no_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_slurm_runs_no_shell_and_needs_no_gpu(tmp_path, monkeypatch, no_process_group):
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\necho localhost\necho other\n')
    scontrol.chmod(0o755)
    nodes = f'n[1-2]; touch {tmp_path}/injected'
    environment = {'SLURM_NODELIST': nodes, 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}
    environment |= dict.fromkeys(('MASTER_ADDR', 'MASTER_PORT', 'RANK', 'LOCAL_RANK', 'WORLD_SIZE'), '')  # restored
    environment['PATH'] = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    dist_util._init_dist_slurm('nccl', port=port)
    assert (tmp_path / 'arguments').read_text() == f'show hostname {nodes}\n'
    assert not (tmp_path / 'injected').exists()
    assert torch.distributed.get_backend() == ('nccl' if torch.cuda.is_available() else 'gloo')
    assert (os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']) == ('localhost', str(port))


OPTIONS = """
name: x
model_type: SRModel
num_gpu: 0
datasets: {train: {name: x}}
path: {}
train: {}
logger: {}
"""
RUN = '__import__("os").system("touch MARKER")'
ATTACKS = {
    'a tag': ('extra: !!python/object/apply:os.system ["touch MARKER"]', '', 'python/object/apply'),
    'a forced key': ('', f'name"];{RUN};opt["name=x', 'expected key=value'),
    'a forced list': ('', f'train:x=[{RUN}]', None),  # read as data, so not refused
}


@pytest.mark.parametrize('attack', ATTACKS)
def test_options_run_no_code(attack, tmp_path, monkeypatch):
    marker = tmp_path / 'marker'
    line, forced, message = ATTACKS[attack]
    file = tmp_path / 'attack.yml'
    file.write_text((OPTIONS + line).replace('MARKER', str(marker)))
    force = ['--force_yml', forced.replace('MARKER', str(marker))] if forced else []
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', str(file), *force])
    if message:
        with pytest.raises(SystemExit, match=f'{file}.*') as refusal:
            options.parse_options('root', is_train=True)
        assert message in str(refusal.value)
    else:
        options.parse_options('root', is_train=True)
    assert not marker.exists()


def test_forced_values_are_parsed_as_numbers():
    values = {'-1': -1, '1e-4': 1e-4, '2': 2, '0.5': 0.5, 'none': None, 'true': True, '[1, 2]': [1, 2], 'x1': 'x1'}
    values |= {'[1e-06, x, [2e3]]': [1e-6, 'x', [2e3]], "'none'": 'none', '"1"': '1'}
    assert {text: options._postprocess_yml_value(text) for text in values} == values


def test_experiments_root_is_obeyed(tmp_path, monkeypatch):
    file = tmp_path / 'options.yml'
    file.write_text(OPTIONS.replace('path: {}', f'path: {{experiments_root: {tmp_path}/here}}'))
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', str(file), '--local-rank=1'])
    opt, args = options.parse_options('root', is_train=True)
    assert opt['path']['training_states'] == f'{tmp_path}/here/training_states'
    assert opt['path']['log'] == opt['path']['experiments_root'] == f'{tmp_path}/here'
    assert args.local_rank == 1  # the spelling of torch.distributed.launch

    sys.argv += ['--force_yml', f'path:experiments_root={tmp_path}/there']
    opt, _ = options.parse_options('root', is_train=True)
    assert opt['path']['models'] == f'{tmp_path}/there/models'
    sys.argv += ['--debug']
    opt, _ = options.parse_options('root', is_train=True)
    assert opt['path']['models'] == 'root/experiments/debug_x/models'


def test_debug_with_an_empty_section_val_is_refused(tmp_path, monkeypatch):
    file = tmp_path / 'options.yml'
    file.write_text(OPTIONS + 'val: ~\n')
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', str(file), '--debug'])
    with pytest.raises(SystemExit, match='val: empty, where BasicSR sets val_freq'):
        options.parse_options('root', is_train=True)


def test_a_file_that_is_not_text_is_named(tmp_path, monkeypatch):
    file = tmp_path / 'options.yml'
    file.write_bytes('name: Größe'.encode('latin-1'))
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', str(file)])
    with pytest.raises(SystemExit, match=f'^{file}: line 1: [^\n]*UTF-8[^\n]*$'):
        options.parse_options('root', is_train=True)


def tree(folder) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('host') / 'images')


def test_training_reaches_its_last_iteration_despite_incomplete_batches(images, tmp_path):
    """Four images in batches of three are one iteration per epoch; BasicSR plans two, and ends after five."""
    opt = stock_options(images)
    opt['datasets']['train']['batch_size_per_gpu'] = 3
    opt['train']['total_iter'] = 7
    opt['logger'] |= {'save_checkpoint_freq': 3}
    del opt['val'], opt['datasets']['val']
    file = write_options(opt, tmp_path / 'options.yml')
    log = train(file, cwd=tmp_path)
    assert 'iter:       7,' in log and 'iter:       8,' not in log
    assert '1 iterations per epoch, 7 epochs' in log

    state_file = tmp_path / 'experiments/tiny/training_states/6.state'
    state = torch.load(state_file, weights_only=True)
    for epoch in (state['epoch'], 90):  # 90: as if the epochs had been much shorter before
        torch.save(state | {'epoch': epoch}, state_file)
        forced = ('--force_yml', 'train:total_iter=11', f'path:resume_state={state_file}')
        log = train(file, *forced, cwd=tmp_path)
        assert 'iter:       7,' in log and 'iter:      11,' in log and 'iter:      12,' not in log

    before = tree(tmp_path)
    opt['datasets']['train']['batch_size_per_gpu'] = 5
    write_options(opt, file)
    with pytest.raises(ValueError, match='datasets.train: 4 items times dataset_enlarge_ratio 1, .* batch of 5;'):
        train(file, '--auto_resume', cwd=tmp_path)
    assert not [path for path in tree(tmp_path).keys() - before.keys() if path.suffix != '.log']


@pytest.mark.parametrize('resume', [[], ['--auto_resume']])
def test_a_refused_run_touches_nothing(images, tmp_path, resume):
    run = tmp_path / 'experiments/tiny'
    (run / 'training_states').mkdir(parents=True)
    (run / 'options.yml').write_text('the copy of the run that is there')
    opt = stock_options(images) | {'model_type': 'RestorationModel', 'scale': 1}
    opt['network_g'] = {'type': 'DPMambaIR', 'insertion': 'mix'}
    opt['datasets']['train'] |= {'type': 'PairedDegradationDataset', 'gt_size': 16}
    file = write_options(opt, tmp_path / 'options.yml')
    before = tree(tmp_path)
    with pytest.raises(SystemExit, match='network_g: insertion'):
        train(file, *resume, cwd=tmp_path)
    assert tree(tmp_path) == before


def test_a_common_folder_is_not_renamed(images, tmp_path):
    opt = stock_options(images)
    (tmp_path / 'all' / 'other run').mkdir(parents=True)
    opt['path']['experiments_root'] = str(tmp_path / 'all')
    file = write_options(opt, tmp_path / 'options.yml')
    before = tree(tmp_path)
    with pytest.raises(SystemExit, match='path.experiments_root: .* files that do not belong to a run'):
        train(file, cwd=tmp_path)
    assert tree(tmp_path) == before


STATE = {'epoch': 0, 'optimizers': [], 'schedulers': []}


@pytest.fixture
def run_folder(tmp_path):
    """Training states 2, 4 and 10 (10 is truncated, 4 lacks its network), and one with a name instead of a number."""
    (tmp_path / 'states').mkdir()
    (tmp_path / 'models').mkdir()
    for iteration in (2, 4, 10):
        torch.save(STATE | {'iter': iteration}, tmp_path / 'states' / f'{iteration}.state')
        torch.save({'params': {}}, tmp_path / 'models' / f'net_g_{iteration}.pth')
    (tmp_path / 'states' / 'best.state').write_text('')
    newest = tmp_path / 'states' / '10.state'
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / 'models' / 'net_g_4.pth').unlink()
    path = {'training_states': str(tmp_path / 'states'), 'models': str(tmp_path / 'models')}
    return {'auto_resume': True, 'network_g': {}, 'path': path}


def test_auto_resume_uses_the_newest_usable_state(run_folder, capsys):
    assert resume.load_resume_state(run_folder) == STATE | {'iter': 2}
    assert run_folder['path']['pretrain_network_g'] == f'{run_folder["path"]["models"]}/net_g_2.pth'
    output = capsys.readouterr().out
    assert '10.state' in output and 'net_g_4.pth' in output


def test_auto_resume_asks_for_every_network(run_folder, tmp_path, capsys):
    run_folder['network_d'] = {}
    for iteration in (2, 4):
        torch.save({'params': {}}, tmp_path / 'models' / f'net_g_{iteration}.pth')
    torch.save({'params': {}}, tmp_path / 'models' / 'net_d_2.pth')
    (tmp_path / 'models' / 'net_d_4.pth').write_text('')
    assert resume.load_resume_state(copy.deepcopy(run_folder))['iter'] == 2
    assert 'net_d_4.pth' in capsys.readouterr().out
    run_folder['path']['ignore_resume_networks'] = ['network_d']
    assert resume.load_resume_state(run_folder)['iter'] == 4


def test_auto_resume_never_restarts_silently(run_folder, tmp_path, capsys):
    (tmp_path / 'models' / 'net_g_2.pth').unlink()
    with pytest.raises(SystemExit, match='none of its 3 training states'):
        resume.load_resume_state(run_folder)
    run_folder['path']['training_states'] = str(tmp_path / 'not there yet')
    assert resume.load_resume_state(run_folder) is None
    assert f'finds no training state in {tmp_path}/not there yet' in capsys.readouterr().out


def test_a_state_that_cannot_be_resumed_from_is_named(run_folder, tmp_path):
    (tmp_path / 'text.state').write_text('nothing of torch')
    torch.save({'params': {}}, tmp_path / 'network.state')
    for name, reason in (
        ('text.state', 'UnpicklingError'),
        ('network.state', 'not a training state'),
        ('none', 'none'),
    ):
        path = run_folder['path'] | {'resume_state': str(tmp_path / name)}
        with pytest.raises(SystemExit, match=f'^path.resume_state: cannot resume from {tmp_path}/{name}: .*{reason}'):
            resume.load_resume_state(run_folder | {'auto_resume': False, 'path': path})


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/marker',)

    torch.save({'iter': Attack()}, tmp_path / '2.state')
    with pytest.raises(SystemExit, match='[Ww]eights.only'):
        resume.load_resume_state({'auto_resume': False, 'path': {'resume_state': str(tmp_path / '2.state')}})
    assert not (tmp_path / 'marker').exists()
