"""What the names and values in an option file stand for: classes registered under a name, kinds of values."""

import difflib
import inspect

import torch
from basicsr.models import lr_scheduler as basicsr_schedulers
from basicsr.utils import registry

from dpmambair_basicsr.training import lr_schedulers as our_schedulers


def describe(path: str, error: Exception) -> str:
    """One line about an exception; torch's can list every parameter of a network."""
    text = ' '.join(str(error).split())
    text = text if len(text) <= 500 else f'{text[:500]} ...'
    return f'{path}: {text}' if isinstance(error, ValueError | OSError) else f'{path}: {type(error).__name__}: {text}'


def arguments_of(section: dict) -> dict:
    return {key: value for key, value in section.items() if key != 'type'}


def our_type(kind: str, section):
    """The class of ours that a section with a `type` names, otherwise None."""
    target = look_up(registered(kind), '', section.get('type'))[0] if isinstance(section, dict) else None
    return target if is_ours(target) else None


def is_ours(target) -> bool:
    return getattr(target, '__module__', None) is not None and target.__module__.startswith('dpmambair_basicsr.')


def look_up(known: dict, path: str, name) -> tuple[object, list[str]]:
    """What is known under `name`, or None, and the problem."""
    if not isinstance(name, str | None):
        return None, [f'{path}: has to be text, not {name!r}']
    target = known.get(name, known.get(f'{name}_basicsr'))  # BasicSR's suffix for its own, see Registry.get
    if target is not None:
        return target, []
    return None, [f'{path}: missing' if name is None else f'{path}: unknown type {name}{did_you_mean(name, known)}']


def did_you_mean(name, choices) -> str:
    near = difflib.get_close_matches(str(name), choices, n=1)
    return f', did you mean {near[0]}?' if near else f'; choices: {", ".join(sorted(choices))}'


def registered(kind: str) -> dict[str, object]:
    return dict(iter(getattr(registry, f'{kind}_REGISTRY')))


def optimizers() -> dict[str, type]:
    return subclasses(torch.optim.Optimizer, torch.optim)


def schedulers() -> dict[str, type]:
    """BasicSR's and ours; MultiStepLR is BasicSR's other name for MultiStepRestartLR (models/base_model.py:114)."""
    found = subclasses(torch.optim.lr_scheduler.LRScheduler, basicsr_schedulers, our_schedulers)
    return found | {'MultiStepLR': basicsr_schedulers.MultiStepRestartLR}


def subclasses(base: type, *modules) -> dict[str, type]:
    public = {name: value for module in modules for name, value in vars(module).items() if not name.startswith('_')}
    return {name: value for name, value in public.items() if inspect.isclass(value) and base in value.__mro__[1:]}
