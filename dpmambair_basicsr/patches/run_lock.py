"""Patches that lock the folder of a run for one process group."""

import os

import torch

from dpmambair_basicsr.files import lock
from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.patches.resume import load_resume_state


def begin_training(opt: dict) -> dict | None:
    """Locks the folder of the run before anything in it is read or renamed; finds its state.

    Fixes: in `train_pipeline`, two trainings of the same name rename each other's folder and overwrite files.
    Remove once: BasicSR locks.

    Raises:
        LockedFolderError: in every process, if another training uses the folder.
    """
    folders = [opt['path']['experiments_root']]
    if opt['logger'].get('use_tb_logger'):  # renamed too, by the name of the run alone
        folders.append(os.path.join(opt['root_path'], 'tb_logger', opt['name']))
    hold_together(opt, folders)
    return load_resume_state(opt)


def hold_together(opt: dict, folders: list[str]) -> None:
    """Take the locks in the first process, for all; raise its error in each."""
    failure: list[Exception | None] = [None]
    if opt['rank'] == 0:
        try:
            for folder in folders:
                lock.hold(folder)
        except (lock.LockedFolderError, OSError) as error:
            failure = [error]
    if opt['dist']:
        torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


@replaces('basicsr.utils', 'make_exp_dirs')
def one_test_at_a_time(original):
    """Locks the results folder for this test before it is renamed.

    Fixes: as `begin_training`, for `make_exp_dirs` in a test.
    Remove once: BasicSR locks.
    """

    def make_exp_dirs(opt):
        if not opt['is_train']:
            hold_together(opt, [opt['path']['results_root']])
        original(opt)

    return make_exp_dirs
