"""Resolves the names in option files: registered classes, optimizers.

Our classes register here, so that they can be imported without BasicSR or with one that has no registry;
`dpmambair_basicsr.registration` connects these registries to BasicSR's.
"""

import difflib
import importlib
import inspect
import itertools
import threading
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

MAX_PARTS = 10_000  # parameters and modules of a network; DPMambaIR at full size has 2144
PREFIX = 'dpmambair_'  # each of our names is also registered with it, whoever owns the plain one


class Registry(dict):
    """Our classes and functions of one kind by name.

    Attributes:
        host: BasicSR's registry of this kind, once `connect` has been called.
        missing: name -> why it is not available with this BasicSR.
    """

    def __init__(self):
        super().__init__()
        self.host: Any = None
        self.missing: dict[str, str] = {}

    def register(self):
        """The decorator, used as BasicSR's."""

        def note(target):
            self[target.__name__] = target
            if self.host is not None:
                self._offer(target.__name__, target)
            return target

        return note

    def connect(self, host) -> None:
        """Registers everything in BasicSR's registry `host`, including what is defined later. Idempotent.

        A name that is taken keeps its meaning; ours is always available as dpmambair_<name>.
        """
        self.host = host
        for name, target in self.items():
            self._offer(name, target)

    def _offer(self, name: str, target) -> None:
        for alias in (name, PREFIX + name):
            if alias not in self.host:
                self.host._do_register(alias, target)

    def by_both_names(self) -> dict[str, Any]:
        return {alias: target for name, target in self.items() for alias in (name, PREFIX + name)}

    def known(self) -> dict[str, Any]:
        """Names available to option files: our classes by both names, and those registered with BasicSR."""
        return self.by_both_names() | dict(iter(self.host if self.host is not None else ()))

    def taken(self) -> list[str]:
        """Our names that belong to somebody else in BasicSR's registry."""
        known = self.known()
        return [name for name in self if not is_ours(known[name])]


ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY = (Registry() for _ in range(5))
REGISTRIES = {
    'ARCH': ARCH_REGISTRY,
    'DATASET': DATASET_REGISTRY,
    'LOSS': LOSS_REGISTRY,
    'METRIC': METRIC_REGISTRY,
    'MODEL': MODEL_REGISTRY,
}


def lazy_attributes(package: str, modules: dict[str, str]):
    """`__getattr__` of a package (PEP 562): imports each name on access, so that each fails alone."""

    def get(name: str):
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        return getattr(importlib.import_module(f'{package}.{modules[name]}'), name)

    return get


def describe(path: str, error: Exception) -> str:
    """One line about an exception; torch's can list every parameter of a network."""
    text = ' '.join(str(error).split())
    text = text if len(text) <= 500 else f'{text[:500]} ...'
    return f'{path}: {text}' if isinstance(error, ValueError | OSError) else f'{path}: {type(error).__name__}: {text}'


class TooManyPartsError(ValueError):
    """A network is larger than allowed."""


def make_without_storage(target: type, arguments: dict, most: int = MAX_PARTS) -> torch.nn.Module:
    """A network on the meta device, without memory for its parameters, and with at most `most` parts.

    Raises:
        TooManyPartsError: it would have more than `most` parameters and modules.
        Exception: what the constructor raises.
    """
    made, thread = itertools.count(1), threading.get_ident()

    def count(*_) -> None:
        if threading.get_ident() == thread and next(made) > most:
            raise TooManyPartsError(f'the network would have more than {most} parameters and modules')

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        with torch.device('meta'):
            return target(**arguments)
    finally:
        for hook in hooks:
            hook.remove()


def arguments_of(section: dict) -> dict:
    return {key: value for key, value in section.items() if key != 'type'}


def told_by_weights(target: type, section: dict, state_dict: dict[str, torch.Tensor], file: str) -> dict:
    """Options missing in a section that can be inferred from the weights, where earlier versions had other defaults.

    Raises:
        ValueError: naming the file, if the network of an earlier version is no longer supported.
    """
    tell = getattr(target, 'options_of_weights', lambda state_dict: {})
    try:
        return {key: value for key, value in tell(state_dict).items() if key not in section}
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from None


def our_type(kind: str, section):
    """Our class that the `type` of a section names; None if it is not ours."""
    target = look_up(registered(kind), '', section.get('type'))[0] if isinstance(section, dict) else None
    return target if is_ours(target) else None


def is_ours(target) -> bool:
    return getattr(target, '__module__', None) is not None and target.__module__.startswith('dpmambair_basicsr.')


def look_up(known: dict[str, Any], path: str, name) -> tuple[Any, list[str]]:
    """The class registered as `name`, or None and the problem."""
    if not isinstance(name, str | None):
        return None, [f'{path}: expected text, got {name!r}']
    if name is None:
        return None, [f'{path}: missing']
    target = known.get(name, known.get(f'{name}_basicsr'))  # BasicSR's suffix for its own, see Registry.get
    if target is not None:
        return target, []
    missing = {name: why for kind in REGISTRIES.values() for name, why in kind.missing.items()}
    if (plain := name.removeprefix(PREFIX)) in missing:
        return None, [f'{path}: {name} is not available with this BasicSR: {missing[plain]}']
    return None, [f'{path}: unknown type {name}{did_you_mean(name, known)}']


def did_you_mean(name, choices) -> str:
    choices = [choice for choice in choices if not choice.startswith(PREFIX)] or choices
    near = difflib.get_close_matches(str(name), choices, n=1)
    return f', did you mean {near[0]}?' if near else f'; choices: {", ".join(sorted(choices))}'


def registered(kind: str) -> dict[str, Any]:
    return REGISTRIES[kind].known()


def optimizers() -> dict[str, type]:
    return subclasses(torch.optim.Optimizer, torch.optim)


def find_optimizer(path: str, name) -> tuple[Any, list[str]]:
    """`look_up` an optimizer of torch.optim, or of another package by a dotted name, such as prodigyopt.Prodigy."""
    if not isinstance(name, str) or '.' not in name:
        return look_up(optimizers(), path, name)
    module_name = name.rpartition('.')[0]
    try:
        found = subclasses(torch.optim.Optimizer, importlib.import_module(module_name))
    except Exception as error:  # importing runs whatever is in it
        return None, [describe(f'{path}: {name}: {module_name} cannot be imported', error)]
    if not found:
        return None, [f'{path}: {name}: {module_name} has no optimizers']
    return look_up({f'{module_name}.{plain}': target for plain, target in found.items()}, path, name)


def subclasses(base: type, *modules) -> dict[str, type]:
    public = {name: value for module in modules for name, value in vars(module).items() if not name.startswith('_')}
    return {name: value for name, value in public.items() if inspect.isclass(value) and base in value.__mro__[1:]}
