"""The option check names every kind of mistake with its key, and lets through what works."""

import copy
import sys
from pathlib import Path

import dpmambair_basicsr

# isort: split
import pytest
import torch
import yaml
from basicsr.models.sr_model import SRModel
from basicsr.utils import options as basicsr_options
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY
from basicsr_runs import stock_options, write_images

from dpmambair_basicsr.options import check_forced, check_options, check_structure, did_you_mean, refuse

ROOT = Path(dpmambair_basicsr.__file__).parents[1]
OPTION_FILES = sorted((ROOT / 'options').glob('*.yml'))


@MODEL_REGISTRY.register()
class CheckedModel(SRModel):
    option_keys = {'train': frozenset({'clip'}), 'val': frozenset({'tile'}), 'top': frozenset({'extra'})}


@MODEL_REGISTRY.register()
class CheckedChildModel(CheckedModel):
    option_keys = {'path': frozenset({'pretrain_network_e'})}


@ARCH_REGISTRY.register()
class CheckedNet(torch.nn.Module):
    def __init__(self, *, width: int, depth: int = 2):
        super().__init__()


@DATASET_REGISTRY.register()
class CheckedDataset(torch.utils.data.Dataset):
    option_keys = frozenset({'dataroot_gt', 'dataroot_lq', 'meta_info_file', 'gt_size', 'degradation', 'datasets'})


@METRIC_REGISTRY.register()
def checked_metric(img, img2, border, mode='rgb', **kwargs):
    return 0.0


@METRIC_REGISTRY.register()
def checked_metric_without_kwargs(img, img2, mode='rgb'):
    return 0.0


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('options') / 'images')


@pytest.fixture
def opt(images):
    """Parsed options of a training that works, with our own classes."""
    opt = stock_options(images)
    opt |= {'model_type': 'CheckedChildModel', 'network_g': {'type': 'CheckedNet', 'width': 8}, 'extra': 1}
    for phase, dataset in opt['datasets'].items():
        dataset |= {'phase': phase, 'scale': 4, 'type': 'CheckedDataset'}
        for key in ('use_hflip', 'use_rot'):
            dataset.pop(key, None)
    opt['train'] |= {'clip': 1.0, 'total_iter': 10}
    opt['val'] |= {'tile': 64, 'metrics': {'m': {'type': 'checked_metric', 'border': 4, 'better': 'lower'}}}
    opt['path'] |= {'pretrain_network_e': None}
    return opt | {'dist': False, 'rank': 0, 'world_size': 1, 'auto_resume': False, 'is_train': True}


def change(opt: dict, path: str, value) -> None:
    """Sets, or deletes if the value is None, the option at a path such as 'train.optim_g.lr'."""
    *sections, key = path.split('.')
    for section in sections:
        opt = opt[section]
    if value is None:
        del opt[key]
    else:
        opt[key] = value


def test_what_works_passes_and_is_not_changed(opt):
    before = copy.deepcopy(opt)
    assert check_options(opt) == []
    assert opt == before


# What is changed, to what (None: deleted), what is said of it; a fourth entry: of which key, if not the changed one.
MISTAKES = {
    'model type': ('model_type', 'CheckdModel', 'unknown type CheckdModel, did you mean CheckedModel?'),
    'network type': ('network_g.type', 'CheckedNot', 'unknown type CheckedNot, did you mean CheckedNet?'),
    'no network type': ('network_g.type', None, 'missing'),
    'no network': ('network_g', None, 'missing'),
    'network key': ('network_g.dpth', 3, 'unknown key, did you mean depth?'),
    'network key missing': ('network_g.width', None, 'missing'),
    'loss type': ('train.pixel_opt.type', 'L1Los', 'unknown type L1Los, did you mean L1Loss?'),
    'loss key': ('train.pixel_opt.los_weight', 1, 'unknown key, did you mean loss_weight?'),
    'loss is no section': ('train.pixel_opt', 1.0, 'has to be a section with a type, not 1.0'),
    'metric type': ('val.metrics.m.type', 'calculate_psn', 'unknown type calculate_psn, did you mean calculate_psnr?'),
    'metric key': ('val.metrics.m.mod', 'y', 'unknown key, did you mean mode?'),
    'metric key missing': ('val.metrics.m.border', None, 'missing'),
    'better without kwargs': (
        'val.metrics.m',
        {'type': 'checked_metric_without_kwargs', 'better': 'lower'},
        'unknown key; choices: mode',
        'val.metrics.m.better',
    ),
    'dataset type': (
        'datasets.val.type',
        'PairedImagDataset',
        'unknown type PairedImagDataset, did you mean PairedImageDataset?',
    ),
    'dataset key': ('datasets.train.gt_sise', 3, 'unknown key, did you mean gt_size?'),
    'batch size missing': ('datasets.train.batch_size_per_gpu', None, 'missing'),
    'optimizer type': ('train.optim_g.type', 'AdmW', 'unknown type AdmW, did you mean AdamW?'),
    'optimizer key': ('train.optim_g.weight_decy', 0.1, 'unknown key, did you mean weight_decay?'),
    'learning rate missing': ('train.optim_g.lr', None, 'missing'),
    'scheduler type': ('train.scheduler.type', 'MultistepLR', 'unknown type MultistepLR, did you mean MultiStepLR?'),
    'scheduler key': ('train.scheduler.gama', 0.1, 'unknown key, did you mean gamma?'),
    'scheduler key missing': ('train.scheduler.milestones', None, 'missing'),
    'top key': ('manual_sed', 0, 'unknown key, did you mean manual_seed?'),
    'train key': ('train.total_itr', 5, 'unknown key, did you mean total_iter?'),
    'train key missing': ('train.total_iter', None, 'missing'),
    'val key': ('val.tyle', 5, 'unknown key, did you mean tile?'),
    'path key': ('path.strict_load_q', True, 'unknown key, did you mean strict_load_g?'),
    'logger key': ('logger.print_frq', 5, 'unknown key, did you mean print_freq?'),
    'no folder': ('datasets.val.dataroot_gt', '/no/such', '/no/such does not exist'),
    'no folder of a part': (
        'datasets.train.datasets',
        {'rain': {'dataroot_lq': '/no'}},
        '/no does not exist',
        'datasets.train.datasets.rain.dataroot_lq',
    ),
    'no list': ('datasets.train.meta_info_file', '/no.txt', '/no.txt does not exist'),
    'no checkpoint': ('path.pretrain_network_g', '/no.pth', '/no.pth does not exist'),
    'number as text': ('train.optim_g.lr', '3e-4', '3e-4 is text in YAML; write 3.0e-4'),
    'number as text in a list': (
        'train.scheduler.milestones',
        [1, '1e5'],
        '1e5 is text in YAML; write 1.0e+5',
        'train.scheduler.milestones[1]',
    ),
    'quoted number': ('train.ema_decay', '0.999', '0.999 is text in YAML; write 0.999'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_named(opt, mistake):
    path, value, what, where = (*MISTAKES[mistake], None)[:4]
    change(opt, path, value)
    assert check_options(opt) == [f'{where or path}: {what}']


def test_numbers_are_written_as_yaml_wants_them(opt):
    for text in ('3e-4', '1e5', '2.5E3', '-1e-08', '.5e1'):
        change(opt, 'train.optim_g.lr', text)
        (problem,) = check_options(opt)
        assert yaml.safe_load(problem.rpartition('write ')[2]) == float(text)


def test_text_that_looks_like_a_number_is_fine_where_text_is_meant(opt):
    opt |= {'name': '001'}
    opt['val']['suffix'] = '2'
    opt['datasets']['val']['name'] = '5'
    assert check_options(opt) == []


def test_a_resumed_run_does_not_need_what_it_started_from(opt, tmp_path):
    opt['path'] |= {'pretrain_network_g': '/no.pth', 'training_states': str(tmp_path)}
    opt['auto_resume'] = True
    assert check_options(opt) == ['path.pretrain_network_g: /no.pth does not exist']
    (tmp_path / '2.state').touch()
    assert check_options(opt) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
def test_cuda_without_cuda(opt):
    opt['num_gpu'] = 1
    opt['datasets']['train']['prefetch_mode'] = 'cuda'
    for model in ('CheckedModel', 'SRModel'):
        opt |= {'model_type': model, 'path': {}}
        assert check_options(opt) == [
            'num_gpu: 1, but PyTorch finds no CUDA device; write 0 or auto',
            'datasets.train.prefetch_mode: cuda, but PyTorch finds no CUDA device; write ~',
        ]


def test_models_of_basicsr_pass_untouched(opt):
    opt |= {'model_type': 'SRModel', 'anything': 1, 'network_g': {'type': 'unknown'}}
    opt['train']['optim_g']['lr'] = '3e-4'
    opt['datasets']['val']['dataroot_gt'] = '/no/such'
    assert check_options(opt) == []


def test_keys_of_a_foreign_dataset_are_not_checked(opt):
    opt['datasets']['val'] |= {'type': 'PairedImageDataset', 'whatever': 1}
    assert check_options(opt) == []


def test_our_schedulers_are_known(opt):
    scheduler = {'type': 'CosineAnnealingRestartCyclicLR', 'periods': [5], 'restart_weights': [1], 'eta_mins': [0]}
    opt['train']['scheduler'] = scheduler
    assert check_options(opt) == []


def test_testing_needs_no_training_options(opt):
    del opt['train'], opt['logger'], opt['datasets']['train']
    opt |= {'is_train': False, 'val': {'save_img': True, 'suffix': None}}
    assert check_options(opt) == []
    del opt['val']['suffix']
    assert check_options(opt) == ['val.suffix: missing; write ~ to name the images after the experiment']


STRUCTURES = {
    'empty': (None, True, ['the file is not a mapping of keys to values']),
    'nothing': ({}, False, [f'{key}: missing' for key in ('name', 'model_type', 'num_gpu', 'datasets', 'path', 'val')]),
    'no section': (
        {'name': 'x', 'model_type': 'x', 'num_gpu': 0, 'datasets': {'val': 3}, 'path': 4, 'train': {}, 'logger': {}},
        True,
        [
            'datasets.train: missing',
            'path: has to be a section, not 4',
            'datasets.val: has to be a section, not 3',
        ],
    ),
}


@pytest.mark.parametrize('name', STRUCTURES)
def test_structure(name):
    opt, is_train, problems = STRUCTURES[name]
    assert check_structure(opt, is_train) == problems


def test_forced_options():
    opt = {'name': 'x', 'train': {'total_iter': 1}}
    assert check_forced(opt, ['name=y', 'train:total_iter=4', 'train:new=[1, 2]']) == []
    wrong = ['name', 'name=a=b', 'train.total_iter=4', 'name:part=3', 'tran:x=1', 'x"]=1']
    assert len(check_forced(opt, wrong)) == len(wrong)


def test_refusal_is_one_message_and_a_failure():
    refuse('x.yml', [])
    with pytest.raises(SystemExit) as refusal:
        refuse('x.yml', ['a: missing', 'b: missing'])
    assert str(refusal.value) == 'x.yml: 2 problems in the options:\n  a: missing\n  b: missing'


def test_no_near_name_lists_the_choices():
    assert did_you_mean('zzz', ['b', 'a']) == '; choices: a, b'


def test_there_are_option_files():
    assert OPTION_FILES, 'an empty glob would make the next test pass for nothing'


@pytest.mark.parametrize('file', OPTION_FILES, ids=lambda file: file.name)
def test_our_option_files_have_no_problems_but_absent_data(file, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['', '-opt', str(file)])
    is_train = 'train' in yaml.safe_load(file.read_text())
    assert check_structure(yaml.safe_load(file.read_text()), is_train) == []
    opt, _ = basicsr_options.parse_options.__wrapped__('root', is_train=is_train)
    assert [problem for problem in check_options(opt) if not problem.endswith('does not exist')] == []
