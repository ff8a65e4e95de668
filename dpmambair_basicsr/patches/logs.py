"""Patches of BasicSR's logs: errors in logging never end a training."""

import logging
import sys

from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info

from dpmambair_basicsr.patches.registry import replaces


class Plots:
    """A TensorBoard writer that is switched off, with a warning, by its first error, e.g. a full disk.

    Args:
        make: creates the SummaryWriter.
    """

    def __init__(self, make, *arguments, **keywords):
        self._writer = None
        self._writer = self._attempt(make, *arguments, **keywords)

    def __getattr__(self, name):
        if name.startswith('_'):
            raise AttributeError(name)
        return lambda *arguments, **keywords: self._call(name, *arguments, **keywords)

    def _call(self, name: str, *arguments, **keywords):
        return None if self._writer is None else self._attempt(getattr(self._writer, name), *arguments, **keywords)

    def _attempt(self, function, *arguments, **keywords):
        try:
            return function(*arguments, **keywords)
        except ImportError:
            raise
        except Exception as error:
            self._writer = None
            get_root_logger().warning(
                f'TensorBoard is switched off, training continues: {type(error).__name__}: {error}'
            )


@replaces('basicsr.utils.logger', 'init_tb_logger')
def plots_that_end_no_training(original):
    """Returns a TensorBoard writer that is switched off, with a warning, by its first error.

    Fixes: with the one of `init_tb_logger`, a full disk under tb_logger/ ends the training at the next plot.
    Remove once: it does not.
    """

    def init_tb_logger(*arguments, **keywords):
        return Plots(original, *arguments, **keywords) if get_dist_info()[0] == 0 else None

    return init_tb_logger


@replaces('basicsr.utils.logger', 'init_wandb_logger')
def wandb_that_ends_no_training(original):
    """Starts wandb, or warns that its files cannot be written.

    Fixes: `init_wandb_logger` ends the training in that case.
    Remove once: it does not.
    """

    def init_wandb_logger(opt):
        try:
            original(opt)
        except OSError as error:
            get_root_logger().warning(f'wandb is switched off, training continues: {error}')

    return init_wandb_logger


@replaces('basicsr.utils.logger', 'get_root_logger')
def log_file_that_may_be_full(original):
    """Opens the log file in UTF-8; the first line that cannot be written gives a warning.

    Fixes: with the one of `get_root_logger`, each such line is a traceback on the terminal. Here, lines are lost until
        there is room again.
    Remove once: BasicSR does so.
    """

    def get_root_logger(*arguments, **keywords):
        logger = original(*arguments, **keywords)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler) and 'handleError' not in vars(handler):
                handler.stream.reconfigure(encoding='utf-8')
                handler.handleError = say_once(handler)
        return logger

    return get_root_logger


def say_once(handler: logging.FileHandler):
    said = []

    def handle_error(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.FileHandler.handleError(handler, record)
        elif not said:
            said.append(error)
            get_root_logger().warning(f'{handler.baseFilename} cannot be written, training continues: {error.strerror}')

    return handle_error
