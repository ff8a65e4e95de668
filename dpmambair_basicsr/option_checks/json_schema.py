"""JSON schema of our option files, for completion and validation in editors: options/dpmambair.schema.json.

    python -m dpmambair_basicsr.option_checks.json_schema

regenerates it from the table of option keys and the constructors of registered classes, in draft 7, which editors
support. Missing files, and anything else that cannot be seen in the option file alone, are left to `sections`.
"""

import collections.abc
import inspect
import json
import math
import re
import types
import typing
from pathlib import Path

import dpmambair_basicsr
from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.option_row import TEST, TRAIN, Option
from dpmambair_basicsr.option_checks.calls import CALLS, Call, parameters_of
from dpmambair_basicsr.option_checks.schema import OPTIONS
from dpmambair_basicsr.registry import PREFIX, is_ours, registered

FILE = 'dpmambair.schema.json'  # beside the option files
TYPES = {int: 'integer', float: 'number', str: 'string', bool: 'boolean', dict: 'object', type(None): 'null'}


def make_schema() -> dict:
    rows = [*OPTIONS, *declared('MODEL')]
    top = section(rows, '')
    for name in ('train', 'val', 'path', 'logger', 'dist_params'):
        top['properties'][name] |= section(rows, name)
    top['properties']['logger']['properties']['wandb'] |= section(rows, 'logger.wandb')
    top['properties']['datasets'] |= {'additionalProperties': dataset(rows)}
    top['properties']['model_type'] |= {'enum': sorted(map(plain_name, of_packages(registered('MODEL'))))}
    return {
        '$schema': 'http://json-schema.org/draft-07/schema#',
        'title': 'Options of dpmambair_basicsr',
        'type': 'object',
        **top,
        'definitions': {name: of_call(call) for name, call in CALLS.items()},
    }


def declared(registry: str) -> list[Option]:
    """The rows that our classes of a registry declare in addition to the table."""
    classes = dict.fromkeys(base for target in of_packages(registered(registry)).values() for base in target.__mro__)
    return [row for base in classes for row in vars(base).get('option_keys', ())]


def of_packages(known: dict) -> dict:
    """Without other packages' classes, and without our second names."""
    ours = ('basicsr.', 'dpmambair_basicsr.')
    return {
        name: target
        for name, target in known.items()
        if target.__module__.startswith(ours) and not name.startswith(PREFIX)
    }


def plain_name(name: str) -> str:
    """A name without BasicSR's suffix for its own classes, which option files omit, see Registry.get."""
    return name.removesuffix('_basicsr')


def section(rows: list[Option], name: str) -> dict:
    """Schema of a section. Keys required only in training are required only in sections that exist only in training."""
    of_section = [row for row in rows if row.section == name]
    exact = {row.name: of_row(row) for row in of_section if '*' not in row.name}
    patterns = {f'^{row.name.replace("*", ".+")}$': of_row(row) for row in of_section if '*' in row.name}
    phases = {TRAIN} if name in ('train', 'logger') else {TRAIN, TEST}
    required = [row.name for row in of_section if phases.issubset(row.required)]
    schema = {'required': required, 'properties': exact, 'patternProperties': patterns, 'additionalProperties': False}
    return {key: value for key, value in schema.items() if value or value is False}


def of_row(row: Option) -> dict:
    schema = {'description': row.text} | of_kind(row.kind)
    bounds = {'minimum': row.low, 'maximum': row.high}
    schema |= {name: value for name, value in bounds.items() if math.isfinite(value)}
    reference = {'$ref': f'#/definitions/{row.calls}'}
    if row.calls == 'METRIC':
        return schema | {'additionalProperties': reference}
    return schema | {'allOf': [reference]} if row.calls else schema


def of_kind(kind) -> dict:
    """Schema of a constructor's annotation; {} for types without a YAML value, such as tensors."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if all(part in TYPES for part in parts):
            return {'type': [TYPES[part] for part in parts]}
        return {'anyOf': [known for part in parts if (known := of_kind(part))]}
    if origin is typing.Literal:
        return {'enum': list(parts)}
    if origin in (collections.abc.Sequence, list):
        return {'type': 'array', 'items': of_kind(parts[0])}
    return {'type': TYPES[origin or kind]} if (origin or kind) in TYPES else {}


def of_call(call: Call) -> dict:
    """Schema of a section whose `type` names one of several."""
    known = {plain_name(name): target for name, target in sorted(call.known().items())}
    if call is not CALLS['optimizer']:  # PyTorch's, and more in each version
        known = of_packages(known)
    choices = [
        {'if': {'properties': {'type': {'const': name}}}, 'then': arguments(name, target, call)}
        for name, target in known.items()
    ]
    names = {'enum': [*known]}
    if call is CALLS['optimizer']:  # by a dotted name, one of another package
        names = {'anyOf': [names, {'pattern': r'^\w+(\.\w+)+$'}]}
    kind = {'type': ['object', 'null'], 'properties': {'type': names}}
    return kind | {'required': ['type', *call.required], 'allOf': choices}


def arguments(name: str, target, call: Call) -> dict:
    """Schema of the arguments of a class or function registered as `name`."""
    named, takes_any = parameters_of(target, call)
    doc = inspect.getdoc(target) or ''
    texts = arguments_in(doc) if is_ours(target) else {}
    properties = {'type': {'const': name}} | {key: of_parameter(p, texts) for key, p in named.items()}
    if call is CALLS['METRIC']:
        properties.setdefault('better', {'enum': ['higher', 'lower']})
    schema: dict[str, typing.Any] = {'properties': properties}
    if is_ours(target):
        schema['description'] = ' '.join(doc.partition('\n\n')[0].split())
    if required := [key for key, p in named.items() if p.default is p.empty]:
        schema['required'] = required
    return schema if takes_any else schema | {'additionalProperties': False}


def of_parameter(parameter: inspect.Parameter, texts: dict[str, str]) -> dict:
    default, annotation = parameter.default, parameter.annotation
    schema = {} if annotation is parameter.empty else of_kind(annotation)
    if parameter.name in texts:
        schema = {'description': texts[parameter.name]} | schema
    if isinstance(default, int | float | str | bool | list | tuple):
        schema |= {'default': list(default) if isinstance(default, tuple) else default}
    return schema


def arguments_in(doc: str) -> dict[str, str]:
    """{name: text} of the "Args:" section of a docstring."""
    block = re.search(r'^Args:\n(.*?)(?=\n\n|\n\S|\Z)', doc, re.S | re.M)
    found = re.finditer(r'^ {4}(\w[\w, ]*): (.*?)(?=\n {4}\w[\w, ]*: |\Z)', block[1] if block else '', re.S | re.M)
    return {name.strip(): ' '.join(entry[2].split()) for entry in found for name in entry[1].split(',')}


def dataset(rows: list[Option]) -> dict:
    """Schema of a dataset; the keys of BasicSR's own datasets are unknown."""
    loader = section(rows, 'datasets')
    known = {plain_name(name): target for name, target in sorted(of_packages(registered('DATASET')).items())}
    choices = []
    for name, target in known.items():
        if hasattr(target, 'option_keys'):
            own = section([*rows, *target.option_keys], 'datasets')
            choices.append({'if': {'properties': {'type': {'const': name}}}, 'then': own})
    part = section([*rows, *declared('DATASET')], 'datasets')
    part |= {'type': ['object', 'null'], 'required': [], 'description': 'of PairedDegradationDataset by default'}
    for choice in choices:
        if 'datasets' in choice['then']['properties']:
            choice['then']['properties']['datasets'] |= {'additionalProperties': part}
    loader['properties']['type'] |= {'enum': [*known]}
    return {'type': 'object', 'properties': loader['properties'], 'required': loader['required'], 'allOf': choices}


def main() -> None:
    dpmambair_basicsr.register()
    file = Path(dpmambair_basicsr.__file__).parents[1] / 'options' / FILE
    with replacing(file) as part:
        part.write_text(json.dumps(make_schema(), indent=1) + '\n', encoding='utf-8')
    print(f'wrote {file}')


if __name__ == '__main__':
    main()
