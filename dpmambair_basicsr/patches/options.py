"""Patches of option parsing in BasicSR: validation up front, safe YAML, values of --force_yml."""

import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from basicsr.utils import set_random_seed
from basicsr.utils.dist_util import master_only

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.codec import MAX_PIXELS_VARIABLE
from dpmambair_basicsr.files.errors import exit_on_error
from dpmambair_basicsr.files.option_files import OptionLoader, parse_value, read_options
from dpmambair_basicsr.patches.distributed import obey_timeout
from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.patches.resume import whole_epochs
from dpmambair_basicsr.patches.run_lock import begin_training
from dpmambair_basicsr.training.command_line import command_line

FREQUENCIES = (('val', 'val_freq'), ('logger', 'print_freq'), ('logger', 'save_checkpoint_freq'))


def checked_options(original, caller: dict):
    """Validates all options before anything is created, and reports all problems together.

    Fixes: `parse_options` checks nothing: misspelt keys are ignored, other mistakes fail after folders were renamed.
    Remove once: BasicSR checks its options.

    Args:
        caller: the global namespace of train.py or test.py.
    """

    def parse_options(root_path, is_train=True):
        accept_local_rank()
        file, forced = command_line()
        if file is None:  # BasicSR's own message
            return original(root_path, is_train)
        from dpmambair_basicsr.ops.selective_scan.backend import set_default_backend
        from dpmambair_basicsr.option_checks.sections import check_options
        from dpmambair_basicsr.option_checks.structure import (
            add_sections,
            apply_forced,
            check_root,
            check_structure,
            refuse,
        )

        with exit_on_error():
            raw = read_options(file)
            entries = add_sections(raw, forced)
            refuse(file, apply_forced(raw, entries) or check_structure(raw, is_train), forced)
            obey_timeout(raw)
            expand_lists_too()
            if 'max_pixels' in raw:
                os.environ[MAX_PIXELS_VARIABLE] = str(raw['max_pixels'])  # for the loader's workers too
            with more_arguments(*(('--force_yml', *entries) if entries != forced else ())):
                opt, args = original(root_path, is_train)
            obey_forced_seed(opt, entries)
            opt['path'].pop('results_root' if is_train else 'experiments_root', None)  # BasicSR would create it
            problems = []
            if not args.debug:  # debug runs keep their own folder, so as not to replace real ones
                obey_experiments_root(opt, raw['path'])
                obey_frequencies(opt, raw)
                problems = check_root(opt, raw['path'])
            refuse(file, problems + check_options(opt, raw), forced)
            set_default_backend(opt.get('scan_backend'))
        # BasicSR's train.py runs as __main__, so its functions are not reached through the module basicsr.train
        if 'load_resume_state' in caller:
            caller['load_resume_state'] = begin_training
        if 'create_train_val_dataloader' in caller:
            caller['create_train_val_dataloader'] = whole_epochs(caller['create_train_val_dataloader'])
        return opt, args

    return parse_options


@contextmanager
def more_arguments(*arguments: str):
    """Append arguments to the command line, where they override earlier ones of the same option."""
    saved = sys.argv
    sys.argv = [*saved, *arguments]
    try:
        yield
    finally:
        sys.argv = saved


def accept_local_rank() -> None:
    """Accepts `--local-rank`, as torch.distributed.launch spells it since torch 2.0; torchrun passes none.

    Fixes: `parse_options` only accepts `--local_rank`: `unrecognized arguments`.
    Remove once: BasicSR accepts both.
    """
    sys.argv[:] = [re.sub(r'^--local-rank\b', '--local_rank', argument) for argument in sys.argv]


def obey_forced_seed(opt: dict, forced: Sequence[str]) -> None:
    """Seeds with a `manual_seed` of `--force_yml`.

    Fixes: `parse_options` seeds before it applies `--force_yml`: the run logs one seed and uses another, a random one
    if the file has none.
    Remove once: BasicSR seeds after applying it.
    """
    seed = opt.get('manual_seed')
    if type(seed) is int and any(entry.partition('=')[0] == 'manual_seed' for entry in forced):
        set_random_seed(seed + opt['rank'])


def obey_experiments_root(opt: dict, wanted: dict) -> None:
    """Keeps `path.experiments_root` and `path.results_root` of the option file.

    Relative paths start at the current directory, `~` is expanded. With `--debug` they are ignored in favour of
    BasicSR's debug_<name>.

    Fixes: `parse_options` overwrites them: a run can only be resumed from the directory it was started in.
    Remove once: 1.4.2 is no longer supported; master respects them.
    """
    root = 'experiments_root' if opt['is_train'] else 'results_root'
    if wanted.get(root) is None:
        return
    old, new = opt['path'][root], os.path.abspath(os.path.expanduser(wanted[root]))
    for key in (root, 'models', 'training_states', 'log', 'visualization'):
        if key in opt['path']:
            opt['path'][key] = new + opt['path'][key].removeprefix(old)


def obey_frequencies(opt: dict, raw: dict) -> None:
    """Keeps the frequencies of the option file; only `--debug` changes them, and the log says so.

    Fixes: `parse_options` silently changes them for validation, logging and saving if a name contains 'debug'.
    Remove once: BasicSR checks the argument instead.
    """
    if not opt['is_train'] or 'debug' not in opt['name']:
        return
    for section, key in FREQUENCIES:
        if isinstance(raw.get(section), dict):
            opt[section].pop(key, None)
            opt[section] |= {key: raw[section][key]} if key in raw[section] else {}


def expand_lists_too() -> None:
    """Expands `~` in each path of a list `dataroot_gt`, for datasets that take one.

    Fixes: `parse_options` calls expanduser with the list.
    Remove once: BasicSR expands each.
    """
    from basicsr.utils import options

    def expanduser(path):
        return [os.path.expanduser(part) for part in path] if isinstance(path, list) else os.path.expanduser(path)

    options.osp = SimpleNamespace(**vars(os.path) | {'expanduser': expanduser})


@replaces('basicsr.utils.options', 'dict2str')
def log_says_what_is_not_done(original):
    """Adds notes to the options in the log on those that BasicSR ignores, see `option_checks.host.notes`.

    Fixes: `dict2str` writes all options, even those that nothing reads.
    Remove once: BasicSR has no such options.
    """

    def dict2str(opt, indent_level=1):
        text = original(opt, indent_level)
        if indent_level > 1 or 'is_train' not in opt:
            return text
        from dpmambair_basicsr.option_checks.host import notes

        return ''.join([text, *(f'\n  NOTE {line}' for line in notes(opt))])

    return dict2str


@replaces('basicsr.utils.options', 'ordered_yaml')
def safe_yaml(original):
    """Reads option files with a safe loader, in UTF-8 and within limits, and rejects duplicate keys.

    Fixes: `ordered_yaml` gives the unsafe loader, so `!!python/object/apply:os.system` runs; the encoding is the
        system's, and the last of two equal keys wins.
    Remove once: BasicSR's loader does all this.
    """

    def ordered_yaml():
        return OptionLoader, original()[1]

    return ordered_yaml


@replaces('basicsr.utils.options', 'copy_opt_file')
def whole_copy(original):
    """Writes the copy of the option file atomically, byte for byte, below its header.

    Fixes: `copy_opt_file` edits the copy in place, in the system's encoding: a UTF-8 file may end the run.
    Remove once: BasicSR writes it at once, in UTF-8.
    """

    @master_only
    def copy_opt_file(opt_file, experiments_root):
        command = ' '.join(sys.argv).replace('\n', ' ')
        head = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {command}\n\n'
        content = Path(opt_file).read_bytes().removeprefix(b'\xef\xbb\xbf')
        with replacing(Path(experiments_root, Path(opt_file).name)) as part:
            part.write_bytes(head.encode('utf-8', 'surrogateescape') + content)

    return copy_opt_file


@replaces('basicsr.utils.options', '_postprocess_yml_value')
def forced_value(original):
    """Reads a value of `--force_yml` as an option file would: lists as YAML, '-1' and '1e-4' as numbers.

    Quoted 'none' is text; `!!map {}` is an empty section, `{}` a template of names. Limits are those of a file.

    Fixes: `_postprocess_yml_value` evaluates lists as Python, and leaves '-1' and '1e-4' as text.
    Remove once: BasicSR parses these values.
    """

    def postprocess_yml_value(text):
        from dpmambair_basicsr.option_checks.values import is_number_as_text

        def convert(value):
            if isinstance(value, list):
                return [convert(part) for part in value]
            if not is_number_as_text(value):
                return value
            return parse_value(str(int(value))) if value.lstrip('+-').isdecimal() else float(value)

        if text.startswith(("'", '"')):
            return parse_value(text)
        value = convert(parse_value(text) if text.startswith(('[', '!!map ')) else original(text))
        return parse_value(str(value)) if type(value) is int else value  # enforces the limits

    return postprocess_yml_value
