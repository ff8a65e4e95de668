"""docs/experiments.md and the option files, with small networks, and small images in the folders that they name.

The real commands run every file in options/: VmambaIR's in test_models_vmambair.py, the demo's in test_demo.py,
those of the small weights in test_train_small.py, all others here in this process.
"""

import functools
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.utils.options import ordered_yaml
from support import pipelines
from torchvision.models import AlexNet, vgg

from dpmambair_basicsr import archs
from dpmambair_basicsr.models.restoration_model import LOG_NAMES
from dpmambair_basicsr.option_checks.structure import apply_forced
from dpmambair_basicsr.prepare.public_sets import SETS
from dpmambair_basicsr.results import published_tables as published

PAGE = (pipelines.ROOT / 'docs' / 'experiments.md').read_text(encoding='utf-8')
FILES = sorted(file.name for file in (pipelines.ROOT / 'options').glob('*.yml'))
RUN_HERE = [name for name in FILES if not re.match(r'demo_|(train|test)_(vmambair_|your_own|small)', name)]
NOT_PAPER = '^demo_|_your_own|_small'  # of ours alone
STAGES = ('train_degradation_extractor.yml', 'train_dpmambair.yml')
SMALL = {
    'DPMambaIR': {'dim': 8, 'num_blocks': [1] * 4, 'num_refinement_blocks': 0, 'd_inner': [8] * 4},
    'VmambaIR': {'dim': 4, 'num_blocks': [1] * 4, 'num_refinement_blocks': 0},
    'DegradationAutoencoder': {'channels': 4, 'num_fusion_blocks': 1, 'num_refine_blocks': 1},
}
EXTRACTOR = {'DPMambaIR', 'DegradationAutoencoder'}
WEIGHTS = {'alex': 'alexnet.pth', 'vgg': 'vgg16.pth'}
SHORT = {
    'train:total_iter': 2, 'train:pbar': 'false', 'val:val_freq': 2,
    'logger:print_freq': 1, 'logger:save_checkpoint_freq': 2, 'logger:use_tb_logger': 'false',
    'datasets:train:num_worker_per_gpu': 0, 'datasets:train:batch_size_per_gpu': 2,
    'datasets:train:dataset_enlarge_ratio': 8,
}  # fmt: skip


def option_file(name: str) -> Path:
    return pipelines.ROOT / 'options' / name


def parse(text: str) -> dict:
    return yaml.load(text, Loader=ordered_yaml()[0])


def read(name: str) -> dict:
    return parse(option_file(name).read_text(encoding='utf-8'))


def reduced(name: str) -> list[str]:
    """`--force_yml` entries that make a run of the option file small."""
    opt = read(name)
    kind = opt['network_g']['type']
    network = SMALL[kind] | ({'extractor_channels': [4, 4]} if kind in EXTRACTOR else {})
    changes = {'num_gpu': 0} | {f'network_g:{key}': value for key, value in network.items()}
    if 'train' in opt:
        changes |= SHORT
        if 'gt_size' in opt['datasets']['train']:
            changes['datasets:train:gt_size'] = 64  # LPIPS with AlexNet needs 63
        if 'progressive' in opt['datasets']['train']:
            phases = {'gt_sizes': '[56, 64]', 'batch_sizes': '[2, 1]', 'iters': '[1, 1]'}
            changes |= {f'datasets:train:progressive:{key}': value for key, value in phases.items()}
        if 'lpips_opt' in opt['train']:
            changes['train:lpips_opt:weights'] = 'alexnet.pth'
        if 'queue_size' in opt:
            changes |= {'queue_size': 2, 'gt_size': 32}
    elif 'lpips' in opt['val']['metrics']:
        changes['val:metrics:lpips:weights'] = WEIGHTS[opt['val']['metrics']['lpips']['net']]
    return [f'{key}={value}' for key, value in changes.items()]


# The page


def tables() -> list[tuple[str, dict[str, str]]]:
    """(option file of the section, {heading: cell}) for every row with a recipe."""
    rows = []
    for section in PAGE.split('\n## ')[1:]:
        for table in re.findall(r'(?:^\|.*\n)+', section, re.MULTILINE):
            header, _, *lines = ([cell.strip() for cell in line[1:-1].split('|')] for line in table.splitlines())
            if '`--force_yml`' in header:
                file = re.search(r'dpmambair_basicsr\.train -opt options/(\S+\.yml)', section)[1]
                rows += [(file, dict(zip(header, line, strict=True))) for line in lines]
    return rows


def blocks() -> list[list[tuple[str, str, list[str]]]]:
    """('train' or 'test', option file, `--force_yml` entries) of every command, block by block."""
    found = []
    for block in re.findall(r'```bash\n(.*?)```', PAGE, re.DOTALL):
        lines = [shlex.split(line) for line in block.replace('\\\n', ' ').splitlines()]
        assert all(line[:2] == ['python', '-m'] and line[3] == '-opt' for line in lines)
        assert all(line[5:6] in ([], ['--force_yml']) for line in lines)
        found.append([(line[2].rpartition('.')[2], line[4].removeprefix('options/'), line[6:]) for line in lines])
    return found


def recipe(row: dict[str, str], heading: str = '`--force_yml`') -> list[str]:
    return shlex.split(row.get(heading, '').strip('`'))


ROWS = tables()
LINES = range(len(ROWS))
IDS = [f'{line} {ROWS[line][1]["row"]}' for line in LINES]
PARTS = {
    **{f'P_{name}': f'.modulation.layers.{part}.' for name, part in (('Δ', 'delta_scale'), ('B', 'B'), ('C', 'C'))},
    'HEB': '.high_frequency.alpha',
}
BLOCKS = {commands[0][2][0] if commands[0][2] else 'the file itself': commands for commands in blocks()}


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A folder with images at all paths of option files and page, and both stages trained; returns their logs."""
    folder = tmp_path_factory.mktemp('project')
    sizes = [(64, 72), (66, 64)]
    pairs = {name: pipelines.write_pairs(folder / name, sizes, 4 if name[2:] else 1) for name in ('LQ', 'LQ_x4')}
    photos = pipelines.write_photos(folder / 'photos')['dataroot_gt']
    for text in [PAGE, *(option_file(name).read_text(encoding='utf-8') for name in FILES)]:
        for place in set(re.findall(r'dataroot_\w+[=:] *(datasets/[\w/]+)', text)):
            parent, _, last = place.rpartition('/')
            scaled = 'LQ_x4' if f'{parent}/LQ_x4' in text else 'LQ'
            places = {name: pair['dataroot_lq'] for name, pair in pairs.items()} | {'DF2K_OST': photos}
            places |= {'GT': pairs[scaled]['dataroot_gt'], 'clean': pairs['LQ']['dataroot_gt']}
            if last in places and not (folder / place).exists():
                (folder / parent).mkdir(parents=True, exist_ok=True)
                (folder / place).symlink_to(places[last], target_is_directory=True)
    torch.manual_seed(0)
    for name, features in {'alexnet': AlexNet().features, 'vgg16': vgg.make_layers(vgg.cfgs['D'])}.items():
        torch.save({f'features.{key}': value for key, value in features.state_dict().items()}, folder / f'{name}.pth')
    return folder, {name: run('train', name, [], folder) for name in STAGES}


def run(stage: str, name: str, forced: list[str], folder) -> str:
    file = folder / name
    shutil.copy(option_file(name), file)
    return getattr(pipelines, stage)(file, '--force_yml', *forced, *reduced(name), cwd=folder)


def results_of(name: str, folder) -> dict:
    return json.loads((folder / 'results' / name / 'results.json').read_text(encoding='utf-8'))


def test_every_ssim_of_dpmambair_is_marked():
    for section in PAGE.split('\n## ')[1:]:
        headers = (
            re.findall(r'^\|(?=.*SSIM).*$', section, re.MULTILINE) if 'DPMambaIR' in section.partition('\n')[0] else ()
        )
        assert all('PSNR / SSIM (other SSIM)' in header for header in headers), section[:40]
    assert '27.69 / 0.893 (other SSIM)' in PAGE


# Option files


@pytest.mark.parametrize('name', RUN_HERE)
def test_option_file_runs(name, project):
    """Training: each loss is there and finite, both metrics are measured, the network is kept. Test: a table."""
    folder, logs = project
    opt = read(name)
    if 'train' not in opt:
        run('test', name, [], folder)
        sets = results_of(opt['name'], folder)['sets']
        assert [part['name'] for part in sets] == [data['name'] for data in opt['datasets'].values()]
        assert [part['degradation'] for part in sets] == [
            data.get('degradation') or next(iter(data['degradations'])) for data in opt['datasets'].values()
        ]
        assert all(part[kind].keys() == {'psnr', 'ssim'} for part in sets for kind in ('restored', 'unrestored'))
        return
    log = logs[name] if name in logs else run('train', name, [], folder)
    for key in opt['train']:
        if key.endswith('_opt'):
            loss = LOG_NAMES.get(key, f'l_{key.removesuffix("_opt")}')
            values = re.findall(rf'{loss}: (\S+)', log)
            assert len(values) == 2 and all(math.isfinite(float(value)) for value in values), key
    for metric in opt['val']['metrics']:
        assert re.search(rf'Validation {opt["datasets"]["val"]["name"]}\n(?:.*\n)*?.*# {metric}: \d', log)
    assert (folder / 'experiments' / opt['name'] / 'models' / 'net_g_2.pth').is_file()


@pytest.mark.parametrize('name', [name for name in RUN_HERE if re.search('_dpmambair|_single_task', name)])
def test_the_schedule_of_dpmambair_follows_restormer_up_to_the_papers_size(name):
    """Zamir et al. 2022, Sec. 4: per GPU 8 crops of 128, 5 of 160, 4 of 192, for 92k, 64k, 48k iterations."""
    opt = read(name)
    phases, total = opt['datasets']['train']['progressive'], opt['train']['total_iter']
    assert (phases['gt_sizes'], phases['batch_sizes']) == ([128, 160, 192], [8, 5, 4])
    assert sum(phases['iters']) == total == 300_000
    for iters, restormer in zip(phases['iters'], (92, 64, 48), strict=True):
        assert iters / total == pytest.approx(restormer / 204, abs=0.002)


def test_the_page_names_every_option_file_and_no_other():
    assert set(re.findall(r'\w+\.yml', PAGE)) == {
        name for name in FILES if not re.search('^demo_|_your_own|_small', name)
    }


# One degradation alone


def test_folders_match_those_of_prepare_data():
    made = {folder for public in SETS.values() for part in public.parts.values() for folder in (part.gt, part.lq)}
    places = set(re.findall(r'=datasets/(?:LOL/)?(\S+)', PAGE))
    assert len(places) > 8 and places <= made


@pytest.mark.parametrize('block', BLOCKS)
def test_commands_of_the_page_run(block, project):
    folder, _ = project
    (train, train_file, train_forced), (test, test_file, test_forced) = BLOCKS[block]
    assert (train, test) == ('train', 'test')
    log = run('train', train_file, train_forced, folder)
    run('test', test_file, test_forced, folder)
    opt = read(test_file)
    assert apply_forced(opt, test_forced) == []
    result = results_of(opt['name'], folder)
    (part,) = result['sets']
    assert f'Validation {part["name"]}\n' in log, 'trained and tested on different sets'
    kinds = {'Rain100H': 'rain', 'LOL': 'lowlight', 'GoPro': 'blur', 'RESIDE6K': 'haze'}
    assert part['degradation'] == kinds[part['name']]
    assert result['checkpoint'].split('/')[-3] == f'train_{part["name"].lower()}'
    row = re.search(rf'^\| {part["name"]} \|.*\| (\S+) / (\S+)', PAGE, re.MULTILINE)
    alone = [table.rows() for table in published.TABLES if table.sets == (part['name'],)]
    assert [list(methods['DPMambaIR'][part['name']].values()) for methods in alone] == [list(row.groups())]


# Ablations


@functools.cache
def full_size(line: int) -> torch.nn.Module:
    file, row = ROWS[line]
    opt = parse(option_file(file).read_text(encoding='utf-8'))
    assert apply_forced(opt, recipe(row)) == []
    kind = opt['network_g'].pop('type')
    with torch.device('meta'):
        return getattr(archs, kind)(**opt['network_g'])


def shapes(network: torch.nn.Module) -> dict:
    return {name: value.shape for name, value in network.state_dict().items()}


@pytest.mark.parametrize('line', LINES, ids=IDS)
def test_a_row_is_the_network_that_it_describes(line):
    """At full size: its number of parameters, its ticks, and that no other recipe builds the same network."""
    row = ROWS[line][1]
    own = shapes(full_size(line))
    count = sum(parameter.numel() for parameter in full_size(line).parameters())
    assert row['parameters (M)'] == f'{count / 1e6:.3f}'
    for name, part in PARTS.items():
        assert name not in row or bool(row[name]) == any(part in key for key in own), name
    same = [ROWS[other][1] for other in LINES if shapes(full_size(other)) == own]
    assert {tuple(recipe(other)) for other in same} == {tuple(recipe(row))}


@pytest.mark.parametrize('line', [line for line in LINES if recipe(ROWS[line][1])])
def test_a_row_trains_and_tests(line, project):
    folder, _ = project
    file, row = ROWS[line]
    if stage_1 := recipe(row, '`--force_yml` of stage 1'):
        run('train', STAGES[0], stage_1, folder)
    name = f'row_{line}'
    log = run('train', file, [*recipe(row), f'name={name}'], folder)
    assert len(re.findall(r'l_pix: \d', log)) == 2
    test = 'test_all_in_one.yml' if 'dpmambair' in file else 'test_vmambair_realsr_x4.yml'
    network = [entry for entry in recipe(row) if entry.startswith('network_g:')]
    checkpoint = f'path:pretrain_network_g=experiments/{name}/models/net_g_latest.pth'
    run('test', test, [f'name={name}', checkpoint, *network], folder)
    result = results_of(name, folder)
    assert result['checkpoint'].endswith(f'{name}/models/net_g_latest.pth')
    assert len(result['sets']) == len(read(test)['datasets'])
