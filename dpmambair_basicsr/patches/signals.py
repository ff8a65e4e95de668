"""Patches of the start of an iteration: stop if a signal was received, otherwise seed."""

import signal

import torch
from basicsr.utils import get_root_logger

from dpmambair_basicsr.data.item_seeds import seed_generators
from dpmambair_basicsr.patches.checkpoints import BASE_MODEL
from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.patches.resume import validate_if_missing
from dpmambair_basicsr.training import run as training_run
from dpmambair_basicsr.training import signals as interruption
from dpmambair_basicsr.training.lr_schedulers import undo_warm_up
from dpmambair_basicsr.training.output import keep_output


@replaces(BASE_MODEL, 'update_learning_rate')
def begin_iteration(original):
    """Saves and ends the training if a signal was received; otherwise seeds the generators for this iteration.

    This is the loop's first call of an iteration. Saving the generators' state would not suffice, since a loader draws
    from them whenever it starts. The rates of a warm-up are reset first, see `undo_warm_up`.

    Fixes: a signal loses everything since the last checkpoint: `train_pipeline` does not handle any, and
        `BaseModel.update_learning_rate` does not seed; after `warmup_iter`, MultiStepLR continues from the warm-up's
        last rate.
    Remove once: BasicSR saves on signals, seeds, and warms up any scheduler.
    """

    def update_learning_rate(self, current_iter, warmup_iter=-1):
        run = training_run.current
        if run is not None:
            interruption.listen()
            keep_output()
            number = interruption.requested(self.device, self.opt['dist'])
            if number:
                end_after(self, current_iter - 1, number)
            validate_if_missing(self, current_iter - 1)
            run.iteration = current_iter
            seed_generators('iteration', run.seed, self.opt['rank'], current_iter)
        undo_warm_up(self.schedulers)
        original(self, current_iter, warmup_iter)

    return update_learning_rate


def end_after(model, iteration: int, number: int) -> None:
    """Save the checkpoint of an iteration, unless it exists, and raise StoppedBySignal.

    Signals are still recorded, so that repeated requests have no effect while the process exits.
    """
    run, logger, name = training_run.current, get_root_logger(), signal.Signals(number).name
    logger.info(f'{name}: training stops; iteration {iteration} is saved in {model.opt["path"]["experiments_root"]}.')
    if run.saved != iteration:
        model.save(run.epoch, iteration)
    if model.opt['dist']:  # torchrun kills the others, which may still be writing, once one exits
        torch.distributed.barrier()
    interruption.answered()
    logger.info(f'{name}: training ends after iteration {iteration}, which is saved; --auto_resume continues.')
    raise interruption.StoppedBySignal(number)
