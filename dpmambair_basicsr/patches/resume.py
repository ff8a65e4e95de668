"""Patches of resuming in BasicSR. Resume is implemented here and in `training/state.restore`, in this order:

1. `load_resume_state` finds the state; BasicSR has the model load the networks of its iteration.
2. `whole_epochs` plans the remaining epochs.
3. `exact_continuation`: the model restores the state. BasicSR restores optimizers and schedulers; then `restore`: best
   metrics, loss scale, pool of training pairs, seed and position in the epoch, so that the sampler skips the items
   already used (`TrainingRun.items_used_before`). Our models then call `BestCheckpoint.resume` for net_g_best.pth.
4. `validate_if_missing` runs a validation missed by the interrupted training, before the next iteration.
"""

import functools
from pathlib import Path

from basicsr.utils import get_root_logger

from dpmambair_basicsr.files.checkpoints import SAFETENSORS, read_checkpoint, read_on_cpu
from dpmambair_basicsr.files.errors import CheckpointError, exit_on_error
from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.training import run as training_run
from dpmambair_basicsr.training.optimizers import check_optimizers
from dpmambair_basicsr.training.state import NETWORK_SUFFIXES, keep_schedule, network_file, restore


def load_resume_state(opt: dict) -> dict | None:
    """Finds the state to resume from, on any device: with `--auto_resume` the newest complete one.

    Fixes: `load_resume_state` of train.py needs a GPU and unpickles anything; `--auto_resume` searches the current
        directory (from another one it restarts at 0), and fails on a truncated file or a name such as `best.state`.
    Remove once: BasicSR searches the experiment's own directory for readable states, with weights_only.

    Raises:
        SystemExit: for what `find_resume_state` raises; BasicSR's loop calls this.
    """
    with exit_on_error():
        return find_resume_state(opt)


def find_resume_state(opt: dict) -> dict | None:
    """The state to resume from by the options; None for a training from the start.

    Raises:
        CheckpointError: if there are states but none is usable, or networks without any state, instead of silently
            starting from 0; or if path.resume_state is not usable.
    """
    from basicsr.utils import check_resume

    if opt['auto_resume']:
        given, file = opt['path'].get('resume_state'), newest_usable_state(opt)
        if given and file is not None and Path(given).resolve() != file.resolve():
            print(f'WARNING: path.resume_state {given} is ignored: --auto_resume takes {file}.', flush=True)
        opt['path']['resume_state'] = None if file is None else str(file)
    file = opt['path'].get('resume_state')
    if not file:
        return None
    try:
        state = read_state(opt, file)
    except CheckpointError as error:
        raise CheckpointError(f'path.resume_state: cannot resume from {error}') from None
    check_resume(opt, state['iter'])
    ignored = opt['path'].get('ignore_resume_networks') or ()
    for network in (key for key in opt if key.startswith('network_') and key not in ignored):
        opt['path'].pop(f'param_key_{network.removeprefix("network_")}', None)  # of the file that it started from
    return state


def newest_usable_state(opt: dict) -> Path | None:
    folder = Path(opt['path']['training_states'])
    files = [file for file in folder.glob('*.state') if file.stem.isdecimal()]
    for file in sorted(files, key=lambda file: int(file.stem), reverse=True):
        try:
            read_state(opt, file)
            return file
        except CheckpointError as error:
            print(f'Cannot resume from {error}. Trying the previous one.', flush=True)
    if files:
        raise CheckpointError(f'{folder}: none of its {len(files)} training states is usable')
    files = [file for suffix in NETWORK_SUFFIXES for file in Path(opt['path']['models']).glob(f'net_g_*{suffix}')]
    networks = {file.stem.rpartition('_')[2] for file in files} - {'best'}
    if 'latest' in networks or len(networks) > 1:  # a single number may belong to an incomplete checkpoint
        raise CheckpointError(
            f'{opt["path"]["models"]} has networks, but {folder} no training state: without --auto_resume, training '
            'starts at iteration 0 and renames the folder of the run'
        )
    if opt.get('rank', 0) == 0:
        print(
            f'WARNING: --auto_resume finds no training state in {folder}: training starts at iteration 0.', flush=True
        )
    return None


def read_state(opt: dict, file) -> dict:
    """A training state, on the CPU; every network of the options must have its checkpoint beside it.

    Raises:
        CheckpointError: naming the state, and what cannot be read.
    """
    state = read_on_cpu(file)
    if not (isinstance(state, dict) and {'epoch', 'iter', 'optimizers', 'schedulers'} <= state.keys()):
        raise CheckpointError(f'{file}: not a training state')
    ignored = opt['path'].get('ignore_resume_networks') or ()
    for network in (key for key in opt if key.startswith('network_') and key not in ignored):
        checkpoint = network_file(opt['path']['models'], f'net_{network.removeprefix("network_")}_{state["iter"]}')
        try:
            (read_checkpoint if checkpoint.suffix == SAFETENSORS else read_on_cpu)(str(checkpoint))
        except CheckpointError as error:
            raise CheckpointError(f'{file}: {error}') from None
    return state


def whole_epochs(original):
    """Plans as many epochs as the remaining iterations need.

    Fixes: `create_train_val_dataloader` counts incomplete batches, but the loader drops them, so training ends early:
        with 13 images in batches of 8 and total_iter 40, after 21. Likewise after `--auto_resume` with larger
        batches.
    Remove once: BasicSR divides by len(train_loader).

    Raises:
        ValueError: if there is not a single batch; BasicSR would end at once, silently.
    """
    if hasattr(original, 'patched_by'):
        return original

    @functools.wraps(original)
    def create_train_val_dataloader(opt, logger):
        from dpmambair_basicsr.option_checks.dry_run import micro_batches, no_batch
        from dpmambair_basicsr.patches.distributed import check_processes_agree

        train = opt['datasets']['train']
        train['accum_iter'] = micro_batches(opt)  # for the loader, which sees only its own section
        if train['accum_iter'] > 1:
            logger.info(
                f'Gradient accumulation: an iteration is a step with {train["accum_iter"]} micro-batches of '
                f'batch_size_per_gpu {train["batch_size_per_gpu"]}.'
            )
        train_loader, train_sampler, val_loaders, planned, total_iters = original(opt, logger)
        per_epoch = len(train_loader)
        if per_epoch == 0:
            ratio = train.get('dataset_enlarge_ratio', 1)
            message = no_batch(len(train_loader.dataset), train_loader.batch_size, ratio, opt['world_size'])
            raise ValueError(f'datasets.train: {message}')
        if training_run.current is not None:
            training_run.current.val_loaders = val_loaders
        state = opt['path'].get('resume_state')
        state = read_on_cpu(state) if state else {'epoch': 0, 'iter': 0}
        if opt['dist']:
            check_processes_agree(items=len(train_loader.dataset), iterations_done=state['iter'])
        total_epochs = state['epoch'] - (state['iter'] - total_iters) // per_epoch
        if total_epochs != planned:
            logger.info(f'Incomplete batches are dropped: {per_epoch} iterations per epoch, {total_epochs} epochs.')
        return train_loader, train_sampler, val_loaders, total_epochs, total_iters

    vars(create_train_val_dataloader)['patched_by'] = __name__
    return create_train_val_dataloader


@replaces('basicsr.models.base_model:BaseModel', 'resume_training')
def exact_continuation(original):
    """Resumes bit-exactly, with the schedules of the options, the best metrics and the position in the epoch.

    Fixes: after `BaseModel.resume_training` the epoch is repeated with other random numbers and the best is forgotten;
        its schedulers ignore changed options: with a longer `total_iter`, CosineAnnealingRestartLR ends with a
        TypeError however long `periods` are.
    Remove once: BasicSR's states include what `training/state.py` adds, and exclude the options of schedulers.

    Raises:
        CheckpointError: naming the file, if the state is of other optimizers.
    """

    def resume_training(self, resume_state):
        schedules = [dict(vars(scheduler)) for scheduler in self.schedulers]
        check_optimizers(self, resume_state)
        original(self, resume_state)
        for scheduler, schedule in zip(self.schedulers, schedules, strict=True):
            keep_schedule(scheduler, schedule)
        restore(self, resume_state)

    return resume_training


def validate_if_missing(model, iteration: int) -> None:
    """Runs the validation of an iteration whose state says that it was due but not done."""
    run = training_run.current
    assert run is not None, 'set by the loader of the patched training loop'
    if run.validation_is_missing:
        run.validation_is_missing = False
        get_root_logger().info(
            f'The training ended before iteration {iteration} was validated; this comes first. '
            'If it ran out of memory there, val.tile reduces the memory use.'
        )
        run.sets_to_validate = len(run.val_loaders)
        for loader in run.val_loaders:
            model.validation(loader, iteration, None, model.opt['val']['save_img'])
