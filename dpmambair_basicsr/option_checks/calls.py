"""Checks of sections with a `type`, whose other keys are the arguments of the class registered under that name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dpmambair_basicsr.files.errors import MissingLibraryError, OptionError
from dpmambair_basicsr.losses import dists_loss
from dpmambair_basicsr.losses.lpips_network import BACKBONES, backbone_path
from dpmambair_basicsr.losses.piq_library import import_piq
from dpmambair_basicsr.metrics import iqa
from dpmambair_basicsr.option_checks.migration import advice, find
from dpmambair_basicsr.option_checks.values import is_kind, is_number_as_text, kind_in_words
from dpmambair_basicsr.registry import (
    arguments_of,
    describe,
    did_you_mean,
    find_optimizer,
    is_ours,
    look_up,
    optimizers,
    registered,
)
from dpmambair_basicsr.training.lr_schedulers import schedulers


@dataclass(frozen=True)
class Call:
    """What a `type` can name.

    Args:
        known: returns {name: class or function}.
        given: names of the arguments that the program supplies.
        required: names that are needed although they have a default.
        open_ended: whether `**kwargs` accepts any key. BasicSR's metrics have one, which swallows misspelt keys.
    """

    known: Callable[[], dict]
    given: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    open_ended: bool = True


CALLS = {
    'ARCH': Call(partial(registered, 'ARCH')),
    'LOSS': Call(partial(registered, 'LOSS')),
    'METRIC': Call(partial(registered, 'METRIC'), given=('img', 'img2'), open_ended=False),
    'optimizer': Call(optimizers, given=('params',), required=('lr',)),
    'scheduler': Call(schedulers, given=('optimizer',)),
}


def parameters_of(target, call: Call) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that an option file can set, and whether any other key is accepted."""
    parameters = inspect.signature(target).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return (
        {name: p for name, p in named.items() if name not in call.given},
        call.open_ended and any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def check_call(path: str, opt, call: Call) -> list[str]:
    """Unknown type; unknown, missing or mistyped arguments; missing weights."""
    if not isinstance(opt, dict):
        return [f'{path}: expected a section with a type, got {opt!r}']
    if call is CALLS['optimizer']:
        target, problems = find_optimizer(f'{path}.type', opt.get('type'))
    else:
        target, problems = find(call.known(), f'{path}.type', opt.get('type'))
    if target is None:
        return problems
    named, takes_any = parameters_of(target, call)
    missing = [name for name, p in named.items() if name not in opt and (p.default is p.empty or name in call.required)]
    problems += [f'{path}.{name}: missing' for name in missing]
    arguments = arguments_of(opt)
    if not takes_any:
        problems += unknown_keys(f'{path}.', arguments, {*named} | known_to_basicsr(target, call))
    if is_ours(target):
        for name, value in arguments.items():
            if name in named:
                problems += check_kind(f'{path}.{name}', value, named[name].annotation)
    return problems or check_weights(path, target, arguments)


def known_to_basicsr(target, call: Call) -> set[str]:
    """`better` of a metric, which BasicSR reads and passes on to metrics that accept any key."""
    has_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())
    return {'better'} if has_any and not call.open_ended else set()


def check_metric(path: str, opt, is_train: bool = True) -> list[str]:
    """Also whether `better` is given where the best network would be the worst without it, as for BasicSR's NIQE."""
    call = CALLS['METRIC']
    problems = check_call(path, opt, call)
    if problems:
        return problems
    target = look_up(call.known(), path, opt['type'])[0]
    if is_iqa(target):
        return check_iqa(path, arguments_of(opt))
    better = inspect.signature(target).parameters.get('better')
    needed = None if better is None else better.default
    if is_train and getattr(target, '__module__', '') == 'basicsr.metrics.niqe':
        needed = 'lower'
    if needed is not None and 'better' not in opt:
        problems = [f'{path}.better: missing; needs {needed}, or BasicSR selects the worst network as the best']
    elif opt.get('better', 'higher') not in ('higher', 'lower'):
        problems = [f'{path}.better: must be one of higher, lower, got {opt["better"]!r}']
    return problems


def is_iqa(target) -> bool:
    return is_ours(target) and target.__name__ == 'calculate_iqa'


def check_iqa(path: str, arguments: dict) -> list[str]:
    """Whether pyiqa is installed, has this metric, and can build it, which may download weights."""
    try:
        iqa.check_iqa(arguments['metric'], arguments.get('better', 'higher'))
        with torch.random.fork_rng(devices=[]):
            iqa.network(arguments['metric'], iqa.device())
        return []
    except OptionError as error:
        return [f'{path}.{error}']
    except MissingLibraryError as error:
        return [f'{path}: {error}']
    except Exception as error:  # any: from the network or its download
        return [describe(path, error)]


def compares(metric: dict) -> bool:
    """Whether a metric of an option file, of known type, compares with clean images."""
    target = look_up(CALLS['METRIC'].known(), '', metric['type'])[0]
    if is_iqa(target):
        try:
            return iqa.compares(metric['metric'])
        except (KeyError, TypeError, MissingLibraryError):  # reported by `check_iqa`
            return False
    return 'img2' in inspect.signature(target).parameters


def check_weights(path: str, target, arguments: dict) -> list[str]:
    """Whether the pretrained weights that a loss or metric will look for exist."""
    bases = {base.__name__ for base in getattr(target, '__mro__', ())}
    if 'VGGPerceptualLoss' in bases:
        return check_vgg(path, arguments.get('vgg_type', 'vgg19'), arguments.get('weights'))
    elif not bases.isdisjoint({'PerceptualLoss', 'VGGFeatureExtractor'}):  # BasicSR's, which download their VGG
        problems = check_vgg(path, arguments.get('vgg_type', 'vgg19'), None)
        return [f'{problem} of VGGPerceptualLoss; BasicSR would download them without asking' for problem in problems]
    elif getattr(target, '__name__', '') in ('LPIPSLoss', 'calculate_lpips') and is_ours(target):
        net = arguments.get('net', 'alex')
        if net not in BACKBONES:
            return [f'{path}.net: must be one of {", ".join(BACKBONES)}, got {net!r}']
        file = Path(arguments.get('weights') or backbone_path(net)).expanduser()
        if not file.is_file():
            return [
                f'{path}: needs the ImageNet weights {BACKBONES[net].url}; {file} does not exist: dpmambair fetch {net}'
            ]
    elif getattr(target, '__name__', '') in ('DISTSLoss', 'MSSSIMLoss') and is_ours(target):
        return check_piq(path, target.__name__, arguments)
    return []


def check_piq(path: str, loss: str, arguments: dict) -> list[str]:
    """Whether the package of a loss is installed, and the files that it would download exist."""
    try:
        import_piq(loss)
        if loss == 'DISTSLoss':
            dists_loss.find_files(arguments.get('weights'), arguments.get('heads'))
        return []
    except (MissingLibraryError, FileNotFoundError) as error:
        return [f'{path}: {error}']


def check_vgg(path: str, vgg_type: str, weights: str | None) -> list[str]:
    try:
        from dpmambair_basicsr.losses.vgg_perceptual_loss import find_vgg_weights
    except ImportError:  # a fork with another VGG
        return []
    try:
        find_vgg_weights(vgg_type, weights)
        return []
    except (ValueError, FileNotFoundError) as error:
        return [describe(path, error)]


def check_kind(path: str, value, wanted) -> list[str]:
    """Problem if a value does not match the annotation of our function; for numbers as text, see `check_numbers`."""
    if wanted is inspect.Parameter.empty or is_kind(value, wanted) or is_number_as_text(value):
        return []
    return [f'{path}: expected {kind_in_words(wanted)}, got {value!r}']


def unknown_keys(prefix: str, given, known: set[str], elsewhere: dict[str, str] | None = None) -> list[str]:
    """Args: elsewhere: {key: section} for keys that belong in another section."""
    problems = []
    for key in (key for key in given if key not in known):
        hint = did_you_mean(key, known)
        if elsewhere is not None and key in elsewhere:
            hint = f', it belongs in {elsewhere[key]}'
        if (what_to_do := advice(key)) is not None:
            hint = f', {what_to_do}'
        problems.append(f'{prefix}{key}: unknown key{hint}')
    return problems
