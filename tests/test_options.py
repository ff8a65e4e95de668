"""The option check names every kind of mistake with its key, and accepts valid options."""

import copy
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.models.sr_model import SRModel
from basicsr.utils import options as basicsr_options
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY
from support.commands import stock_options, write_images

import dpmambair_basicsr
from dpmambair_basicsr.archs import DegradationAutoencoder, DPMambaIR
from dpmambair_basicsr.data.degradations import DEGRADATIONS
from dpmambair_basicsr.files.option_files import OptionError
from dpmambair_basicsr.files.option_row import Option
from dpmambair_basicsr.option_checks.sections import check_options
from dpmambair_basicsr.option_checks.structure import add_sections, apply_forced, check_root, check_structure, refuse
from dpmambair_basicsr.registry import did_you_mean

ROOT = Path(dpmambair_basicsr.__file__).parents[1]
OPTION_FILES = sorted((ROOT / 'options').glob('*.yml'))


@MODEL_REGISTRY.register()
class CheckedModel(SRModel):
    option_keys = (
        Option('train', 'clip', float, 'x'),
        Option('val', 'tile', int, 'x'),
        Option('', 'extra', int, 'x'),
    )


@MODEL_REGISTRY.register()
class CheckedChildModel(CheckedModel):
    option_keys = (Option('path', 'pretrain_network_e', str | None, 'x'),)


@ARCH_REGISTRY.register()
class CheckedNet(torch.nn.Module):
    def __init__(self, *, width: int, depth: int = 2):
        super().__init__()


@DATASET_REGISTRY.register()
class CheckedDataset(torch.utils.data.Dataset):
    option_keys = (
        *(Option('datasets', key, str | None, 'x') for key in ('dataroot_gt', 'dataroot_lq', 'meta_info_file')),
        Option('datasets', 'gt_size', int, 'x'),
        Option('datasets', 'datasets', dict, 'x'),
    )


@METRIC_REGISTRY.register()
def checked_metric(img, img2, border, mode='rgb', **kwargs):
    return 0.0


@METRIC_REGISTRY.register()
def checked_metric_with_better(img, img2, better='lower'):
    return 0.0


@METRIC_REGISTRY.register()
def checked_metric_without_kwargs(img, img2, mode='rgb'):
    return 0.0


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('options') / 'images')


@pytest.fixture
def opt(images):
    """Parsed valid options of a training, with classes of our own."""
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
    elif isinstance(value, dict) and isinstance(opt.get(key), dict) and 'type' not in value:
        opt[key].update(value)
    else:
        opt[key] = value


def test_valid_options_pass_unchanged(opt):
    before = copy.deepcopy(opt)
    assert check_options(opt) == []
    assert opt == before


# Changed key, its value (None: deleted), message; a fourth entry: the key in the message, if it is another one.
MISTAKES = {
    'model type': ('model_type', 'CheckdModel', 'unknown type CheckdModel, did you mean CheckedModel?'),
    'network type': ('network_g.type', 'CheckedNot', 'unknown type CheckedNot, did you mean CheckedNet?'),
    'no network type': ('network_g.type', None, 'missing'),
    'no network': ('network_g', None, 'missing'),
    'network key': ('network_g.dpth', 3, 'unknown key, did you mean depth?'),
    'network key missing': ('network_g.width', None, 'missing'),
    'loss type': ('train.pixel_opt.type', 'L1Los', 'unknown type L1Los, did you mean L1Loss?'),
    'loss key': ('train.pixel_opt.los_weight', 1, 'unknown key, did you mean loss_weight?'),
    'loss is not a section': ('train.pixel_opt', 1.0, 'expected a section with a type, got 1.0'),
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
    'optimizer of a package': (
        'train.optim_g.type',
        'torch.optim.AdmW',
        'unknown type torch.optim.AdmW, did you mean torch.optim.AdamW?',
    ),
    'optimizer of no package': (
        'train.optim_g.type',
        'nowhere.AdamW',
        "nowhere.AdamW: nowhere cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
    ),
    'package without optimizers': ('train.optim_g.type', 'json.AdamW', 'json.AdamW: json has no optimizers'),
    'key of an optimizer of a package': (
        'train.optim_g',
        {'type': 'torch.optim.AdamW', 'lr': 1e-3, 'weight_decy': 0.1},
        'unknown key, did you mean weight_decay?',
        'train.optim_g.weight_decy',
    ),
    'optimizer that takes a closure': (
        'train.optim_g',
        {'type': 'support.optimizers.NeedsClosure', 'lr': 1e-3},
        "TypeError: NeedsClosure.step() missing 1 required positional argument: 'closure'",
    ),
    'optimizer that cannot be resumed': (
        'train.optim_g',
        {'type': 'support.optimizers.ForeignState', 'lr': 1e-3},
        'support.optimizers.ForeignState: torch.load(weights_only=True) cannot read its state',
    ),
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
    'network type is a list': ('network_g.type', ['CheckedNet'], "expected text, got ['CheckedNet']"),
    'model type is a list': ('model_type', ['CheckedModel'], "expected text, got ['CheckedModel']"),
    'backend is not a section': (
        'datasets.train.io_backend',
        'disk',
        "expected a section or ~, got 'disk'",
    ),
    'parts are a list': ('datasets.train.datasets', ['rain'], "expected a section, got ['rain']"),
    'a part is text': (
        'datasets.train.datasets',
        {'rain': 'x'},
        "expected a section, got 'x'",
        'datasets.train.datasets.rain',
    ),
    'metrics are a list': ('val.metrics', ['psnr'], "expected a section, got ['psnr']"),
    'no best': (
        'val.metrics.m',
        {'type': 'checked_metric_with_better'},
        'missing; needs lower, or BasicSR selects the worst network as the best',
        'val.metrics.m.better',
    ),
    'no best of NIQE': (
        'val.metrics.m',
        {'type': 'calculate_niqe', 'crop_border': 0},
        'missing; needs lower, or BasicSR selects the worst network as the best',
        'val.metrics.m.better',
    ),
    'no iterations': ('train.total_iter', 'many', "expected number >= 1, got 'many'"),
    'no decay': ('train.ema_decay', 'high', "expected number in [0, 1], got 'high'"),
    'a large decay': ('train.ema_decay', 999, 'expected number in [0, 1], got 999'),
    'no norm': ('train.clip_norm', 'x', 'unknown key, did you mean clip?'),
    'never printed': ('logger.print_freq', 0, 'expected number >= 1, got 0'),
    'never validated': ('val.val_freq', 'x', "expected number >= 1, got 'x'"),
    'half a batch': ('datasets.train.batch_size_per_gpu', 1.5, 'expected int >= 1, got 1.5'),
    'optimizer value': ('train.optim_g.lr', -1.0, 'Invalid learning rate: -1.0', 'train.optim_g'),
    'scheduler value': (
        'train.scheduler',
        {'type': 'CosineAnnealingRestartCyclicLR', 'periods': 5},
        'expected list of int, got 5',
        'train.scheduler.periods',
    ),
    'prefetching': (
        'datasets.train',
        {'prefetch_mode': 'cpu', 'persistent_workers': True},
        'crashes randomly with prefetch_mode cpu; write false or ~',
        'datasets.train.persistent_workers',
    ),
    'phase': (
        'datasets.test_1',
        {'name': 'x', 'type': 'CheckedDataset', 'phase': 'test'},
        'unknown dataset; choices: train, val, val_<name>',
    ),
    'prefetch mode': ('datasets.train.prefetch_mode', 'gpu', "expected cpu or cuda or ~, got 'gpu'"),
    'no workers to keep': (
        'datasets.train.persistent_workers',
        True,
        'true, but this loader has no workers; write false',
    ),
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


def test_numbers_that_yaml_reads_as_text_get_a_valid_spelling(opt):
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
def test_cuda_options_without_cuda_are_refused(opt):
    opt['num_gpu'] = 1
    opt['datasets']['train']['prefetch_mode'] = 'cuda'
    for model in ('CheckedModel', 'SRModel'):
        opt |= {'model_type': model, 'path': {}}
        opt['datasets']['train']['pin_memory'] = True
        assert check_options(opt) == [
            'num_gpu: 1, but PyTorch finds no CUDA device; write 0 or auto',
            'datasets.train.prefetch_mode: cuda, but PyTorch finds no CUDA device; write ~',
        ]


def test_models_of_basicsr_pass_untouched(opt):
    opt |= {'model_type': 'SRModel', 'anything': 1}
    opt['network_g'] = {'type': 'CheckedNet', 'unknown': 1}
    opt['train']['optim_g']['lr'] = '3e-4'
    opt['datasets']['val']['dataroot_gt'] = '/no/such'
    assert check_options(opt) == []


def test_keys_of_a_foreign_dataset_are_not_checked(opt):
    opt['datasets']['val'] |= {'type': 'PairedImageDataset', 'whatever': 1}
    assert check_options(opt) == []


def test_keys_that_a_dataset_of_basicsr_ignores_are_named(opt):
    train = opt['datasets']['train']
    train |= {'type': 'PairedImageDataset', 'progressive': {'gt_sizes': [8]}, 'degradation': 'rain', 'pad_small': False}
    opt['datasets']['val'] |= {'type': 'PairedImageDataset', 'use_hflip': True, 'gt_gamma': [0.5, 1]}
    ignored = 'PairedImageDataset ignores it; it is for'
    progressive, degradation, gamma = check_options(opt)
    assert progressive.startswith(f'datasets.train.progressive: {ignored} ')
    assert degradation == f'datasets.train.degradation: {ignored} PairedDegradationDataset'
    assert gamma == f'datasets.val.gt_gamma: {ignored} SyntheticDegradationDataset'


def test_a_forks_dataset_may_read_a_key_of_ours(opt, monkeypatch, tmp_path):
    (tmp_path / 'fork_dataset.py').write_text("class ForkDataset:\n    keys = 'degradation'\n")
    spec = importlib.util.spec_from_file_location('basicsr.data.fork_dataset', tmp_path / 'fork_dataset.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, 'ForkDataset', module.ForkDataset)
    opt['datasets']['val'] |= {'type': 'ForkDataset', 'degradation': 'rain'}
    assert check_options(opt) == []


def test_our_schedulers_are_known(opt):
    scheduler = {'type': 'CosineAnnealingRestartCyclicLR', 'periods': [5], 'restart_weights': [1], 'eta_mins': [0]}
    opt['train']['scheduler'] = scheduler
    assert check_options(opt) == []


def test_testing_needs_no_training_options(opt):
    del opt['train'], opt['logger'], opt['datasets']['train']
    opt |= {'is_train': False, 'val': {'save_img': True, 'suffix': None}}
    assert check_options(opt) == []
    opt['val']['metrics'] = {'niqe': {'type': 'calculate_niqe', 'crop_border': 0}}
    assert check_options(opt) == [], 'a test selects no best network'
    del opt['val']['suffix']
    assert check_options(opt) == ['val.suffix: missing; write ~ to name the images after the experiment']


STRUCTURES = {
    'empty': (None, True, ['the file is not a mapping of keys to values']),
    'nothing': ({}, False, [f'{key}: missing' for key in ('name', 'model_type', 'num_gpu', 'datasets', 'path', 'val')]),
    'no section': (
        {'name': 'x', 'model_type': 'x', 'num_gpu': 0, 'datasets': {'val': 3}, 'path': 4, 'train': {}, 'logger': {}},
        True,
        [
            'path: expected a section, got 4',
            'datasets.train: missing',
            'datasets.val: expected a section, got 3',
        ],
    ),
    'wrong kinds': (
        {
            **dict.fromkeys(('train', 'logger'), {}),
            **{'name': 1, 'model_type': 'x', 'num_gpu': 0, 'manual_seed': 'x', 'val': 'x'},
            **{'datasets': {'train': {'dataroot_gt': ['a', 3]}}, 'path': {'pretrain_network_g': 5}},
        },
        True,
        [
            'name: expected text, got 1',
            "manual_seed: expected int or ~, got 'x'",
            "val: expected a section or ~, got 'x'",
            'path.pretrain_network_g: expected text, got 5',
            'datasets.train.dataroot_gt[1]: expected text, got 3',
        ],
    ),
}


@pytest.mark.parametrize('name', STRUCTURES)
def test_problems_of_structure_are_named(name):
    opt, is_train, problems = STRUCTURES[name]
    assert check_structure(opt, is_train) == problems


def test_forced_options_are_applied_or_refused():
    opt = {'name': 'x', 'train': {'total_iter': 1}}
    assert apply_forced(opt, ['name=y', 'train:total_iter=4', 'train:new=[1, 2e-1]']) == []
    assert opt == {'name': 'y', 'train': {'total_iter': 4, 'new': [1, 0.2]}}
    wrong = ['name', 'name=a=b', 'train.total_iter=4', 'name:part=3', 'tran:x=1', 'x"]=1', 'name=[1']
    assert len(apply_forced(opt, wrong)) == len(wrong)


def test_forced_options_add_sections_that_a_file_may_have():
    opt = {'train': {'total_iter': 1, 'fft_opt': None}, 'val': {}, 'datasets': {'train': {}}}
    forced = ['train:fft_opt:type=FFTLoss', 'val:metrics:psnr:type=calculate_psnr', 'val:metrics:psnr:crop_border=0']
    forced += [
        'datasets:train:progressive:gt_sizes=[8, 16]',
        'datasets:val_2:io_backend:type=disk',
        'logger:wandb:project=x',
    ]
    forced += ['datasets:train:datasets:rain:degradations:rain:density=1', 'datasets:train:filename_tmpl={}']
    entries = add_sections(opt, forced)
    assert [entry for entry in entries if entry in forced] == forced, 'and in this order'
    assert apply_forced(opt, entries) == []
    train = {'progressive': {'gt_sizes': [8, 16]}, 'datasets': {'rain': {'degradations': {'rain': {'density': 1}}}}}
    assert opt == {
        'train': {'total_iter': 1, 'fft_opt': {'type': 'FFTLoss'}},
        'val': {'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}},
        'datasets': {'train': train | {'filename_tmpl': '{}'}, 'val_2': {'io_backend': {'type': 'disk'}}},
        'logger': {'wandb': {'project': 'x'}},
    }
    assert add_sections(opt, forced) == forced, 'nothing is missing now'


@pytest.mark.parametrize(
    ('entry', 'message'),
    {
        'trian:total_iter=3': 'there is no section trian, did you mean train?',
        'datasets:trian:gt_size=3': 'there is no section datasets.trian, did you mean train?',
        'datasets:val:progresive:x=1': 'there is no section datasets.val.progresive, did you mean progressive?',
        'train:total_iter:x=1': 'there is no section train.total_iter; choices: ',
        'network_g:parts:x=1': 'there is no section network_g.parts',
    }.items(),
)
def test_an_unknown_section_is_refused_with_the_nearest_name(entry, message):
    opt = {'train': {'total_iter': 1}, 'datasets': {'val': {}}, 'network_g': {}}
    assert add_sections(opt, [entry]) == [entry]
    (problem,) = apply_forced(opt, [entry])
    assert problem.startswith(f'--force_yml {entry}: {message}')


FORCED_AWAY = {'train=~ train:total_iter=1': 'section', 'name=[1]': 'name', 'path:pretrain_network_g=5': 'pretrain'}


@pytest.mark.parametrize('forced', FORCED_AWAY)
def test_forced_options_are_checked_like_those_of_the_file(opt, forced):
    (problem,) = apply_forced(opt, forced.split(' ')) or check_structure(opt, is_train=True)
    assert FORCED_AWAY[forced] in problem


def test_refusal_is_one_message_and_a_failure():
    refuse('x.yml', [])
    with pytest.raises(OptionError) as refusal:
        refuse('x.yml', ['a: missing', 'b: missing'])
    assert str(refusal.value) == 'x.yml: 2 problems in the options:\n  a: missing\n  b: missing'


def test_without_a_similar_name_the_choices_are_listed():
    assert did_you_mean('zzz', ['b', 'a']) == '; choices: a, b'


def test_there_are_option_files():
    assert OPTION_FILES, 'an empty glob would make the next test pass for nothing'


def parsed(file: Path, monkeypatch) -> dict:
    """The options of one of our files, unchecked."""
    monkeypatch.setattr(sys, 'argv', ['', '-opt', str(file)])
    is_train = 'train' in yaml.safe_load(file.read_text())
    assert check_structure(yaml.safe_load(file.read_text()), is_train) == []
    return basicsr_options.parse_options.__wrapped__('root', is_train=is_train)[0]


@pytest.mark.parametrize('file', OPTION_FILES, ids=lambda file: file.name)
def test_our_option_files_have_no_problems_but_absent_data(file, monkeypatch):
    opt = parsed(file, monkeypatch)
    absent = 'does not exist|there is no experiments/pretrained_models'
    assert [problem for problem in check_options(opt) if not re.search(absent, problem)] == []


@pytest.mark.parametrize('file', OPTION_FILES, ids=lambda file: file.name)
def test_mistakes_in_our_option_files_are_named(file, monkeypatch):
    """An unknown key, a name that is not registered, a wrong argument."""
    opt = parsed(file, monkeypatch)
    phase = next(iter(opt['datasets']))
    width = 'dim' if 'dim' in opt['network_g'] else 'embed_dim'
    for path, value in {
        'path.strict_load_q': True,
        f'datasets.{phase}.type': 'NoDataset',
        f'network_g.{width}': 'wide',
    }.items():
        change(opt, path, value)
    found = check_options(opt)
    assert 'path.strict_load_q: unknown key, did you mean strict_load_g?' in found
    assert any(problem.startswith(f'datasets.{phase}.type: unknown type NoDataset') for problem in found)
    assert f"network_g.{width}: expected int, got 'wide'" in found


NETWORK = {
    'type': 'DPMambaIR',
    **{'dim': 8, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_inner': [8, 8, 8, 8], 'd_state': 2},
    **{'embed_dim': 8, 'extractor_channels': [4, 4]},
}
STAGE_1 = {'embed_dim': 8, 'extractor_channels': [4, 4], 'channels': 4, 'num_fusion_blocks': 1, 'num_refine_blocks': 1}


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Checkpoints of stage 1 and of a whole network with one refinement block."""
    folder = tmp_path_factory.mktemp('checkpoints')
    network = DPMambaIR(**{key: value for key, value in NETWORK.items() if key != 'type'})
    torch.save({'params': DegradationAutoencoder(**STAGE_1).state_dict()}, folder / 'stage_1.pth')
    torch.save({'params': network.state_dict()}, folder / 'whole.pth')
    saved = {**NETWORK, 'dim': 12, 'num_refinement_blocks': 0}
    torch.save({'params': {'x': torch.zeros(1)}, 'network_g': saved}, folder / 'other.pth')
    (folder / 'cut.pth').write_bytes((folder / 'whole.pth').read_bytes()[:-100])
    return folder


@pytest.fixture
def ours(opt, images, checkpoints):
    """Parsed valid options of a training, with classes of this package, which the dry run builds."""
    gt = {'dataroot_gt': images['dataroot_gt']}
    parts = {
        'rain': {'dataroot_lq': images['dataroot_gt'], **gt},
        'noise': {'type': 'SyntheticDegradationDataset', 'degradations': {'noise': {'sigma': 3}}, **gt},
    }
    train = {'name': 'x', 'type': 'MixedDegradationDataset', 'gt_size': 16, 'datasets': parts, 'sampling': 'uniform'}
    del opt['extra'], opt['train']['clip'], opt['val']['tile']
    opt |= {'model_type': 'RestorationModel', 'network_g': copy.deepcopy(NETWORK), 'scale': 1}
    opt['datasets'] = {
        'train': train | {'phase': 'train', 'scale': 1, 'batch_size_per_gpu': 2, 'num_worker_per_gpu': 0}
    }
    opt['path'] |= {'pretrain_network_e': str(checkpoints / 'stage_1.pth')}
    return opt


def test_valid_options_pass_the_dry_run_without_a_trace(ours):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    before = copy.deepcopy(ours)
    assert check_options(ours) == []
    assert ours == before
    assert torch.equal(torch.rand(1), expected)


def test_a_network_that_needs_labels_is_given_some(ours):
    """A sub-dataset with another name has no label; a misspelt name is reported."""
    ours['network_g'] |= {'degradation': 'class'}
    ours['path']['pretrain_network_e'] = None
    assert check_options(ours) == []
    parts = ours['datasets']['train']['datasets']
    parts['rian'] = parts.pop('rain')
    assert check_options(ours) == [
        'datasets.train: no labels, which network_g needs; not of a known degradation: rian (did you mean rain?)'
    ]
    ours['network_g'] |= {'degradation': 'extractor', 'insertion': 'none'}
    assert check_options(ours) == []


def test_the_extractor_is_validated_on_pairs(ours, images):
    val = {'name': 'v', 'type': 'SingleImageDataset', 'phase': 'val', 'scale': 1, 'io_backend': {'type': 'disk'}}
    ours['datasets']['val'] = val | {'dataroot_lq': images['dataroot_gt']}
    ours['val']['metrics'] = None
    ours |= {'model_type': 'DegradationExtractorModel', 'network_g': {'type': 'DegradationAutoencoder', **STAGE_1}}
    ours['path']['pretrain_network_e'] = None
    problem = 'datasets.val: DegradationExtractorModel degrades clean images, and SingleImageDataset has none'
    assert check_options(ours) == [problem]
    ours['datasets']['val'] |= {'type': 'PairedImageDataset', 'dataroot_gt': images['dataroot_gt']}
    assert check_options(ours) == []


def test_a_dataset_of_basicsr_has_no_labels(ours, images):
    gt = images['dataroot_gt']
    ours['network_g'] |= {'degradation': 'class'}
    ours['path']['pretrain_network_e'] = None
    val = {'name': 'v', 'type': 'PairedImageDataset', 'phase': 'val', 'scale': 1, 'io_backend': {'type': 'disk'}}
    ours['datasets']['val'] = val | {'dataroot_gt': gt, 'dataroot_lq': gt}
    ours['val']['metrics'] = None
    assert check_options(ours) == ['datasets.val: no labels, which network_g needs; PairedImageDataset has none']
    ours['network_g'] |= {'degradation': 'extractor', 'insertion': 'none'}
    assert check_options(ours) == []


def test_a_network_has_an_embedding_for_each_label(ours):
    highest = max(DEGRADATIONS[name].label for name in ours['datasets']['train']['datasets'])
    name = list(DEGRADATIONS)[highest]
    ours['network_g'] |= {'degradation': 'class', 'num_degradations': highest}
    ours['path']['pretrain_network_e'] = None
    assert check_options(ours) == [
        f'network_g.num_degradations: {highest}, but datasets.train has the label {highest} ({name}), '
        f'which needs {highest + 1}'
    ]
    ours['network_g']['num_degradations'] += 1
    assert check_options(ours) == []


# Changed key, its value, and the complete message.
FOUND_IN_A_DRY_RUN = {
    'freeze': (
        'train.freeze',
        ['outptu.*'],
        r"network_g: train.freeze: 'outptu\.\*' matches no parameter of DPMambaIR",
    ),
    'freeze is no list': ('train.freeze', 'output.*', 'train.freeze: expected list of text or ~, got'),
    'accumulated batches': (
        'train.accum_iter',
        9,
        'datasets.train: 8 items times dataset_enlarge_ratio 1, .* one batch of 18',
    ),
    'accumulation': ('train.accum_iter', 0, 'train.accum_iter: expected int >= 1, got 0'),
    'misspelt key of a part': (
        'datasets.train.datasets.rain.use_hflp',
        True,
        "datasets.train: datasets, rain: unknown key 'use_hflp'",
    ),
    'sampling': ('datasets.train.sampling', 'unifrm', 'datasets.train: sampling must be concat, uniform or weights'),
    'degradation': (
        'datasets.train.datasets.noise.degradations',
        {'noise': {'sgima': 3}},
        'datasets.train: .*noise.*sgima',
    ),
    'choice': ('network_g.insertion', 'mix', "network_g: insertion: must be one of .*, got 'mix'"),
    'no list': ('network_g.num_blocks', 4, 'network_g.num_blocks: expected list of int, got 4'),
    'short list': ('network_g.d_inner', [8], r'network_g: d_inner: \[8\] has 1 entries'),
    'no number': ('network_g.dim', 'wide', "network_g.dim: expected int, got 'wide'"),
    'too few images': (
        'datasets.train.batch_size_per_gpu',
        9,
        'datasets.train: 8 items times dataset_enlarge_ratio 1,',
    ),
    'norm': ('train.grad_clip_norm', 'x', "train.grad_clip_norm: expected number >= 0 or ~, got 'x'"),
    'no extractor': (
        'path.pretrain_network_e',
        None,
        r'path.pretrain_network_e: missing\. .*train_degradation_extractor',
    ),
    'wrong extractor': ('path.pretrain_network_e', 'whole.pth', 'path.pretrain_network_e: .*whole.pth'),
    'wrong checkpoint': (
        'path.pretrain_network_g',
        'stage_1.pth',
        'path.pretrain_network_g: .*stage_1.pth: does not fit DPMambaIR: [0-9]+ missing in the file',
    ),
    'other network': (
        'path.pretrain_network_g',
        'other.pth',
        r'path.pretrain_network_g: .*other.pth: its network_g has dim 12 \(options: 8\), '
        r'num_refinement_blocks 0 \(options: 1\); does not fit',
    ),
    'a crop that cannot be halved': (
        'datasets.train.gt_size',
        20,
        'datasets.train.gt_size: 20 is not a multiple of 8: DPMambaIR would pad each crop at scale 1',
    ),
    'a tile that is smaller than the stride': (
        'val.tile',
        5,
        'val.tile: 5 is less than 8, the minimum of DPMambaIR',
    ),
    'truncated': ('path.pretrain_network_g', 'cut.pth', 'path.pretrain_network_g: .*cut.pth'),
    'two extractors': (
        'path.pretrain_network_g',
        'whole.pth',
        'path.pretrain_network_e: .*whole.pth includes its own extractor; write ~',
    ),
    'no such weights': (
        'train.lpips_opt',
        {'type': 'LPIPSLoss', 'weights': '/no.pth'},
        'train.lpips_opt: .*/no.pth does not exist',
    ),
    'no parts': (
        'train.ffl_opt',
        {'type': 'FocalFrequencyLoss', 'patch_factor': 0},
        'train.ffl_opt: patch_factor must be at least 1, got 0',
    ),
    'crops that cannot be divided into parts': (
        'train.ffl_opt',
        {'type': 'FocalFrequencyLoss', 'patch_factor': 3},
        'train.ffl_opt: FocalFrequencyLoss needs crops of a multiple of 3, and datasets.train has 16',
    ),
    'a loss with the name of another': (
        'train.pix_opt',
        {'type': 'L1Loss'},
        'train.pix_opt: logged as l_pix, as train.pixel_opt is; rename it',
    ),
    'no VGG weights': (
        'train.perceptual_opt',
        {'type': 'VGGPerceptualLoss', 'layer_weights': {'conv1_2': 1.0}, 'weights': '/no.pth'},
        'train.perceptual_opt: .*there is no /no.pth',
    ),
    'weight': (
        'train.fft_opt',
        {'type': 'FFTLoss', 'loss_weight': 'x'},
        "train.fft_opt.loss_weight: expected number, got 'x'",
    ),
}


@pytest.mark.parametrize('mistake', FOUND_IN_A_DRY_RUN)
def test_errors_at_construction_are_found_in_the_dry_run(ours, checkpoints, mistake):
    path, value, message = FOUND_IN_A_DRY_RUN[mistake]
    change(ours, path, str(checkpoints / value) if str(value).endswith('.pth') else value)
    (problem,) = check_options(ours)
    assert re.match(message, problem), problem
    assert '\n' not in problem


def test_images_without_partners_are_found_up_front(ours, images, tmp_path):
    shutil.copytree(images['dataroot_gt'], tmp_path / 'lq')
    (tmp_path / 'lq' / '0.png').unlink()
    ours['datasets']['train']['datasets']['rain']['dataroot_lq'] = str(tmp_path / 'lq')
    (problem,) = check_options(ours)
    assert re.match('datasets.train: images do not pair', problem) and '0.png' in problem


def test_scales_must_agree(ours):
    ours['network_g'] = {'type': 'VmambaIR', 'dim': 8, 'num_blocks': [1, 1, 1, 1], 'scale': 2}
    del ours['path']['pretrain_network_e']
    assert check_options(ours) == ['network_g.scale: 2, but scale is 1']


def test_the_dry_run_builds_our_parts_for_models_of_basicsr_too(ours):
    ours['model_type'] = 'SRModel'
    ours['network_g']['insertion'] = 'mix'
    ours['datasets']['train']['sampling'] = 'unifrm'
    network, dataset = check_options(ours)
    assert network.startswith('network_g: insertion') and dataset.startswith('datasets.train: sampling')


def test_progressive_works_with_any_model_including_basicsrs_own(ours):
    phases = {'gt_sizes': [8, 16], 'batch_sizes': [2, 1], 'iters': [5, 5]}
    ours['datasets']['train']['progressive'] = phases
    for model in ('RestorationModel', 'SRModel'):
        assert check_options(ours | {'model_type': model}) == []


def test_checking_does_not_open_the_log(ours, monkeypatch):
    """If BasicSR's log were opened here, it would have no file."""
    monkeypatch.setattr('basicsr.utils.logger.initialized_logger', {})
    assert check_options(ours) == []
    assert sys.modules['basicsr.utils.logger'].initialized_logger == {}


def test_a_checkpoint_in_the_folder_that_is_renamed_is_refused(ours, tmp_path, checkpoints):
    (tmp_path / 'models').mkdir()
    file = shutil.copy(checkpoints / 'whole.pth', tmp_path / 'models')
    ours['path'] |= {'experiments_root': str(tmp_path), 'pretrain_network_g': str(file), 'pretrain_network_e': None}
    (problem,) = check_options(ours)
    assert 'in the folder of this run, which is renamed' in problem
    ours['path']['experiments_root'] = str(tmp_path / 'other')
    assert check_options(ours) == []


def test_only_a_folder_of_a_run_may_be_renamed(tmp_path):
    opt = {'is_train': True, 'path': {'experiments_root': str(tmp_path / 'root')}}
    assert check_root(opt, opt['path']) == []
    (tmp_path / 'root').mkdir()
    assert check_root(opt, opt['path']) == []
    (tmp_path / 'root' / 'mine.yml').write_text('x: 1')
    (problem,) = check_root(opt, opt['path'])
    assert problem.startswith('path.experiments_root: ') and 'files that do not belong to a run' in problem
    assert check_root(opt, {}) == []  # BasicSR's default location
    (tmp_path / 'root' / 'copy.yml').write_text('# GENERATE TIME: now\n')
    assert check_root(opt, opt['path']) == []
    (tmp_path / 'root' / 'copy.yml').unlink()
    (tmp_path / 'root' / 'training_states').mkdir()
    assert check_root(opt, opt['path']) == []
