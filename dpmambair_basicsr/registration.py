"""Registers our classes with the installed BasicSR, one by one, and applies the patches that training with them needs.

BasicSR may be another version or a fork: a class that is incompatible with it does not affect the others, is reported
once, and is listed in the result.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from dpmambair_basicsr.files.errors import INSTALL_TRAINING, MissingLibraryError
from dpmambair_basicsr.patches import apply
from dpmambair_basicsr.registry import PREFIX, REGISTRIES, Registry, is_ours

FOLDERS = {'ARCH': 'archs', 'DATASET': 'data', 'LOSS': 'losses', 'METRIC': 'metrics', 'MODEL': 'models'}

said = set()


@dataclass(frozen=True)
class Registration:
    """Which of our classes are registered with BasicSR.

    Attributes:
        available: by kind (archs, data, losses, metrics, models), the names that an option file can use for ours:
            dpmambair_<name> where the plain one is taken.
        unavailable: by kind, and 'patches', name -> reason.
    """

    available: dict[str, list[str]] = field(default_factory=dict)
    unavailable: dict[str, dict[str, str]] = field(default_factory=dict)


def register() -> Registration:
    """Registers our networks, datasets, losses, metrics and models, in this order, each separately. Idempotent.

    Patches only the functions that detect whether a run names one of our classes, see `patches/apply`.

    Raises:
        ImportError: if there is no BasicSR, or one without a registry.
    """
    host = importlib.import_module('basicsr.utils.registry')
    result, problems = Registration(), []
    for kind, ours in REGISTRIES.items():
        folder = FOLDERS[kind]
        import_each(folder, ours)
        connect(ours, getattr(host, f'{kind}_REGISTRY', None), kind)
        taken, missing = ours.taken(), dict(ours.missing)
        result.available[folder] = [PREFIX + name if name in taken else name for name in ours if name not in missing]
        result.unavailable[folder] = missing
        problems += [f'{folder}: {name} is not available ({why})' for name, why in missing.items()]
        problems += [taken_by_another(kind, name) for name in taken]
    apply.load_topics()
    apply.apply_gates()
    result.unavailable['patches'] = dict(apply.misfits)
    say_once(basicsr_folder(), problems)
    return result


def import_each(folder: str, ours: Registry) -> None:
    """Imports the modules of one kind; records in `ours.missing` those that fail."""
    package = importlib.import_module(f'dpmambair_basicsr.{folder}')
    for name, module in getattr(package, 'MODULES', {}).items():
        if name in ours or name in ours.missing:
            continue
        try:
            importlib.import_module(f'{package.__name__}.{module}')
        except Exception as error:  # any: forks fail in many ways
            ours.missing[name] = f'{type(error).__name__}: {error}'


def connect(ours: Registry, host, kind: str) -> None:
    if host is None:
        ours.missing |= dict.fromkeys(ours, f'basicsr.utils.registry has no {kind}_REGISTRY')
    else:
        ours.connect(host)
        give_way(ours, host, kind)


def give_way(ours: Registry, host, kind: str) -> None:
    """From now on, a class of a project that is registered under a name of ours replaces it. Idempotent."""
    original = host._do_register
    if hasattr(original, 'gives_way'):
        return

    def do_register(name, target, *suffix, **named):
        has_suffix = any((*suffix, *named.values()))
        gives_way = name in ours and is_ours(host._obj_map.get(name)) and not is_ours(target) and not has_suffix
        if gives_way:
            del host._obj_map[name]
        original(name, target, *suffix, **named)
        if gives_way:
            say_once(basicsr_folder(), [taken_by_another(kind, name)])

    do_register.gives_way = True
    host._do_register = do_register


def taken_by_another(kind: str, name: str) -> str:
    return f'{FOLDERS[kind]}: {name} is already another class here, ours is {PREFIX}{name}'


def basicsr_folder() -> str:
    return list(importlib.import_module('basicsr').__path__)[0]


def say_once(where: str, problems: list[str]) -> None:
    new = [problem for problem in problems if problem not in said]
    if new:
        said.update(new)
        warnings.warn('\n  '.join([f'dpmambair_basicsr in {where}:', *new]), RuntimeWarning, stacklevel=3)


def pipeline(name: str) -> Callable[[str], None]:
    """BasicSR's train_pipeline or test_pipeline, with everything of ours registered and every patch applied.

    Raises:
        MissingLibraryError: if there is none: BasicSR is not installed, too old, or a fork without it.
    """
    try:
        function = getattr(importlib.import_module(f'basicsr.{name}'), f'{name}_pipeline')
        register()
    except (ImportError, AttributeError) as error:
        spec = importlib.util.find_spec('basicsr')
        where = (
            'no basicsr is installed'
            if spec is None
            else f'{list(spec.submodule_search_locations or [spec.name])[0]} is incompatible'
        )
        advice = INSTALL_TRAINING if spec is None else 'see docs/projects.md'
        raise MissingLibraryError(f'needs BasicSR 1.3 or newer, and {where} ({error}); {advice}') from error
    apply.apply_patches()
    return function
