"""Kinds of values in option files: whether a value is one, and what it is called in a message."""

import collections.abc
import re
import types
import typing
from pathlib import Path

KINDS = {
    int: 'a whole number',
    float: 'a number',
    str: 'text',
    bool: 'true or false',
    dict: 'a section',
    type(None): '~',
}


NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')


def is_kind(value, wanted) -> bool:
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return any(is_kind(value, part) for part in parts)
    if origin in (collections.abc.Sequence, list):
        return isinstance(value, list) and all(is_kind(part, parts[0]) or is_number_as_text(part) for part in value)
    if wanted in (int, float):
        return isinstance(value, int | wanted) and not isinstance(value, bool)
    return (origin or wanted) not in KINDS or isinstance(value, origin or wanted)


def kind_in_words(wanted) -> str:
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return ' or '.join(kind_in_words(part) for part in parts)
    if origin in (collections.abc.Sequence, list):
        return f'a list, each {KINDS[parts[0]]}'
    return KINDS[origin or wanted]


def is_number_as_text(value) -> bool:
    return isinstance(value, str) and NUMBER.fullmatch(value) is not None


def will_resume(opt: dict) -> bool:
    """Whether BasicSR will ignore path.pretrain_network_*: a run may outlive the files it started from."""
    if opt['auto_resume']:
        return any(Path(opt['path'].get('training_states', '')).glob('*.state'))
    return bool(opt['path'].get('resume_state'))
