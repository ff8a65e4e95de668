"""Which patches of BasicSR are needed: each patch's regression test passes with it and fails without it.

If the original passes, this is reported as a failure, XPASS(strict): this BasicSR does not need that patch. Each
regression is a minimal example of the defect; whole trainings are in the tests of their topics.
"""

import io
import os
import pkgutil
import queue
import random
import re
import resource
import socket
import sys
import time

import basicsr.data
import basicsr.train
import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.data import degradations
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.data.prefetch_dataloader import PrefetchGenerator
from basicsr.metrics import calculate_niqe, calculate_ssim, psnr_ssim
from basicsr.models.base_model import BaseModel
from basicsr.utils.file_client import HardDiskBackend
from support.commands import stock_options, write_images, write_options

from dpmambair_basicsr import patches
from dpmambair_basicsr.data.item_seeds import seed_generators
from dpmambair_basicsr.files import lock
from dpmambair_basicsr.patches import apply, resume
from dpmambair_basicsr.patches.registry import PATCHES
from dpmambair_basicsr.training import output, signals
from dpmambair_basicsr.training import run as training_run

apply.load_topics()
GATE = 'models_of_ours'  # only decides when patches are applied; fixes nothing
REGRESSIONS = {}


def regression(check):
    REGRESSIONS[check.__name__] = check
    return check


@pytest.fixture
def function(request, monkeypatch):
    """The patched function or its original, in its place in BasicSR; all other patches are applied."""
    patch, which = request.param
    owner, attribute = next((owner, attribute) for owner, attribute, make in PATCHES if make.__name__ == patch)
    apply.apply_patches()
    owner = pkgutil.resolve_name(owner)
    patched = getattr(owner, attribute)
    function = patched if which == 'patched' else patched.__wrapped__
    monkeypatch.setattr(owner, attribute, function)
    return function


@pytest.fixture(autouse=True)
def afterwards(monkeypatch):
    monkeypatch.setattr(training_run, 'current', None)
    yield
    signals.stop_listening()
    output.release_output()
    lock.release()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def cases():
    without = pytest.mark.xfail(strict=True, reason='the defect of BasicSR', raises=BaseException)
    for name in REGRESSIONS:
        for which in ('patched', 'original'):
            yield pytest.param((name, which), name, id=f'{name}-{which}', marks=without if which == 'original' else ())


def model(tmp_path, kind=BaseModel, **attributes):
    """A BasicSR model without a network."""
    self = kind.__new__(kind)
    self.opt = {'dist': False, 'rank': 0, 'val': None, 'path': {'models': tmp_path, 'training_states': tmp_path}}
    self.device, self.optimizers, self.schedulers = torch.device('cpu'), [], []
    vars(self).update(attributes)
    return self


def process_group(monkeypatch) -> dict[str, str]:
    """The environment of a training with one process."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    environment = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': port}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


class Draws(torch.utils.data.Dataset):
    """Four items that show the state of the random generator that datasets use."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return random.random(), np.random.rand()


def sampled(seed: int, **options) -> list:
    """An epoch of `Draws` from BasicSR's loader and sampler."""
    dataset = Draws()
    opt = {'phase': 'train', 'batch_size_per_gpu': 1, 'num_worker_per_gpu': 0} | options
    sampler = EnlargedSampler(dataset, 1, 0)
    return [
        tensor.item()
        for item in basicsr.data.build_dataloader(dataset, opt, 0, sampler=sampler, seed=seed)
        for tensor in item
    ]


@regression
def options_that_name_ours(parse_options, tmp_path, monkeypatch):
    opt = stock_options(write_images(tmp_path / 'images')) | {'model_type': 'RestorationModel'}
    opt['train']['toatl_iter'] = opt['train']['total_iter']
    monkeypatch.setattr('sys.argv', ['train', '-opt', str(write_options(opt, tmp_path / 'x.yml'))])
    with pytest.raises(SystemExit, match='toatl_iter'):
        parse_options(str(tmp_path))


@regression
def safe_yaml(ordered_yaml, tmp_path, monkeypatch):
    text = f'!!python/object/apply:os.mkdir ["{tmp_path}/made"]'
    with pytest.raises(yaml.YAMLError):
        yaml.load(text, Loader=ordered_yaml()[0])
    assert not (tmp_path / 'made').exists()


@regression
def whole_copy(copy_opt_file, tmp_path, monkeypatch):
    """Not text: what the file holds."""
    (tmp_path / 'x.yml').write_bytes('name: é\r\n'.encode())
    (tmp_path / 'run').mkdir()
    copy_opt_file(str(tmp_path / 'x.yml'), str(tmp_path / 'run'))
    assert (tmp_path / 'run/x.yml').read_bytes().endswith('\nname: é\r\n'.encode())


@regression
def forced_value(postprocess_yml_value, tmp_path, monkeypatch):
    assert postprocess_yml_value('-1') == -1 and postprocess_yml_value('1e-4') == 1e-4


@regression
def one_test_at_a_time(make_exp_dirs, tmp_path, monkeypatch):
    paths = {'results_root': str(tmp_path / 'results')}
    make_exp_dirs({'is_train': False, 'rank': 0, 'dist': False, 'path': paths})
    assert lock.held


@regression
@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def init_dist_anywhere(init_dist_pytorch, tmp_path, monkeypatch):
    process_group(monkeypatch)
    init_dist_pytorch('nccl')
    assert torch.distributed.get_backend() == 'gloo'


@regression
def init_dist_slurm_without_shell(init_dist_slurm, tmp_path, monkeypatch):
    (tmp_path / 'scontrol').write_text('#!/bin/sh\necho localhost\n')
    (tmp_path / 'scontrol').chmod(0o755)
    port = process_group(monkeypatch)['MASTER_PORT']
    names = {'SLURM_NODELIST': f'n1; touch {tmp_path}/injected', 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}
    for name, value in (names | {'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'}).items():
        monkeypatch.setenv(name, value)
    init_dist_slurm('nccl', port=int(port))
    assert not (tmp_path / 'injected').exists()


@regression
def model_to_any_device(model_to_device, tmp_path, monkeypatch):
    process_group(monkeypatch)
    torch.distributed.init_process_group('gloo')
    self = model(tmp_path)
    self.opt |= {'dist': True, 'num_gpu': 0}
    assert isinstance(model_to_device(self, torch.nn.Linear(1, 1)), torch.nn.parallel.DistributedDataParallel)


@regression
def any_optimizer(get_optimizer, tmp_path, monkeypatch):
    optimizer = get_optimizer(model(tmp_path), 'AdamW', [torch.nn.Parameter(torch.ones(1))], 0.1)
    assert type(optimizer) is torch.optim.AdamW


@regression
def fresh_worker_seeds(worker_init_fn, tmp_path, monkeypatch):
    opt = {'phase': 'train', 'batch_size_per_gpu': 1, 'num_worker_per_gpu': 1}
    loader = basicsr.data.build_dataloader(Draws(), opt, num_gpu=0, seed=0)
    first, second = ([number.item() for item in loader for number in item] for _ in range(2))
    assert first != second


@regression
def pass_on_errors(run, tmp_path, monkeypatch):
    thread = PrefetchGenerator.__new__(PrefetchGenerator)
    thread.queue, thread.generator = queue.Queue(), (1 // 0 for _ in range(1))
    run(thread)
    assert isinstance(thread.queue.get_nowait(), ZeroDivisionError)


@regression
def raise_errors(next_item, tmp_path, monkeypatch):
    thread = PrefetchGenerator.__new__(PrefetchGenerator)
    thread.queue = queue.Queue()
    thread.queue.put(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        next_item(thread)


@regression
def integer_jpeg_quality(add_jpg_compression, tmp_path, monkeypatch):
    assert degradations.random_add_jpg_compression(np.zeros((16, 16, 3), np.float32), (30.2, 95.7)).shape == (16, 16, 3)


@regression
def niqe_large_enough(niqe, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='two blocks of 96 x 96 pixels'):
        calculate_niqe(np.random.default_rng(0).integers(0, 256, (96, 190, 3), np.uint8), crop_border=0)


@regression
def datasets_of_ours(build_dataset, tmp_path, monkeypatch):
    images = write_images(tmp_path / 'images')
    (tmp_path / 'list.txt').write_text('../outside.png\n')
    opt = {'name': 'x', 'type': 'PairedImageDataset', 'phase': 'train', 'scale': 4, 'io_backend': {'type': 'disk'}}
    with pytest.raises(ValueError, match='outside.png is outside of'):
        build_dataset(opt | images | {'meta_info_file': str(tmp_path / 'list.txt')})


@regression
def separable_ssim(ssim, tmp_path, monkeypatch):
    """Without the two-dimensional window."""
    first, second = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    monkeypatch.setattr(psnr_ssim.cv2, 'filter2D', None)
    assert calculate_ssim(first, first, crop_border=0) == 1 > calculate_ssim(first, second, crop_border=0)


@regression
def whole_networks(save_network, tmp_path, monkeypatch):
    net = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(net.weight, float('nan'))
    with pytest.raises(FloatingPointError):
        save_network(model(tmp_path), net, 'net_g', 1)
    assert not list(tmp_path.iterdir())


@regression
def whole_states(save_training_state, tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # between attempts
    self = model(tmp_path)
    self.opt['path']['training_states'] = tmp_path / 'not there'
    with pytest.raises(OSError, match='1.state cannot be saved'):
        save_training_state(self, 0, 1)


@regression
def state_after_validation(validation, tmp_path, monkeypatch):
    validates = type('Validates', (BaseModel,), {'nondist_validation': lambda *arguments: None})
    training_run.current = training_run.TrainingRun(seed=0, items_per_iteration=1, sets_to_validate=1)
    validation(model(tmp_path, validates), [], 5, None)
    assert (tmp_path / '5.state').is_file()


@regression
def finite_best(update_best_metric_result, tmp_path, monkeypatch):
    best = {'set': {'psnr': {'better': 'higher', 'val': 30.0, 'iter': 1}}}
    update_best_metric_result(model(tmp_path, best_metric_results=best), 'set', 'psnr', float('inf'), 2)
    assert best['set']['psnr']['val'] == 30


@regression
def exact_continuation(resume_training, tmp_path, monkeypatch):
    best = {'set': {'psnr': {'better': 'higher', 'val': 30.0, 'iter': 1}}}
    exact = {'seed': 0, 'items': 0, 'best': best, 'validated': True, 'scaler': {}, 'pool': {}}
    self = model(tmp_path)
    resume_training(self, {'epoch': 0, 'iter': 1, 'optimizers': [], 'schedulers': [], 'exact': exact})
    assert self.best_metric_results == best


@regression
def known_run(build_dataloader, tmp_path, monkeypatch):
    """An item is the same whatever was drawn before it."""
    seed_generators(1)
    first = sampled(seed=0)
    seed_generators(2)
    assert sampled(seed=0) == first != sampled(seed=1)


@regression
def known_epoch(set_epoch, tmp_path, monkeypatch):
    sampler = EnlargedSampler(Draws(), 1, 0)
    sampler.run = training_run.TrainingRun(seed=0, items_per_iteration=1)
    set_epoch(sampler, 3)
    assert sampler.run.epoch == 3


@regression
def seeded_order(indices, tmp_path, monkeypatch):
    """Items that an interrupted epoch has used are left out."""
    sampler = EnlargedSampler(Draws(), 1, 0)
    whole = list(indices(sampler))
    sampler.run = training_run.TrainingRun(seed=0, items_per_iteration=1)
    sampler.run.resume(iteration=3, epoch=0, items=3, seed=0)
    assert list(indices(sampler)) == whole[3:]


@regression
def begin_iteration(update_learning_rate, tmp_path, monkeypatch):
    """An iteration has its own random numbers, whatever was drawn before it."""
    training_run.current = training_run.TrainingRun(seed=0, items_per_iteration=1)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        update_learning_rate(model(tmp_path), 5)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


@regression
def header_first(imfrombytes, tmp_path, monkeypatch):
    monkeypatch.setenv('DPMAMBAIR_MAX_PIXELS', '1000')
    content = cv2.imencode('.png', np.zeros((40, 30, 3), np.uint8))[1].tobytes()
    with pytest.raises(ValueError, match='30 x 40 pixels'):
        imfrombytes(content)


@regression
def whole_images(imwrite, tmp_path, monkeypatch):
    (tmp_path / 'image.png').write_bytes(b'whole')
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError):
            imwrite(image, str(tmp_path / 'image.png'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / 'image.png').read_bytes() == b'whole' and len(list(tmp_path.iterdir())) == 1


@regression
def regular_files(get, tmp_path, monkeypatch):
    with pytest.raises((OSError, ValueError), match='/dev/null'):
        get(HardDiskBackend(), '/dev/null')


@regression
def plots_that_end_no_training(init_tb_logger, tmp_path, monkeypatch):
    (tmp_path / 'a file').touch()
    init_tb_logger(str(tmp_path / 'a file' / 'logs')).add_scalar('loss', 1, 1)


@regression
def wandb_that_ends_no_training(init_wandb_logger, tmp_path, monkeypatch):
    (tmp_path / 'wandb.py').write_text(
        'class util:\n    generate_id = str\n\ndef init(**_):\n    raise OSError(28, "No space left on device")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    init_wandb_logger({'name': 'run', 'logger': {'wandb': {'project': 'project'}}})


@regression
def log_file_that_may_be_full(get_root_logger, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    logger = get_root_logger(str(tmp_path), log_file='/dev/full')
    for line in range(2):
        logger.info(line)
    assert 'Traceback' not in sys.stderr.getvalue()


@regression
def log_says_what_is_not_done(dict2str, tmp_path, monkeypatch):
    opt = {'is_train': False, 'name': 'test', 'num_gpu': 0, 'dist': False, 'datasets': {}, 'path': {}}
    assert 'random weights' in dict2str(opt)


@pytest.mark.parametrize(('function', 'name'), cases(), indirect=['function'])
def test_a_patch_is_needed_and_works(function, name, tmp_path, monkeypatch):
    for mark in getattr(REGRESSIONS[name], 'pytestmark', ()):
        if mark.name == 'skipif' and mark.args[0]:
            pytest.skip(mark.kwargs['reason'])
    REGRESSIONS[name](function, tmp_path, monkeypatch)


def test_every_patch_says_what_it_fixes_and_when_it_can_go():
    for _, _, make in PATCHES:
        if make.__module__ != apply.__name__:
            first, *rest = make.__doc__.splitlines()
            assert first.endswith('.'), make
            assert [line.partition(':')[0].strip() for line in rest if re.match(' *(Fixes|Remove once): ', line)] == [
                'Fixes',
                'Remove once',
            ], make
            assert not re.search(r'\.py:\d', make.__doc__), f'{make}: a line number'


def test_the_topics_are_listed():
    listed = re.findall(r'^    (\w+) ', patches.__doc__, re.M)
    assert sorted(listed) == sorted([*apply.TOPICS, 'imports'])


def test_every_patch_has_a_regression():
    assert {make.__name__ for _, _, make in PATCHES} == set(REGRESSIONS) | {GATE}


@pytest.mark.parametrize('which', ['patched', pytest.param('original', marks=pytest.mark.xfail(strict=True))])
@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_resuming_needs_no_gpu(which, tmp_path):
    """`load_resume_state` and `whole_epochs` replace functions in train.py once the options have been read."""
    state = {'epoch': 0, 'iter': 2, 'optimizers': [], 'schedulers': []}
    torch.save(state, tmp_path / '2.state')
    opt = {'auto_resume': False, 'path': {'resume_state': str(tmp_path / '2.state'), 'models': str(tmp_path)}}
    load = resume.load_resume_state if which == 'patched' else basicsr.train.load_resume_state
    assert load(opt) == state
