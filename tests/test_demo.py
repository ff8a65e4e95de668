"""The demo's scripts and option files, by the commands of scripts/demo.py, at 64 pixels and two iterations."""

import re
import runpy
import shutil

import cv2
import pytest
import yaml
from support.commands import PACKAGE_PARENT, command, warm_python

from dpmambair_basicsr.data.degradations import demo_strengths

pytest.importorskip('skimage', reason='its photographs are the data of the demo')
pytest.importorskip('sklearn', reason='its photographs are the data of the demo')


def demo_options(name: str) -> dict:
    return yaml.safe_load((PACKAGE_PARENT / 'options' / f'demo_{name}.yml').read_text(encoding='utf-8'))


def test_option_files_agree():
    """BasicSR's option files cannot share values, so all but the strengths are repeated."""
    extractor, network, test = map(demo_options, ('degradation_extractor', 'dpmambair', 'test_dpmambair'))
    parts = network['datasets']['train']['datasets']
    assert extractor['datasets']['train']['degradations'] == 'demo'
    assert [part['degradations'] for part in parts.values()] == [{kind: 'demo'} for kind in demo_strengths()]
    assert list(parts) == list(demo_strengths()) == list(network['datasets']['train']['sampling'])
    assert network['network_g'] == test['network_g']
    for key in ('embed_dim', 'extractor_channels', 'extractor_hidden'):
        assert extractor['network_g'][key] == network['network_g'][key]
    assert [data['degradation'] for data in test['datasets'].values()] == list(demo_strengths())


def demo_commands() -> list[tuple[str, ...]]:
    """What demo.py calls Python with, at 64 pixels and two iterations."""
    short = ('train:total_iter=2', 'datasets:train:gt_size=16', 'datasets:train:batch_size_per_gpu=2')
    return [
        ('scripts/make_demo_data.py', '--size', '64'),
        *(
            ('train', '-opt', f'options/demo_{stage}.yml', '--force_yml', *short)
            for stage in ('degradation_extractor', 'dpmambair')
        ),
        ('test', '-opt', 'options/demo_test_dpmambair.yml'),
        ('scripts/demo_report.py',),
    ]


def test_the_demo_runs_and_reports(tmp_path):
    for folder in ('options', 'scripts'):
        shutil.copytree(PACKAGE_PARENT / folder, tmp_path / folder)
    commands = demo_commands()
    steps = runpy.run_path(str(PACKAGE_PARENT / 'scripts/demo.py'))['STEPS']
    written = re.findall(r'^(?:-m dpmambair_basicsr\.)?(\S+)', steps, re.M)
    assert written == [name for name, *_ in commands]
    for first, *arguments in commands:
        run = command if first in ('train', 'test') else warm_python
        done = run(first, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
    results = tmp_path / 'results' / 'demo'
    lines = (results / 'table.md').read_text(encoding='utf-8').splitlines()
    assert [line.split('|')[1].strip() for line in lines[2:10]] == [*demo_strengths(), 'average']
    assert re.search(r'names the degradation of \d+% of 168 images', lines[-1])
    assert cv2.imread(str(results / 'comparison.png')).shape == (28 + 3 * 64, 28 + 7 * 64, 3)
