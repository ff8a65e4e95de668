"""Atomic checkpoints: networks, and the training state for bit-exact resume.

The networks of an iteration are written first and its state last, each atomically, so an existing state implies its
networks. `patches/checkpoints` replaces BasicSR's functions by these.

A state is one of BasicSR's, and readable by it, with two additional entries: `trained`, see `training/optimizers`, and
`exact`:
    seed: manual_seed of the run;
    items: number of indices of the interrupted epoch used by all processes together;
    best: BasicSR's best value of each metric, by dataset;
    validated: whether that includes the validation of this iteration, if one was due;
    scaler: state of the loss scaler, if `train.amp` is fp16;
    pool: Real-ESRGAN's pool of training pairs, if the model has one. Those of the other processes are in files
        beside the state, <iteration>.rank<number>.pool, written before it.
"""

import time
from pathlib import Path

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dpmambair_basicsr.files import lock
from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.checkpoints import SAFETENSORS, encode_safetensors, read_checkpoint
from dpmambair_basicsr.training import run as training_run
from dpmambair_basicsr.training.optimizers import describe_optimizers

ATTEMPTS = 3  # as in BasicSR
NETWORK_SUFFIXES = '.pth', SAFETENSORS
POOL = ('queue_lr', 'queue_gt', 'queue_ptr')
# Options of the schedulers, and what these make of them
SCHEDULE = 'periods', 'restart_weights', 'eta_min', 'eta_mins', 'cumulative_period', 'milestones', 'gamma', 'restarts'


def write(content: dict, file: Path) -> None:
    """Atomic torch.save, or safetensors by the file's name.

    Raises:
        OSError: naming the file, if it cannot be written in three attempts.
        LockedFolderError: if another process has taken over the folder of the run, see `files/lock`.
    """
    lock.check()
    encoded = encode_safetensors(str(file), content) if file.suffix == SAFETENSORS else None
    for remaining in reversed(range(ATTEMPTS)):
        try:
            with replacing(file) as part, open(part, 'wb') as stream:
                if encoded is None:
                    torch.save(content, stream)
                else:
                    stream.write(encoded)
            return
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = root_cause(error)
            get_root_logger().warning(f'{file} cannot be saved: {reason}; attempts left: {remaining}')
            if remaining:
                time.sleep(1)
    raise OSError(f'{file} cannot be saved: {reason}. Checkpoints of earlier iterations are intact')


def root_cause(error: BaseException) -> BaseException:
    while error.__context__ is not None:
        error = error.__context__
    return error


def read_nets(model, nets: dict[str, nn.Module], file_name: str) -> dict[str, dict]:
    """{key: state dict} on the CPU, to be saved under this name.

    Raises:
        FloatingPointError: naming file and parameter, if a value is not finite: the file would replace a usable one.
            Buffers may be infinite, like attention masks.
    """
    content = {}
    for key, net in nets.items():
        net, content[key] = model.get_bare_model(net), {}
        buffers = dict(net.named_buffers()) if isinstance(net, nn.Module) else ()  # else a PlainValue
        for name, value in net.state_dict().items():
            content[key][name.removeprefix('module.')] = value = value.cpu()
            if isinstance(value, Tensor) and (value.isnan() if name in buffers else ~value.isfinite()).any():
                raise FloatingPointError(f'{file_name} is not saved: {key}, {name} is not finite')
    return content


def write_network(model, nets: list[nn.Module], label: str, iteration: int, keys: list[str]) -> None:
    """Writes `<label>_<iteration>.pth`, {key: state dict}; -1 stands for latest.

    With one of our models and `logger.save_format: safetensors`, it has that extension.

    Raises:
        FloatingPointError: see `read_nets`.
        OSError: see `write`.
    """
    name = f'{label}_{"latest" if iteration == -1 else iteration}{suffix_of(model)}'
    content = read_nets(model, dict(zip(keys, nets, strict=True)), name)
    if iteration != -1 and 'training_states' in model.opt['path']:
        # There is one if training was resumed from an earlier iteration, and it is not of these networks.
        state_file(model.opt, iteration).unlink(missing_ok=True)
    write_alone(content, Path(model.opt['path']['models'], name))


def suffix_of(model) -> str:
    """Extension of the networks that a model saves; BasicSR's models only support .pth."""
    return getattr(model, 'network_suffix', '.pth')


def write_alone(content: dict, file: Path) -> None:
    """`write`, then deletes the file of the other format that this one replaces.

    Where both exist, the .pth file is the training's, and the .safetensors file is a conversion, the user's.
    """
    replaced = network_file(file.parent, file.stem)
    write(content, file)
    if replaced != file:
        replaced.unlink(missing_ok=True)


def network_file(folder: str | Path, label: str) -> Path:
    """`<label>.safetensors` if it exists and `<label>.pth` does not; otherwise the latter."""
    files = [Path(folder, label + suffix) for suffix in NETWORK_SUFFIXES]
    return next((file for file in files if file.exists()), files[0])


def find_networks(opt: dict) -> None:
    """BasicSR's check_resume names net_g_8.pth to resume from; replaces it by net_g_8.safetensors if that exists."""
    for key in (key for key in opt if key.startswith('network_')):
        file = Path(opt['path'].get(f'pretrain_{key}') or '')
        if file.parent == Path(opt['path'].get('models', '')):
            opt['path'][f'pretrain_{key}'] = str(network_file(file.parent, file.stem))


def state_file(opt: dict, iteration: int) -> Path:
    return Path(opt['path']['training_states'], f'{iteration}.state')


def pool_file(opt: dict, iteration: int, rank: int | str) -> Path:
    return Path(opt['path']['training_states'], f'{iteration}.rank{rank}.pool')


def write_state(model, epoch: int, iteration: int) -> None:
    """Writes `<iteration>.state`, which completes the checkpoint; then deletes those beyond `logger.keep_last`.

    Must be called by all processes.

    Raises:
        OSError: see `write`.
    """
    run, (rank, processes) = training_run.current, get_dist_info()
    pool = {name: getattr(model, name) for name in POOL if hasattr(model, name)}
    if pool and processes > 1:
        if rank != 0:
            write(pool, pool_file(model.opt, iteration, rank))
        torch.distributed.barrier()
    if rank == 0:
        write_main_state(model, epoch, iteration, pool)
    if run is not None:
        run.saved = iteration


def write_main_state(model, epoch: int, iteration: int, pool: dict) -> None:
    """The part of `write_state` for the first process."""
    run = training_run.current
    state = {
        'epoch': epoch if run is None else run.epoch,
        'iter': iteration,
        'optimizers': [optimizer.state_dict() for optimizer in model.optimizers],
        'schedulers': [scheduler.state_dict() for scheduler in model.schedulers],
        'trained': describe_optimizers(model),
    }
    if run is not None:
        state['exact'] = {
            'seed': run.seed,
            'items': run.items_used(iteration),
            'best': plain(getattr(model, 'best_metric_results', {})),
            'validated': run.sets_to_validate == 0,
            'scaler': model.precision.scaler.state_dict() if hasattr(model, 'precision') else {},
            'pool': pool,
        }
    write(state, state_file(model.opt, iteration))
    keep = model.opt.get('logger', {}).get('keep_last')
    if keep is not None:
        remove_older(model.opt, iteration, keep)


def plain(best: dict) -> dict:
    """BasicSR's best_metric_results with Python numbers instead of NumPy's, which weights_only refuses."""
    return {
        name: {
            metric: {'better': record['better'], 'val': float(record['val']), 'iter': int(record['iter'])}
            for metric, record in metrics.items()
        }
        for name, metrics in best.items()
    }


def remove_older(opt: dict, iteration: int, keep: int) -> None:
    """Deletes the checkpoints that have a training state, except the last `keep` up to this iteration, states first."""
    folder = Path(opt['path']['training_states'])
    iterations = sorted(int(file.stem) for file in folder.glob('*.state') if file.stem.isdecimal())
    networks = [key.removeprefix('network_') for key in opt if key.startswith('network_')]
    for old in [number for number in iterations if number <= iteration][:-keep]:
        state_file(opt, old).unlink()
        for network in networks:
            network_file(opt['path']['models'], f'net_{network}_{old}').unlink(missing_ok=True)
        for pool in folder.glob(pool_file(opt, old, '*').name):
            pool.unlink()


def keep_schedule(scheduler: LRScheduler, before: dict) -> None:
    """Restores the options of a scheduler after it has loaded a state, from `before`, its previous attributes."""
    changed = {key: before[key] for key in SCHEDULE if key in before and before[key] != getattr(scheduler, key)}
    if changed:
        vars(scheduler).update(changed)
        get_root_logger().warning(
            f'{type(scheduler).__name__}: {", ".join(changed)} changed; the option file applies from now on.'
        )


def restore(model, state: dict) -> None:
    """Restores the entry `exact` of a state; states of BasicSR itself have none.

    The third step in `patches/resume`.
    """
    run, exact, logger = training_run.current, state.get('exact'), get_root_logger()
    if exact is None:
        logger.warning(
            'The training state does not record which images were used: its epoch and the best metrics start over.'
        )
        exact = {'seed': None if run is None else run.seed, 'items': 0, 'best': {}, 'scaler': {}, 'pool': {}}
    if best := comparable(exact['best'], (model.opt.get('val') or {}).get('metrics') or {}):
        model.best_metric_results = best
    if exact['scaler'] and hasattr(model, 'precision'):
        model.precision.scaler.load_state_dict(exact['scaler'])
    if exact['pool']:
        restore_pool(model, state['iter'], exact['pool'])
    if run is not None:
        if exact['seed'] != run.seed:
            logger.info(f'manual_seed stays {exact["seed"]}, with which the training was started.')
        run.resume(state['iter'], state['epoch'], exact['items'], exact['seed'])
        run.validation_is_missing = bool(model.opt.get('val')) and not exact.get('validated', True)


def comparable(best: dict, metrics: dict) -> dict:
    """The records of the datasets with exactly these metrics, as read by BasicSR; all if there are none."""
    better = {metric: options.get('better', 'higher') for metric, options in metrics.items()}
    return {
        name: records
        for name, records in best.items()
        if not metrics or {metric: record['better'] for metric, record in records.items()} == better
    }


def restore_pool(model, iteration: int, pool: dict) -> None:
    """Restores each process's pool of training pairs; `pool` is that of the first."""
    rank, _ = get_dist_info()
    reason = 'its options have changed'
    if rank != 0:
        try:
            pool = read_checkpoint(str(pool_file(model.opt, iteration, rank)))
        except (OSError, ValueError) as error:
            pool, reason = {}, str(error)
    if pool and len(pool['queue_gt']) == model.queue_size and pool['queue_gt'].shape[-1] == model.opt['gt_size']:
        for name, value in pool.items():
            setattr(model, name, value.to(model.device) if isinstance(value, Tensor) else value)
    else:  # not by the logger, which only the first process has
        print(f'WARNING: process {rank} starts with an empty pool of training pairs: {reason}', flush=True)
