"""Applies the patches of BasicSR: `patches/<topic>.py`, one function per patch.

BasicSR's files are never edited: single functions are replaced once BasicSR is imported. Patches do not check versions:
a replacement is valid wherever the function exists, functions missing in a fork are skipped, and a topic incompatible
with a fork does not affect the others.

When: our commands apply all of them at once. Otherwise the gates below apply them as soon as a run names one of our
classes: in its option file, in `build_dataset` or in `build_model`. Any other run is bit-identical to one without this
package.
"""

import difflib
import functools
import importlib
import pkgutil
import sys
import warnings

import yaml

from dpmambair_basicsr.files.option_files import check_bounds, read_text
from dpmambair_basicsr.files.regular import open_regular
from dpmambair_basicsr.patches.registry import PATCHES, replaces
from dpmambair_basicsr.registry import PREFIX, REGISTRIES, is_ours
from dpmambair_basicsr.training.command_line import command_line

TOPICS = (
    'options',
    'run_lock',
    'distributed',
    'fixes',
    'ssim',
    'checkpoints',
    'resume',
    'seeding',
    'signals',
    'images',
    'logs',
)

misfits = {}  # topic -> why it cannot be imported with this BasicSR
applied = False


class TolerantLoader(yaml.SafeLoader):
    """Reads unknown tags as None: names in a file are looked up before anything is refused."""


TolerantLoader.add_multi_constructor('', lambda loader, suffix, node: None)


def load_topics() -> None:
    """Imports the topics, each separately; records in `misfits` those that fail."""
    for topic in TOPICS:
        try:
            importlib.import_module(f'dpmambair_basicsr.patches.{topic}')  # registers its patches
        except Exception as error:  # any: forks fail in many ways
            misfits[topic] = f'{type(error).__name__}: {error}'


def apply_patches(*namespaces: dict) -> None:
    """Apply every patch to the imported BasicSR, and to names imported from it in these namespaces. Idempotent."""
    global applied
    load_topics()
    if misfits and not applied:
        problems = [f'patches/{topic} is incompatible with this BasicSR ({why})' for topic, why in misfits.items()]
        warnings.warn('\n  '.join(['dpmambair_basicsr:', *problems]), RuntimeWarning, stacklevel=2)
    applied = True
    for owner, attribute, make in PATCHES:
        apply(owner, attribute, make, namespaces)


def apply_gates() -> None:
    """Applies the gates, which detect whether a run names one of our classes. Idempotent."""
    for owner, attribute, make in PATCHES:
        if make.__module__ == __name__:
            apply(owner, attribute, make, ())


def apply(owner_name: str, attribute: str, make, namespaces: tuple[dict, ...]) -> None:
    try:
        owner = pkgutil.resolve_name(owner_name)
        original = getattr(owner, attribute)
    except (ImportError, AttributeError):
        return  # a fork without it
    if not hasattr(original, 'patched_by'):
        replacement = functools.update_wrapper(make(original), original)
        vars(replacement)['patched_by'] = __name__
        setattr(owner, attribute, replacement)
    # These import functions by name.
    modules = [vars(sys.modules[name]) for name in ('basicsr.train', 'basicsr.test', '__main__') if name in sys.modules]
    patched = getattr(owner, attribute)
    for namespace in (*modules, *namespaces):
        if namespace.get(attribute) is patched.__wrapped__:
            namespace[attribute] = patched


@replaces('basicsr.utils.options', 'parse_options')
def options_that_name_ours(original):
    """The gate for commands: train.py and test.py call this first."""

    def parse_options(*arguments, **keywords):
        if not (applied or names_ours(*command_line())):
            return original(*arguments, **keywords)
        caller = sys._getframe(1).f_globals
        apply_patches(caller)
        if 'options' in misfits:
            return original(*arguments, **keywords)
        from dpmambair_basicsr.patches.options import checked_options

        return checked_options(original, caller)(*arguments, **keywords)

    return parse_options


@replaces('basicsr.data', 'build_dataset')
def datasets_of_ours(original):
    """The gate for programs with their own loop, which build a dataset, then its loader and the model."""

    def build_dataset(dataset_opt):
        if not (applied or is_ours(REGISTRIES['DATASET'].known().get(dataset_opt['type']))):
            return original(dataset_opt)
        apply_patches(sys._getframe(1).f_globals)
        if 'fixes' in misfits:
            return original(dataset_opt)
        from dpmambair_basicsr.patches.fixes import paths_inside_their_folder

        return paths_inside_their_folder(original)(dataset_opt)

    return build_dataset


@replaces('basicsr.models', 'build_model')
def models_of_ours(original):
    """The gate for programs with their own loop, and their own datasets."""

    def build_model(opt):
        if is_ours(REGISTRIES['MODEL'].known().get(opt['model_type'])):
            apply_patches()
        return original(opt)

    return build_model


def names_ours(file: str | None, forced: list[str]) -> bool:
    """Whether an option file, or --force_yml, names one of our classes or functions, or clearly means one."""
    if file is None:
        return False
    try:
        with open_regular(file) as stream:
            text = read_text(stream)
        check_bounds(text)
        opt = yaml.load(text, Loader=TolerantLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return False  # BasicSR reports it
    parts = [entry.partition('=') for entry in forced]
    forced_types = {value.strip() for keys, _, value in parts if keys.strip().split(':')[-1] in ('type', 'model_type')}
    ours = {name for kind in REGISTRIES.values() for name in (*kind, *kind.missing)}
    known = [kind.known() for kind in REGISTRIES.values()]
    for name in {*types(opt), *forced_types}:
        owners = [names[name] for names in known if name in names]
        if any(map(is_ours, owners)) or name.removeprefix(PREFIX) in ours and not owners:
            return True
        if not owners and difflib.get_close_matches(name, ours, n=1, cutoff=0.85):
            return True
    return False


def types(value) -> list[str]:
    """The values of `type` and `model_type`, at any depth."""
    if isinstance(value, list):
        return [name for part in value for name in types(part)]
    if not isinstance(value, dict):
        return []
    own = [value[key] for key in ('type', 'model_type') if isinstance(value.get(key), str)]
    return own + [name for part in value.values() for name in types(part)]
