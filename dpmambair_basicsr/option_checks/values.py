"""Types of option values: checking a value, and naming a type in messages."""

import collections.abc
import math
import re
import types
import typing
from pathlib import Path

from dpmambair_basicsr.files.option_row import Option

KINDS = {
    int: 'int',
    float: 'number',
    str: 'text',
    bool: 'true or false',
    dict: 'a section',
    type(None): '~',
}


NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')


def alternatives(kind) -> tuple:
    """Members of a union."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def is_kind(value, wanted) -> bool:
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return any(is_kind(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin in (collections.abc.Sequence, list):
        return isinstance(value, list) and all(is_kind(part, parts[0]) or is_number_as_text(part) for part in value)
    if wanted in (int, float):
        return isinstance(value, int | wanted) and not isinstance(value, bool)
    return (origin or wanted) not in KINDS or isinstance(value, origin or wanted)


def kind_in_words(wanted, bounds: str = '') -> str:
    """Args: bounds: text appended to the name of a number type."""
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return ' or '.join(kind_in_words(part, bounds) for part in parts)
    if origin is typing.Literal:
        return ' or '.join(map(str, parts))
    if origin in (collections.abc.Sequence, list):
        return f'list of {KINDS[parts[0]]}'
    return KINDS[origin or wanted] + (bounds if wanted in (int, float) else '')


def check_value(path: str, value, row: Option) -> list[str]:
    """Problem of a value of the wrong type or out of range; for numbers as text, see `check_numbers`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number_as_text(value) or (is_kind(value, row.kind) and (not is_number or row.low <= value <= row.high)):
        return []
    bounds = '' if row.low == -math.inf else f' >= {row.low}'
    bounds = bounds if row.high == math.inf else f' in [{row.low}, {row.high}]'
    return [f'{path}: expected {kind_in_words(row.kind, bounds)}, got {value!r}']


def is_number_as_text(value) -> bool:
    return isinstance(value, str) and NUMBER.fullmatch(value) is not None


def check_numbers(path: str, value, texts: re.Pattern) -> list[str]:
    """Numbers that YAML 1.1 reads as text: it requires a point and a sign, 3.0e-4. Quoted numbers are text too.

    Args:
        texts: keys whose value is meant to be text.
    """
    if isinstance(value, dict):
        parts = {f'{path}.{key}'.lstrip('.'): part for key, part in value.items() if not texts.fullmatch(str(key))}
        return [problem for name, part in parts.items() for problem in check_numbers(name, part, texts)]
    if isinstance(value, list):
        parts = {f'{path}[{index}]': part for index, part in enumerate(value)}
        return [problem for name, part in parts.items() for problem in check_numbers(name, part, texts)]
    if not is_number_as_text(value):
        return []
    mantissa, _, exponent = value.lower().partition('e')
    number = f'{mantissa if "." in mantissa else mantissa + ".0"}e{int(exponent):+d}' if exponent else mantissa
    return [f'{path}: {value} is text in YAML; write {number}']


def will_resume(opt: dict) -> bool:
    """Whether BasicSR will ignore path.pretrain_network_*: a run may outlive the files it started from."""
    if opt['auto_resume']:
        return any(Path(opt['path'].get('training_states', '')).glob('*.state'))
    return bool(opt['path'].get('resume_state'))
