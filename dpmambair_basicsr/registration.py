"""Brings what we have into the BasicSR that is there: names one by one, and what its training needs for them.

A BasicSR can be another version or a fork: what does not fit it costs only itself, is said once, and is in the result.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from dpmambair_basicsr.files.errors import INSTALL_TRAINING, MissingLibraryError
from dpmambair_basicsr.patches import apply
from dpmambair_basicsr.registry import PREFIX, REGISTRIES, Registry

FOLDERS = {'ARCH': 'archs', 'DATASET': 'data', 'LOSS': 'losses', 'METRIC': 'metrics', 'MODEL': 'models'}

said = set()


@dataclass(frozen=True)
class Registration:
    """What BasicSR knows of ours.

    Attributes:
        available: by kind (archs, data, losses, metrics, models) the names that an option file can use for ours; with a
            taken name that is dpmambair_<name>.
        unavailable: by kind, and 'patches', name -> reason.
    """

    available: dict[str, list[str]] = field(default_factory=dict)
    unavailable: dict[str, dict[str, str]] = field(default_factory=dict)


def register() -> Registration:
    """Registers our networks, datasets, losses, metrics and models, in this order, each by itself. Idempotent.

    Patches nothing but the two functions that find out whether a run names something of ours, see `patches/apply`.

    Raises:
        ImportError: if there is no BasicSR, or one without a registry.
    """
    import basicsr

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
        problems += [f'{folder}: {name} is another class here, ours is {PREFIX}{name}' for name in taken]
    apply.load_topics()
    apply.apply_gates()
    result.unavailable['patches'] = dict(apply.misfits)
    say_once(list(basicsr.__path__)[0], problems)
    return result


def import_each(folder: str, ours: Registry) -> None:
    """Imports the modules of one kind; notes in `ours.missing` what cannot be."""
    package = importlib.import_module(f'dpmambair_basicsr.{folder}')
    for name, module in getattr(package, 'MODULES', {}).items():
        if name in ours or name in ours.missing:
            continue
        try:
            importlib.import_module(f'{package.__name__}.{module}')
        except Exception as error:  # whatever a fork makes of what we import from it
            ours.missing[name] = f'{type(error).__name__}: {error}'


def connect(ours: Registry, host, kind: str) -> None:
    if host is None:
        ours.missing |= dict.fromkeys(ours, f'basicsr.utils.registry has no {kind}_REGISTRY')
    else:
        ours.connect(host)


def say_once(where: str, problems: list[str]) -> None:
    new = [problem for problem in problems if problem not in said]
    if new:
        said.update(new)
        warnings.warn('\n  '.join([f'dpmambair_basicsr in {where}:', *new]), RuntimeWarning, stacklevel=3)


def pipeline(name: str) -> Callable[[str], None]:
    """BasicSR's train_pipeline or test_pipeline, with everything of ours registered and every patch applied.

    Raises:
        MissingLibraryError: if this BasicSR has none: it is not installed, too old, or a fork without.
    """
    try:
        function = getattr(importlib.import_module(f'basicsr.{name}'), f'{name}_pipeline')
        register()
    except (ImportError, AttributeError) as error:
        spec = importlib.util.find_spec('basicsr')
        where = (
            'no basicsr is installed' if spec is None else f'{list(spec.submodule_search_locations)[0]} does not fit'
        )
        advice = INSTALL_TRAINING if spec is None else 'see docs/projects.md'
        raise MissingLibraryError(f'needs BasicSR 1.3 or newer, and {where} ({error}); {advice}') from error
    apply.apply_patches()
    return function
