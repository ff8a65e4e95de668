"""Editors complete and check our option files by a JSON schema that agrees with the checks of a run."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

import dpmambair_basicsr
from dpmambair_basicsr.option_checks.json_schema import FILE, make_schema

dpmambair_basicsr.register()

OPTIONS = Path(dpmambair_basicsr.__file__).parents[1] / 'options'
OPTION_FILES = sorted(OPTIONS.glob('*.yml'))
SCHEMA = json.loads((OPTIONS / FILE).read_text(encoding='utf-8'))
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def test_the_shipped_schema_is_current():
    """Except optimizers, which differ between PyTorch versions."""
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    made, shipped = json.loads(json.dumps(make_schema())), copy.deepcopy(SCHEMA)
    for schema in (made, shipped):
        names, dotted = schema['definitions'].pop('optimizer')['properties']['type']['anyOf']
        assert {'Adam', 'AdamW', 'SGD'} <= {*names['enum']} and re.match(dotted['pattern'], 'prodigyopt.Prodigy')
    assert made == shipped, 'regenerate it: python -m dpmambair_basicsr.option_checks.json_schema'


def test_there_are_option_files():
    assert len(OPTION_FILES) > 10, 'an empty glob would make the next tests pass for nothing'


@pytest.mark.parametrize('file', OPTION_FILES, ids=lambda file: file.name)
def test_an_option_file_names_the_schema_and_fits_it(file):
    assert file.read_text(encoding='utf-8').splitlines()[0] == f'# yaml-language-server: $schema={FILE}'
    assert [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(file.read_text(encoding='utf-8')))] == []


# The key that is set, and its value; None deletes it.
PLANTED = {
    'unknown key at the top': ('model_typ', 'RestorationModel'),
    'unknown key in train': ('train.total_itr', 5),
    'unknown key in path': ('path.pretrain_netwrk_g', 'x.pth'),
    'unknown key in wandb': ('logger.wandb.projct', 'x'),
    'unknown key of a dataset': ('datasets.train.gt_sise', 8),
    'unknown key of a part': ('datasets.train.datasets.rain.use_hflp', True),
    'unknown key of a network': ('network_g.dimm', 8),
    'unknown key of a loss': ('train.pixel_opt.los_weight', 1),
    'unknown key of a metric': ('val.metrics.psnr.crop_bordr', 1),
    'unknown key of a scheduler': ('train.scheduler.perods', [1]),
    'unknown model': ('model_type', 'RestorationModl'),
    'unknown network': ('network_g.type', 'DPMambalR'),
    'unknown dataset': ('datasets.train.type', 'MixedDegradationDatset'),
    'unknown optimizer': ('train.optim_g.type', 'Adm'),
    'unknown precision': ('train.amp', 'fp8'),
    'missing network': ('network_g', None),
    'missing learning rate': ('train.optim_g.lr', None),
    'missing number of iterations': ('train.total_iter', None),
    'text for a number': ('network_g.dim', 'wide'),
    'number that YAML reads as text': ('train.optim_g.lr', '3e-4'),
    'number out of range': ('train.ema_decay', 2),
    'number for a section': ('train.pixel_opt', 1.0),
    'number for a list': ('network_g.num_blocks', 4),
}


@pytest.mark.parametrize('mistake', PLANTED)
def test_a_mistake_is_marked_at_its_place(mistake):
    opt = yaml.safe_load((OPTIONS / 'train_dpmambair.yml').read_text(encoding='utf-8'))
    path, value = PLANTED[mistake]
    *sections, key = path.split('.')
    section = opt
    for name in sections:
        section = section[name]
    if value is None:
        del section[key]
    else:
        section[key] = value
    errors = [*VALIDATOR.iter_errors(opt)]
    places = {'.'.join(map(str, part.absolute_path)) for error in errors for part in (error, *(error.context or ()))}
    assert max(places, key=len) in (path, '.'.join(sections)), errors


def test_descriptions_come_from_the_table_and_from_docstrings():
    train = SCHEMA['properties']['train']['properties']
    assert 'EMA' in train['ema_decay']['description']
    assert 'skipped' not in train and 'in a row' in train['max_skipped_steps']['description']
    (network,) = (
        choice['then']
        for choice in SCHEMA['definitions']['ARCH']['allOf']
        if choice['then']['properties']['type'] == {'const': 'VmambaIR'}
    )
    assert network['description'] and network['properties']['channel_scan']['description']
    assert network['properties']['dim']['default'] == 48
