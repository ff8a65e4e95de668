"""The backend of scans in commands: the option `scan_backend`, --scan-backend, DPMAMBAIR_SCAN_BACKEND."""

import re
import sys

import numpy as np
import pytest
import torch
import yaml
from basicsr.models import build_model
from support import commands
from support.pipelines import write_pairs
from torch.profiler import ProfilerActivity, profile

import dpmambair_basicsr
from dpmambair_basicsr import restore
from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.ops.selective_scan import BackendError, available_backends
from dpmambair_basicsr.ops.selective_scan.backend import set_default_backend
from dpmambair_basicsr.option_checks.sections import check_options

NETWORK = {'dim': 4, 'num_blocks': [1, 0, 0, 0], 'num_refinement_blocks': 0, 'd_state': 2}
VARIABLE = 'DPMAMBAIR_SCAN_BACKEND'


@pytest.fixture
def options(tmp_path):
    """Options of a training of one iteration, by BasicSR's own model, and of a test."""
    pairs = write_pairs(tmp_path / 'pairs', [(16, 16)] * 2)
    dataset = {'name': 'x', 'type': 'PairedDegradationDataset', **pairs}
    loader = {'gt_size': 16, 'batch_size_per_gpu': 1, 'num_worker_per_gpu': 0}
    common = {'name': 'x', 'scale': 1, 'num_gpu': 0, 'manual_seed': 0, 'network_g': {'type': 'VmambaIR', **NETWORK}}
    train = {
        'total_iter': 1,
        'optim_g': {'type': 'AdamW', 'lr': 1e-3},
        'scheduler': {'type': 'MultiStepLR', 'milestones': [9]},
        'pixel_opt': {'type': 'L1Loss'},
    }
    logger = {'print_freq': 1, 'save_checkpoint_freq': 1, 'use_tb_logger': False}
    training = common | {
        'model_type': 'SRModel',
        'datasets': {'train': dataset | loader},
        'path': {'pretrain_network_g': None},
        'train': train,
        'logger': logger,
    }
    testing = common | {
        'model_type': 'RestorationModel',
        'datasets': {'test_1': dataset},
        'path': {'pretrain_network_g': None},
        'val': {'save_img': False, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}},
    }
    return {'train': training, 'test': testing}


def command(name, opt, folder, *arguments, **environment):
    (folder / 'x.yml').write_text(yaml.safe_dump(opt))
    return commands.command(name, '-opt', 'x.yml', *arguments, cwd=folder, **environment)


def backends_in(log):
    return {line.partition('_scan: ')[2] for line in log.splitlines() if '_scan: ' in line}


def test_the_option_applies_to_training_and_testing_and_overrides_the_variable(options, tmp_path):
    for name, opt in options.items():
        done = command(name, opt | {'scan_backend': 'reference'}, tmp_path, **{VARIABLE: 'torch'})
        assert done.returncode == 0, done.stdout
        assert backends_in(done.stdout) == {"backend 'reference' on cpu"}


def test_the_variable_applies_without_the_option(options, tmp_path):
    done = command('test', options['test'] | {'scan_backend': None}, tmp_path, **{VARIABLE: 'torch'})
    assert done.returncode == 0, done.stdout
    assert backends_in(done.stdout) == {"backend 'torch' on cpu"}


def test_an_unavailable_backend_ends_a_command_before_anything_is_created(options, tmp_path):
    done = command('train', options['train'], tmp_path, '--force_yml', 'scan_backend=mamba_ssm')
    assert done.returncode == 1 and 'x.yml: 1 problem in the options' in done.stdout
    assert "scan_backend: backend 'mamba_ssm' is not available: it computes float32 on CUDA GPUs" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {'pairs', 'x.yml'}


@pytest.mark.parametrize('model', ['SRModel', 'RestorationModel'])
def test_unknown_names_are_option_errors(model, options, monkeypatch):
    opt = options['test'] | {'model_type': model, 'is_train': False, 'auto_resume': False, 'dist': False}
    opt['datasets']['test_1'] |= {'phase': 'test', 'scale': 1}
    assert check_options(opt | {'scan_backend': 'torch'}) == check_options(opt) == []
    for value in ('cuad', 3):
        (problem,) = check_options(opt | {'scan_backend': value})
        assert re.fullmatch(rf'scan_backend: .*cuda.* numba.* torch.* reference.* mamba_ssm.* {value!r}', problem)
    (problem,) = check_options(opt | {'scan_backend': 'triton'})  # of earlier versions
    assert re.match("scan_backend: backend 'cuda' is not available: it needs an NVIDIA GPU", problem)
    monkeypatch.setenv(VARIABLE, 'cuad')
    choices = 'cuda, numba, torch, reference, mamba_ssm'
    assert check_options(opt) == [f"{VARIABLE}: no backend 'cuad'; choose from {choices}"]
    assert check_options(opt | {'scan_backend': 'torch'}) == []


def test_a_model_built_by_a_program_obeys_the_option(options):
    opt = options['test'] | {'is_train': False, 'dist': False, 'rank': 0}
    image = {'lq': torch.rand(1, 3, 16, 16), 'lq_path': ['x']}
    for name, scans in (('torch', {'dpmambair_basicsr::chunked_scan'}), ('reference', set())):
        model = build_model(opt | {'scan_backend': name})
        model.feed_data(image)
        assert scans_run_by(model.test) == scans
    with pytest.raises(BackendError, match="^scan_backend: no backend 'cuad'"):
        build_model(opt | {'scan_backend': 'cuad'})
    build_model(opt)
    by_default = scans_run_by(model.test)
    set_default_backend(available_backends()[0])
    assert by_default == scans_run_by(model.test)
    set_default_backend(None)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    network = {'type': 'VmambaIR', **NETWORK}
    torch.save({'params': VmambaIR(**NETWORK).state_dict(), 'network_g': network}, tmp_path / 'w.pth')
    return tmp_path / 'w.pth'


def scans_run_by(function):
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    return {event.name for event in record.events() if event.name.startswith('dpmambair_basicsr::')}


def test_a_loaded_network_keeps_its_backend(weights, monkeypatch):
    image = np.full((16, 16, 3), 99, np.uint8)
    monkeypatch.setenv(VARIABLE, 'reference')
    for name, scans in (('torch', {'dpmambair_basicsr::chunked_scan'}), ('reference', set()), (None, set())):
        net = dpmambair_basicsr.load(weights, device='cpu', scan_backend=name)
        assert scans_run_by(lambda net=net: net.restore(image)) == scans
    monkeypatch.setenv(VARIABLE, 'mamba_ssm')
    with pytest.raises(ValueError, match=f"^{VARIABLE}: backend 'mamba_ssm' is not available"):
        dpmambair_basicsr.load(weights, device='cpu')


def test_restore_accepts_it_as_an_argument(weights, tmp_path, monkeypatch):
    write_pairs(tmp_path / 'pairs', [(16, 16)])
    arguments = ['-w', weights, '-i', tmp_path / 'pairs/LQ', '-o', tmp_path / 'out', '--device', 'cpu']

    def run(*more):
        monkeypatch.setattr(sys, 'argv', ['restore', *map(str, [*arguments, *more])])
        return restore.main()

    with pytest.raises(SystemExit, match=r"^scan_backend: no backend 'cuad'; choose from cuda, .*mamba_ssm$"):
        run('--scan-backend', 'cuad')
    assert not (tmp_path / 'out').exists()
    assert scans_run_by(lambda: run('--scan-backend', 'torch')) == {'dpmambair_basicsr::chunked_scan'}
    assert (tmp_path / 'out/00.png').is_file()
