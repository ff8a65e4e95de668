"""Patches of saving in BasicSR's training: an interruption loses nothing, and resume is bit-exact.

Shared code is in `training/run`, `training/signals` and `training/state`.
"""

import math
import signal

from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only

from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.training import run as training_run
from dpmambair_basicsr.training import signals as interruption
from dpmambair_basicsr.training.output import release_output
from dpmambair_basicsr.training.state import POOL, write_network, write_state

BASE_MODEL = 'basicsr.models.base_model:BaseModel'


@replaces(BASE_MODEL, 'save_network')
def whole_networks(original):
    """Writes a network atomically, never with non-finite values, and raises on failure.

    Fixes: `BaseModel.save_network` leaves a partial file under the final name and ignores the error: training ends
        with exit status 0, and `--auto_resume` fails. Networks of NaNs are written too.
    Remove once: BasicSR renames complete files, and raises.
    """

    @master_only
    def save_network(self, net, net_label, current_iter, param_key='params'):
        nets, keys = net if isinstance(net, list) else [net], param_key if isinstance(param_key, list) else [param_key]
        write_network(self, nets, net_label, current_iter, keys)

    return save_network


@replaces(BASE_MODEL, 'save_training_state')
def whole_states(original):
    """Writes a training state atomically, with everything needed for bit-exact resume; ends a training after a signal.

    If a validation of the same iteration is due, the state says so, and is rewritten after it.

    Fixes: `BaseModel.save_training_state`, as `whole_networks`; and its state lacks the best metrics of that
        validation.
    Remove once: BasicSR's is atomic and complete.
    """

    def save_training_state(self, epoch, current_iter):
        run, val = training_run.current, self.opt.get('val')
        if current_iter == -1:  # the end of training
            training_run.current = None
            if number := interruption.requested(self.device, self.opt['dist']):
                name = signal.Signals(number).name
                get_root_logger().info(f'{name}: training has ended and is saved; the last validation is skipped.')
                raise interruption.StoppedBySignal(number)
            interruption.stop_listening()
            release_output()
        else:
            if run is not None:
                frequency = (val or {}).get('val_freq')  # None in a program with its own loop
                run.sets_to_validate = len(run.val_loaders) if frequency and current_iter % frequency == 0 else 0
            write_state(self, epoch, current_iter)

    return save_training_state


@replaces(BASE_MODEL, 'validation')
def state_after_validation(original):
    """Rewrites the state of an iteration after its validation, and saves its checkpoint if that fails.

    Fixes: see `whole_states`; this is its other half. Also, a failing `BaseModel.validation` loses everything since
        the last checkpoint.
    Remove once: `whole_states` is removed, and BasicSR saves before it validates.
    """

    def validation(self, dataloader, current_iter, tb_logger, save_img=False):
        run = training_run.current
        try:
            original(self, dataloader, current_iter, tb_logger, save_img)
        except Exception:
            if run is not None:
                save_unvalidated(self, current_iter)
            raise
        if run is not None and run.sets_to_validate:
            run.sets_to_validate -= 1
            if run.sets_to_validate == 0:
                write_state(self, run.epoch, current_iter)

    return validation


def save_unvalidated(model, iteration: int) -> None:
    """Saves the checkpoint of an iteration whose validation failed, unless it exists.

    Not if it includes pools of several processes, as the others do not know of the failure.
    """
    run, logger = training_run.current, get_root_logger()
    assert run is not None, 'only trainings have something to save'
    if run.saved != iteration and not (model.opt['dist'] and hasattr(model, POOL[0])):
        try:
            model.save(run.epoch, iteration)
        except Exception as error:  # the training ends with the validation's error
            logger.warning(f'Iteration {iteration} is not saved: {error}')
    if run.saved == iteration:
        logger.info(f'Validation failed. Iteration {iteration} is saved; --auto_resume starts with its validation.')


@replaces(BASE_MODEL, '_update_best_metric_result')
def finite_best(original):
    """Never takes an infinite value as the best of a metric.

    Fixes: `BaseModel._update_best_metric_result` keeps infinity, the PSNR of equal images, as the best forever.
    Remove once: it does not.
    """

    def update_best_metric_result(self, dataset_name, metric, val, current_iter):
        if math.isfinite(val):
            original(self, dataset_name, metric, val, current_iter)

    return update_best_metric_result
