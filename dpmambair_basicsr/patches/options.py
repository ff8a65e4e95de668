"""Patches of how BasicSR reads its options: checked before anything is created, safe YAML, values of --force_yml."""

import os
import re
import sys
import time
from pathlib import Path

from basicsr.utils.dist_util import master_only

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.option_files import OptionError, OptionLoader, parse_value, read_options
from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.patches.resume import whole_epochs
from dpmambair_basicsr.patches.run_lock import begin_training
from dpmambair_basicsr.training.command_line import command_line


def checked_options(original, caller: dict):
    """Options are not checked at all: a misspelt key is ignored, and the rest fails after folders were renamed.

    utils/options.py:80. The place for everything that has to happen before the first folder is made; see the functions
    called here. Can go when BasicSR checks its options.

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
        from dpmambair_basicsr.option_checks.structure import apply_forced, check_root, check_structure, refuse

        try:
            raw = read_options(file)
            refuse(file, apply_forced(raw, forced) or check_structure(raw, is_train), forced)
            opt, args = original(root_path, is_train)
            problems = []
            if not args.debug:  # whose runs must not take the place of the real ones: they have a folder of their own
                obey_experiments_root(opt, raw['path'])
                problems = check_root(opt, raw['path'])
            refuse(file, problems + check_options(opt), forced)
            set_default_backend(opt.get('scan_backend'))
        except OptionError as error:
            raise SystemExit(str(error)) from None
        # BasicSR's train.py runs as __main__, so its functions are not reached through the module basicsr.train
        if 'load_resume_state' in caller:
            caller['load_resume_state'] = begin_training
        if 'create_train_val_dataloader' in caller:
            caller['create_train_val_dataloader'] = whole_epochs(caller['create_train_val_dataloader'])
        return opt, args

    return parse_options


def accept_local_rank() -> None:
    """`unrecognized arguments: --local-rank`: torch.distributed.launch spells it so since torch 2.0; options.py:88 not.

    Can go when BasicSR accepts it; torchrun passes none.
    """
    sys.argv[:] = [re.sub(r'^--local-rank\b', '--local_rank', argument) for argument in sys.argv]


def obey_experiments_root(opt: dict, wanted: dict) -> None:
    """`path.experiments_root` and `path.results_root` of the option file are overwritten, utils/options.py:158, 172.

    Without them a run is found again only from the directory it was started in. A relative one is taken from the
    current directory, `~` is expanded. With `--debug` they are not asked: BasicSR's debug_<name> is used. Can go with
    1.4.2: master obeys them.
    """
    root = 'experiments_root' if opt['is_train'] else 'results_root'
    if wanted.get(root) is None:
        return
    old, new = opt['path'][root], os.path.abspath(os.path.expanduser(wanted[root]))
    for key in (root, 'models', 'training_states', 'log', 'visualization'):
        if key in opt['path']:
            opt['path'][key] = new + opt['path'][key].removeprefix(old)


@replaces('basicsr.utils.options', 'ordered_yaml')
def safe_yaml(original):
    """Option files are read with the unsafe loader, so `!!python/object/apply:os.system` runs; utils/options.py:12, 95.

    And in the encoding of the system, without limits, the last of two equal keys. Can go when BasicSR's loader is safe
    in all this.
    """

    def ordered_yaml():
        return OptionLoader, original()[1]

    return ordered_yaml


@replaces('basicsr.utils.options', 'copy_opt_file')
def whole_copy(original):
    """The copy is changed in its place, in the encoding of the system: utils/options.py:191. A UTF-8 file ends it.

    Can go when BasicSR writes it at once, in UTF-8.
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
    """`--force_yml` evaluates lists as Python (utils/options.py:77) and leaves '-1' and '1e-4' as text.

    And none is always no value: here 'none', in quotes, is the word. The limits are those of a file. Can go when
    BasicSR parses these values.
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
        value = convert(parse_value(text) if text.startswith('[') else original(text))
        return parse_value(str(value)) if type(value) is int else value  # which has limits

    return postprocess_yml_value
