"""Progressive training in BasicSR's own loop: each iteration has its phase's crop and batch size, and loads no more."""

import random
import re
import runpy

import pytest
import torch
import yaml
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from support import pipelines
from support.commands import warm_python

from dpmambair_basicsr.data.progressive import Phases
from dpmambair_basicsr.models import RestorationModel

PHASES = {'gt_sizes': [8, 16, 24, 32], 'batch_sizes': [4, 3, 2, 1], 'iters': [3, 4, 3, 2]}
SCHEDULE = [(8, 4)] * 3 + [(16, 3)] * 4 + [(24, 2)] * 3 + [(32, 1)] * 4  # the last phase continues: 14 iterations
OPTIONS = """
name: progressive
model_type: TracingModel
scale: 1
num_gpu: 0
manual_seed: 0
datasets:
  train:
    name: tiny
    type: PairedDegradationDataset
    gt_size: 32
    use_hflip: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 4
    prefetch_mode: ~
    persistent_workers: false
network_g: {type: VmambaIR, dim: 4, num_blocks: [1, 1, 1, 1], num_refinement_blocks: 1, d_state: 2}
path: {resume_state: ~}
train:
  optim_g: {type: AdamW, lr: 1.0e-3}
  scheduler: {type: CosineAnnealingRestartCyclicLR, periods: [3, 9], restart_weights: [1, 1], eta_mins: [0.001, 0.0]}
  total_iter: 14
  pixel_opt: {type: L1Loss}
logger: {print_freq: 1, save_checkpoint_freq: 5, use_tb_logger: false}
"""


OWN_LOOP = """
import sys
import torch
import yaml
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.models import build_model

def train():
    opt = yaml.safe_load(open('options.yml'))
    dataset = build_dataset(opt['datasets']['train'])
    sampler = EnlargedSampler(dataset, 1, 0)
    loader = build_dataloader(dataset, opt['datasets']['train'], num_gpu=0, sampler=sampler, seed=0)
    done, epoch = 0, 0
    if len(sys.argv) > 1:
        state = torch.load(f'training_states/{sys.argv[1]}.state')
        done, epoch = state['iter'], state['epoch']
        opt['path']['pretrain_network_g'] = f'models/net_g_{done}.pth'
    model = build_model(opt)
    if done:
        model.resume_training(state)
    while done < 14:
        sampler.set_epoch(epoch)
        for batch in loader:
            done += 1
            if done > 14:
                break
            model.update_learning_rate(done, warmup_iter=-1)
            model.feed_data(batch)
            print('TRACE', done, batch['gt'].shape[2], batch['gt'].shape[0])
            model.optimize_parameters(done)
            if done == 5:
                model.save(epoch, done)
        epoch += 1
"""


@MODEL_REGISTRY.register()
class TracingModel(RestorationModel):
    """Records (iteration, crop size, batch size)."""

    trace = []

    def optimize_parameters(self, current_iter):
        assert self.gt.shape == self.lq.shape and self.gt.shape[2] == self.gt.shape[3]
        self.trace.append((current_iter, self.gt.shape[2], self.gt.shape[0]))
        super().optimize_parameters(current_iter)


@MODEL_REGISTRY.register()
class SilentModel(SRModel):
    """BasicSR's own."""

    def optimize_parameters(self, current_iter):
        TracingModel.trace.append((current_iter, self.gt.shape[2], self.gt.shape[0]))
        super().optimize_parameters(current_iter)


@pytest.fixture
def options(tmp_path):
    """Options with eight pairs: two iterations per epoch."""
    opt = yaml.safe_load(OPTIONS)
    pairs = pipelines.write_pairs(tmp_path / 'pairs', [(40, 36)] * 8)
    opt['datasets']['train'] |= pairs | {'progressive': PHASES}
    return opt


def train(opt, folder, *arguments):
    """Returns the trace and the log."""
    (folder / 'progressive.yml').write_text(yaml.safe_dump(opt))
    TracingModel.trace.clear()
    log = pipelines.train(folder / 'progressive.yml', *arguments, cwd=folder)
    return list(TracingModel.trace), log


def schedule(first, last):
    return [(iteration, *SCHEDULE[iteration - 1]) for iteration in range(first, last + 1)]


def test_phases_count_iterations_from_1():
    phases = Phases(**PHASES)
    assert [phases.at(iteration) for iteration in range(1, 15)] == SCHEDULE


@pytest.mark.parametrize(
    ('workers', 'prefetch', 'persistent'),
    [(0, None, False), (2, None, False), (2, None, True), (2, 'cpu', False)],
)
def test_training_follows_the_schedule_also_after_a_resume(options, tmp_path, workers, prefetch, persistent):
    options['datasets']['train'] |= {
        'num_worker_per_gpu': workers, 'prefetch_mode': prefetch, 'persistent_workers': persistent
    }  # fmt: skip
    trace, _ = train(options, tmp_path)
    assert trace == schedule(1, 14)

    states = tmp_path / 'experiments/progressive/training_states'
    (states / '10.state').unlink()
    assert torch.load(states / '5.state', weights_only=True)['epoch'] == 2, 'iteration 5 is amid an epoch'
    trace, _ = train(options, tmp_path, '--auto_resume')
    assert trace == schedule(6, 14)


@pytest.mark.parametrize(
    ('total', 'message'),
    [
        (14, 'iters sum to 12, train.total_iter is 14: the last phase .gt_size 32, batch size 1. lasts 2 iterations'),
        (8, 'iters sum to 12, train.total_iter is 8: training ends in the phase of gt_size 24, batch size 2'),
        (12, None),
    ],
)
def test_disagreement_with_total_iter_is_reported_at_the_start(options, tmp_path, total, message):
    options['train']['total_iter'] = total
    _, log = train(options, tmp_path)
    before, start, _ = log.partition('Start training from')
    assert start
    assert ('sum to' not in log) if message is None else re.search(message, before)


def test_distributed_training_follows_the_schedule(options, tmp_path):
    """Two processes with a worker each, resumed within an epoch: both follow the schedule, with different images."""
    train_set = options['datasets']['train']
    train_set |= pipelines.write_pairs(tmp_path / 'twelve', [(40, 36)] * 12) | {'batch_size_per_gpu': 3}
    train_set['progressive'] = {'gt_sizes': [8, 32], 'batch_sizes': [3, 1], 'iters': [5, 2]}
    options['logger']['save_checkpoint_freq'] = options['train']['total_iter'] = 3
    train(options, tmp_path)

    # Persistent: BasicSR's distributed training spawns workers, and each takes seconds to import PyTorch.
    train_set |= {'num_worker_per_gpu': 1, 'persistent_workers': True}
    options['model_type'] = 'RestorationModel'
    options['train']['total_iter'] = 7
    (tmp_path / 'progressive.yml').write_text(yaml.safe_dump(options))
    program = """
import os
import sys
import dpmambair_basicsr
from basicsr.train import train_pipeline
dpmambair_basicsr.register()
from dpmambair_basicsr.models import RestorationModel
original = RestorationModel.feed_data
def feed_data(self, data):
    original(self, data)
    images = ','.join(map(os.path.basename, data['gt_path']))
    sys.stdout.write(f'TRACE {self.opt["rank"]} {self.gt.shape[2]} {images}\\n')
RestorationModel.feed_data = feed_data
if __name__ == '__main__':
    train_pipeline('.')
"""
    (tmp_path / 'program.py').write_text(program)
    command = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'program.py')
    result = warm_python(*command, '-opt', 'progressive.yml', '--launcher', 'pytorch', '--auto_resume', cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    traces = [], []
    for rank, size, images in re.findall(r'TRACE (\d) (\d+) (\S+)', result.stdout):
        traces[int(rank)].append((int(size), images.split(',')))
    for trace in traces:
        assert [(size, len(images)) for size, images in trace] == [(8, 3)] * 2 + [(32, 1)] * 2, 'iterations 4 to 7'
    for epoch, number in ((slice(0, 2), 12), (slice(2, 4), 4)):
        images = [image for trace in traces for _, batch in trace[epoch] for image in batch]
        assert len(images) == len(set(images)) == number, 'no image twice in an epoch'


def epochs(dataset_options, count, done=0):
    """The batches of some epochs, as BasicSR's loop loads them when every batch is an iteration."""
    dataset_options = {'phase': 'train', 'scale': 1} | dataset_options
    dataset = build_dataset(dataset_options)
    sampler = EnlargedSampler(dataset, 1, 0)
    loader = build_dataloader(dataset, dataset_options, num_gpu=0, sampler=sampler, seed=0)
    for epoch in range(count):
        sampler.set_epoch(epoch)
        sampler.run.iteration = done
        for batch in loader:
            done += 1
            yield batch


def test_a_loader_that_does_not_know_the_iteration_is_refused(options):
    train_set = {'phase': 'train', 'scale': 1} | options['datasets']['train']
    dataset = build_dataset(train_set)
    for sampler in (None, EnlargedSampler(dataset, 1, 0)):
        with pytest.raises(RuntimeError, match='progressive: the phase follows the training iteration'):
            next(iter(torch.utils.data.DataLoader(dataset, 4, sampler=sampler)))
    with pytest.raises(RuntimeError, match='progressive: the phase follows the training iteration'):
        next(iter(build_dataloader(dataset, train_set, num_gpu=0, sampler=None, seed=0)))


def test_a_programs_own_loop_follows_the_schedule_also_after_a_resume(options, tmp_path):
    """In BasicSR's order: the dataset, its sampler and loader, then the model."""
    options['train'] |= {'total_iter': 14, 'scheduler': {'type': 'MultiStepLR', 'milestones': [10]}}
    options |= {'model_type': 'RestorationModel', 'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1}
    options['datasets']['train'] |= {'phase': 'train', 'scale': 1}
    options['val'] = {'save_img': False}  # when to validate is the program's affair
    options['path'] |= {key: str(tmp_path / key) for key in ('models', 'training_states', 'experiments_root')}
    for folder in ('models', 'training_states'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'options.yml').write_text(yaml.safe_dump(options))
    (tmp_path / 'loop.py').write_text(OWN_LOOP)
    (tmp_path / 'program.py').write_text('import dpmambair_basicsr, loop\nloop.train()\n')
    for arguments, first in ((), 1), (('5',), 6):
        result = warm_python('program.py', *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
        trace = [tuple(map(int, line.split())) for line in re.findall(r'TRACE (.*)', result.stdout)]
        assert trace == schedule(first, 14)


def test_all_images_are_used_although_batches_are_small(options):
    used = set()
    for batch in epochs(options['datasets']['train'], 20, done=11):
        assert batch['gt'].shape == (1, 3, 32, 32)
        used |= set(batch['gt_path'])
    assert len(used) == 8


def test_one_crop_size_per_batch_and_a_position_per_image(options, tmp_path):
    """All images are equal, so equal crops are at equal positions."""
    random.seed(0)
    options['datasets']['train']['use_hflip'] = False
    folder = tmp_path / 'pairs' / 'GT'
    content = (folder / '00.png').read_bytes()
    for path in folder.iterdir():
        path.write_bytes(content)
    batch = next(epochs(options['datasets']['train'], 1))
    assert batch['gt'].shape == (4, 3, 8, 8)
    assert len({tuple(crop.flatten().tolist()) for crop in batch['gt']}) == 4


def test_a_schedule_is_added_to_a_file_that_has_none(options, tmp_path):
    del options['datasets']['train']['progressive']
    added = [f'datasets:train:progressive:{key}={values}' for key, values in PHASES.items()]
    trace, log = train(options, tmp_path, '--force_yml', *added)
    assert trace == schedule(1, 14)
    command = (tmp_path / 'experiments/progressive/progressive.yml').read_text().splitlines()[2]
    assert command.endswith(' '.join(added)), 'as it was typed'


def test_mixed_sets_are_progressive_as_a_whole(options, tmp_path):
    train_set = options['datasets']['train']
    parts = {key: train_set.pop(key) for key in ('dataroot_gt', 'dataroot_lq')}
    train_set |= {'type': 'MixedDegradationDataset', 'datasets': {'rain': parts, 'noise': dict(parts)}}
    batches = list(epochs(train_set, 4))
    assert [batch['gt'].shape for batch in batches[:14]] == [(n, 3, size, size) for size, n in SCHEDULE]
    assert {name for batch in batches for name in batch['degradation']} == {'rain', 'noise'}


def test_without_the_option_nothing_changes(options):
    del options['datasets']['train']['progressive']
    assert [batch['gt'].shape for batch in epochs(options['datasets']['train'], 1)] == [(4, 3, 32, 32)] * 2


def test_basicsrs_own_model_follows_the_schedule_also_after_a_resume(options, tmp_path):
    options['train'] |= {'scheduler': {'type': 'MultiStepLR', 'milestones': [10]}}
    options |= {'model_type': 'SilentModel'}
    trace, _ = train(options, tmp_path)
    assert trace == schedule(1, 14)
    (tmp_path / 'experiments/progressive/training_states/10.state').unlink()
    trace, _ = train(options, tmp_path, '--auto_resume')
    assert trace == schedule(6, 14)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'gt_sizes': [8, 16, 20, 32]}, r'progressive\.gt_sizes: 20 is not a multiple of 8'),
        ({'gt_sizes': [8, 16, 24, 24]}, r'gt_size: 32 is not the largest of progressive\.gt_sizes'),
        ({'batch_sizes': [4, 3, 2]}, r'progressive\.batch_sizes: has 3 entries, gt_sizes has 4'),
        ({'iters': [3, 4, 3, 2, 1]}, r'progressive\.iters: has 5 entries, gt_sizes has 4'),
        ({'batch_sizes': [5, 3, 2, 1]}, r'progressive\.batch_sizes: 5 is more than batch_size_per_gpu 4'),
        ({'iters': [3, 0, 3, 2]}, r'progressive\.iters: expected a list of positive ints'),
        ({'iters': 3}, r'progressive\.iters: expected a list of positive ints'),
        ({'sizes': [1]}, 'progressive: must have the keys gt_sizes, batch_sizes, iters'),
    ],
)
def test_errors_name_the_key(options, change, message):
    train_set = options['datasets']['train'] | {'phase': 'train', 'progressive': PHASES | change}
    with pytest.raises(ValueError, match=message):
        build_dataset(train_set)


def test_crop_size_of_a_sub_dataset_alone_names_the_key(options):
    train_set = options['datasets']['train'] | {'phase': 'train', 'type': 'MixedDegradationDataset'}
    part = {key: train_set.pop(key) for key in ('dataroot_gt', 'dataroot_lq', 'gt_size')}
    with pytest.raises(ValueError, match='^gt_size: missing beside progressive'):
        build_dataset(train_set | {'datasets': {'rain': part}})


def test_gt_sizes_fit_the_network_at_scale_4(options):
    train_set = options['datasets']['train'] | {'phase': 'train', 'scale': 4, 'progressive': PHASES}
    with pytest.raises(ValueError, match=r'8 is not a multiple of 32 \(8 x scale\)'):
        build_dataset(train_set)


def test_one_image_is_decoded_per_used_crop(options):
    """In Restormer: as many as the full batch has."""
    compare = runpy.run_path(str(pipelines.ROOT / 'benchmarks' / 'progressive.py'))['compare']
    rows = compare(options['datasets']['train'] | {'phase': 'train', 'scale': 1}, batches=2)
    assert [row[:2] for row in rows] == list(zip(PHASES['gt_sizes'], PHASES['batch_sizes'], strict=True))
    assert [row[2] for row in rows] == [1.0] * 4
    assert [row[4] for row in rows] == [4 / batch for batch in PHASES['batch_sizes']]
