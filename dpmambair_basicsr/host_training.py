"""Mends of BasicSR's training: nothing is lost when it is interrupted, and a resumed training goes on exactly.

Like `host.py`, of which this is the second part: one function per mend, with what is broken where in BasicSR 1.4.2.
What the mends share is in `training_run`, `interruption` and `models/training_state`.
"""

import math
import signal

import torch
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only

from dpmambair_basicsr import interruption, training_run
from dpmambair_basicsr.data.image_files import check_inside
from dpmambair_basicsr.data.item_seeds import SeededIndex, SeededItems, seed_generators
from dpmambair_basicsr.data.progressive import accompany
from dpmambair_basicsr.models.training_state import keep_schedule, restore, write_network, write_state
from dpmambair_basicsr.patching import replaces

BASE_MODEL = 'basicsr.models.base_model:BaseModel'


@replaces(BASE_MODEL, 'save_network')
def whole_networks(original):
    """A network that cannot be written is left half written under its name, and ignored; models/base_model.py:222.

    Training ends with exit status 0, and `--auto_resume` fails. Networks of NaN are written too. Can go when BasicSR
    renames complete files, and raises.
    """

    @master_only
    def save_network(self, net, net_label, current_iter, param_key='params'):
        nets, keys = net if isinstance(net, list) else [net], param_key if isinstance(param_key, list) else [param_key]
        write_network(self, nets, net_label, current_iter, keys)

    return save_network


@replaces(BASE_MODEL, 'save_training_state')
def whole_states(original):
    """As `whole_networks`, models/base_model.py:326; and the state lacks what an exact continuation needs.

    It is saved before the validation of the same iteration, whose best metrics are missing in it: if one is due, the
    state says so, and is written once more when that is done. Can go when BasicSR does so.
    """

    def save_training_state(self, epoch, current_iter):
        run, val = training_run.current, self.opt.get('val')
        if current_iter == -1:  # the end of training
            interruption.stop_listening()
            training_run.current = None
            if interruption.received:
                raise SystemExit(128 + interruption.received)
        else:
            if run is not None:
                run.sets_to_validate = len(run.val_loaders) if val and current_iter % val['val_freq'] == 0 else 0
            write_state(self, epoch, current_iter)

    return save_training_state


@replaces(BASE_MODEL, 'validation')
def state_after_validation(original):
    """Other half of `whole_states`."""

    def validation(self, dataloader, current_iter, tb_logger, save_img=False):
        original(self, dataloader, current_iter, tb_logger, save_img)
        run = training_run.current
        if run is not None and run.sets_to_validate:
            run.sets_to_validate -= 1
            if run.sets_to_validate == 0:
                write_state(self, run.epoch, current_iter)

    return validation


@replaces(BASE_MODEL, '_update_best_metric_result')
def finite_best(original):
    """Infinity, the PSNR of equal images, is the best for ever; models/base_model.py:65. Can go when it is not."""

    def update_best_metric_result(self, dataset_name, metric, val, current_iter):
        if math.isfinite(val):
            original(self, dataset_name, metric, val, current_iter)

    return update_best_metric_result


@replaces(BASE_MODEL, 'resume_training')
def exact_continuation(original):
    """A resumed training repeats its epoch with other random numbers, and forgets the best; models/base_model.py:340.

    And its schedulers take no notice of the options: with a longer `total_iter`, CosineAnnealingRestartLR ends with a
    TypeError however long `periods` are. Can go when BasicSR's states hold what `models/training_state.py` puts into
    them, and not the options of schedulers.
    """

    def resume_training(self, resume_state):
        schedules = [dict(vars(scheduler)) for scheduler in self.schedulers]
        original(self, resume_state)
        for scheduler, schedule in zip(self.schedulers, schedules, strict=True):
            keep_schedule(scheduler, schedule)
        restore(self, resume_state)

    return resume_training


@replaces(BASE_MODEL, 'update_learning_rate')
def begin_iteration(original):
    """SIGTERM and Ctrl-C lose what was done since the last checkpoint; train.py:155, whose loop asks for nothing.

    Its first call of an iteration is this one. So here it ends if it has to, and otherwise each iteration gets random
    numbers of its own: the state of a generator would not do, a loader draws from it whenever it is started. Can go
    when BasicSR saves on signals, and seeds.
    """

    def update_learning_rate(self, current_iter, warmup_iter=-1):
        run = training_run.current
        if run is not None:
            interruption.listen()
            number = interruption.requested(self.device, self.opt['dist'])
            if number:
                end_after(self, current_iter - 1, number)
            if run.validation_is_missing:
                run.validation_is_missing = False
                run.sets_to_validate = len(run.val_loaders)
                for loader in run.val_loaders:
                    self.validation(loader, current_iter - 1, None, self.opt['val']['save_img'])
            run.iteration = current_iter
            seed_generators('iteration', run.seed, self.opt['rank'], current_iter)
        original(self, current_iter, warmup_iter)

    return update_learning_rate


def check_processes_agree(**facts: int) -> None:
    """Raises ValueError, in each process, naming a fact that is not the same in all: nodes that see other files."""
    of_all = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, facts)
    for name in facts:
        values = [of_one[name] for of_one in of_all]
        if len(set(values)) > 1:
            fact, values = name.replace('_', ' '), ', '.join(map(str, values))
            raise ValueError(f'The processes do not agree on {fact}: {values}. All of them have to see the same files')


def end_after(model, iteration: int, number: int) -> None:
    """Saves the checkpoint of an iteration, if it is not there, and raises SystemExit as the shell expects it."""
    run = training_run.current
    if run.saved != iteration:
        model.save(run.epoch, iteration)
    name = signal.Signals(number).name
    get_root_logger().info(f'{name}: training ends after iteration {iteration}, which is saved; --auto_resume goes on.')
    interruption.stop_listening()
    raise SystemExit(128 + number)


@replaces('basicsr.data', 'build_dataset')
def paths_inside_their_folder(original):
    """A list of images (meta_info) can name any file of the machine; data/data_util.py:189, realesrgan_dataset.py:58.

    Our data sets check it themselves. Can go when BasicSR's do.
    """

    def build_dataset(dataset_opt):
        dataset = original(dataset_opt)
        on_disk = (dataset_opt.get('io_backend') or {}).get('type', 'disk') == 'disk'
        if on_disk and type(dataset).__module__.startswith('basicsr.'):
            only = 'gt' if 'dataroot_gt' in dataset_opt else 'lq'  # whose paths are not named
            for role in ('lq', 'gt'):
                folder = dataset_opt.get(f'dataroot_{role}')
                paths = [
                    path.get(f'{role}_path') if isinstance(path, dict) else path
                    for path in getattr(dataset, 'paths', ())
                    if isinstance(path, dict) or role == only
                ]
                if isinstance(folder, str):
                    check_inside(folder, filter(None, paths))
        return dataset

    return build_dataset


@replaces('basicsr.data', 'build_dataloader')
def known_run(original):
    """An item's randomness depends on what was loaded before it, and by which worker; data/__init__.py:97.

    Here the sampler learns the seed, which is the same in all processes, and what loads items obeys it. Can go when
    BasicSR seeds each item.
    """

    def build_dataloader(dataset, dataset_opt, num_gpu=1, dist=False, sampler=None, seed=None):
        if dataset_opt['phase'] == 'train' and not hasattr(dataset, '__getitems__'):
            dataset = SeededItems(dataset)
        loader = original(dataset, dataset_opt, num_gpu=num_gpu, dist=dist, sampler=sampler, seed=seed)
        if isinstance(sampler, EnlargedSampler):
            seeds = [seed]
            if dist:  # each process has drawn one of its own where manual_seed is not given
                torch.distributed.broadcast_object_list(seeds, src=0)
            run = training_run.TrainingRun(seeds[0], loader.batch_size * sampler.num_replicas)
            sampler.run = training_run.current = run
            interruption.received = 0
            if dataset_opt.get('prefetch_mode') == 'cpu' and loader.num_workers == 0:
                get_root_logger().warning(
                    'prefetch_mode cpu without workers: images are loaded beside the training and share its random '
                    'numbers, so that two runs differ. With num_worker_per_gpu: 1 they are equal.'
                )
        return loader

    return build_dataloader


@replaces('basicsr.data.data_sampler:EnlargedSampler', 'set_epoch')
def known_epoch(original):
    """The loop's epochs are known to the sampler alone; data/data_sampler.py:47. See `seeded_order`."""

    def set_epoch(self, epoch):
        original(self, epoch)
        if hasattr(self, 'run'):
            self.run.begin_epoch(epoch)

    return set_epoch


@replaces('basicsr.data.data_sampler:EnlargedSampler', '__iter__')
def seeded_order(original):
    """An interrupted epoch is begun anew after `--auto_resume`, train.py:143: its first images are seen twice.

    Here the sampler leaves out what was used, and tells more than indices: the seed of each item, and for progressive
    training its place. Can go when BasicSR's sampler has a state.
    """

    def indices(self):
        order = list(original(self))
        if hasattr(self, 'run'):
            seed, processes = self.run.seed, self.num_replicas
            order = [
                SeededIndex(index, 'item', seed, self.epoch, place * processes + self.rank)
                for place, index in enumerate(order)
            ]
            order = order[-(-self.run.items_used_before(self.epoch) // processes) :]
        return accompany(self.dataset, order, done=self.run.iteration if hasattr(self, 'run') else 0)

    return indices
