"""Studies: their files and tables, one that is killed and continued, and the verification of its results."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from support import pipelines
from support.commands import PACKAGE_PARENT, command, warm_python

from dpmambair_basicsr import archs
from dpmambair_basicsr.evidence import verify
from dpmambair_basicsr.evidence.jobs import Command, failure, run_jobs
from dpmambair_basicsr.evidence.study import filled, find_options, read_study, with_iterations
from dpmambair_basicsr.evidence.study import trial as commands_of_trial
from dpmambair_basicsr.files.errors import InputError, OptionError
from dpmambair_basicsr.files.option_files import read_options
from dpmambair_basicsr.option_checks.structure import apply_forced
from dpmambair_basicsr.results.run import Run, SetResult
from dpmambair_basicsr.results.study_table import Trial, tabulate, to_csv, to_json, to_markdown, write_table

SHIPPED = sorted((PACKAGE_PARENT / 'options' / 'studies').glob('*.yml'))
OPTIONS = """
name: tiny
model_type: RestorationModel
scale: 1
num_gpu: 0
datasets:
  train:
    name: noise
    type: PairedDegradationDataset
    gt_size: 16
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 2
    dataset_enlarge_ratio: 100
network_g: {type: SRVGGNetCompact, num_feat: 4, num_conv: 1, upscale: 1}
path: {pretrain_network_g: ~, resume_state: ~}
train:
  optim_g: {type: Adam, lr: 1.0e-3}
  scheduler: {type: MultiStepLR, milestones: [100], gamma: 0.5}
  total_iter: 2
  ema_decay: 0.9
  pixel_opt: {type: L1Loss}
logger: {print_freq: 1, save_checkpoint_freq: 2, use_tb_logger: false}
"""
TEST = """
name: tiny
model_type: RestorationModel
scale: 1
num_gpu: 0
datasets:
  test_1: {name: first, type: PairedDegradationDataset}
  test_2: {name: second, type: PairedDegradationDataset}
network_g: {type: SRVGGNetCompact, num_feat: 4, num_conv: 1, upscale: 1}
path: {pretrain_network_g: ~}
val:
  save_img: true
  suffix: restored
  metrics: {psnr: {type: calculate_psnr, crop_border: 0}}
"""
STUDY = {
    'name': 'tiny',
    'baseline': 'small',
    'seeds': [3, 4],
    'train': {'options': 'train.yml', 'iterations': 120},
    'test': {'options': 'test.yml'},
    'variants': {'small': {}, 'large': {'force_yml': ['network_g:num_feat=6']}},
}


def write(folder: Path, study: dict) -> Path:
    """Writes the study file, and the option files and images that it needs."""
    train, test = yaml.safe_load(OPTIONS), yaml.safe_load(TEST)
    pairs = {name: folder / 'datasets' / name for name in ('train', 'first', 'second')}
    if not pairs['train'].exists():
        pairs = {name: pipelines.write_pairs(place, [(24, 25), (26, 24)]) for name, place in pairs.items()}
        train['datasets']['train'] |= pairs['train']
        for data in test['datasets'].values():
            data |= pairs[data['name']]
        (folder / 'train.yml').write_text(yaml.safe_dump(train))
        (folder / 'test.yml').write_text(yaml.safe_dump(test))
    (folder / 'study.yml').write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / 'study.yml'


# The file


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('baseline', 'huge', "baseline: 'huge' is not one of the variants: small, large"),
        ('seeds', [1, 1], 'seeds: expected one or more, all different'),
        ('seeds', [-1], 'seeds: must be in [0, 4294967295], got -1'),
        ('seeds', 'five', 'seeds: expected a list, got "five"'),
        ('sedes', [1], "the file: unknown 'sedes'"),
        ('train.iterations', 0, 'train.iterations: expected 1 or more'),
        ('train.options', 'nowhere.yml', 'train.options: nowhere.yml: no such option file here or in the package'),
        ('test.force_yml', ['name={sede}'], 'test.force_yml: {sede} must be one of seed, iterations'),
        ('variants.small', {'forced': []}, "variants.small: unknown 'forced'"),
        ('variants', {'small': {}, 4: {}}, 'variants: 4 must be text: write it in quotes'),
        ('variants', {'small': {}, False: {}}, 'variants: False must be text: write it in quotes'),
        ('variants.a=b', {}, 'variants.a=b: must not have a =, as --force_yml cannot'),
        ('variants.a/b', {}, "variants.a/b: must be one name, without / \\ and control characters, not 'a/b'"),
    ],
)
def test_a_wrong_study_file_is_one_line_with_file_and_key(path, value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = copy.deepcopy(STUDY)
    *sections, key = path.split('.')
    section = study
    for name in sections:
        section = section[name]
    section[key] = value
    file = write(tmp_path, study)
    with pytest.raises(OptionError, match=f'^{re.escape(f"{file}: {message}")}$'):
        read_study(file)


def test_names_in_braces_are_replaced_by_values(tmp_path):
    study = read_study(PACKAGE_PARENT / 'options/studies/dpmambair_table3.yml')
    entries = filled(['a={seed}', 'b=[{iterations}]', 'c={extractor}', 'd=!!map {}'], study, tmp_path, 7, 20)
    checkpoint = tmp_path / 'before/extractor/seed_7/train/models/net_g_latest.pth'
    assert entries == ['a=7', 'b=[20]', f'c={checkpoint}', 'd=!!map {}']


def test_another_budget_leaves_earlier_trainings_unchanged():
    study = read_study(PACKAGE_PARENT / 'options/studies/pretraining.yml')
    shorter = with_iterations(study, 30)
    assert shorter.train.iterations == 30 != study.train.iterations and shorter.before == study.before


@pytest.mark.parametrize('file', SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_study_trains_and_tests_networks_that_differ(file, tmp_path):
    """Its entries match its option files, and a variant's test builds the same network as its training."""
    study = read_study(file)
    assert study.name == file.stem
    described = {}
    for name, variant in study.variants.items():
        of_network = [entry for entry in variant.force_yml if entry.startswith('network_g')]
        train = read_options(find_options(variant.train or study.train.options))
        entries = filled(study.train.force_yml + variant.force_yml, study, tmp_path, 0, study.train.iterations)
        assert apply_forced(train, entries) == []
        test = read_options(find_options(variant.test or study.test.options))
        assert apply_forced(test, filled(study.test.force_yml + of_network, study, tmp_path, 0, 1)) == []
        made = []
        for opt in (train, test):
            arguments = dict(opt['network_g'])
            with torch.device('meta'):
                network = getattr(archs, arguments.pop('type'))(**arguments)
            made.append({key: value.shape for key, value in network.state_dict().items()})
        assert made[0] == made[1], name
        described[name] = json.dumps([train['network_g'], train['path'], train['train']], sort_keys=True)
    assert len(set(described.values())) == len(study.variants)


# The table


def trial(variant: str, seed: int, psnr: float, hashes: dict | None = None) -> Trial:
    part = SetResult('set', 1, '', {'a': 'a.png'}, {'psnr': psnr}, {'psnr': 10.0}, hashes or {'a': '0'})
    metrics = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}
    run = Run('x', 'x.yml', [], 'x.pth', 'params', 'abc', {'torch': '2'}, metrics, 'x', [part], 'cpu')
    return Trial(variant, seed, Path(variant, str(seed)), run, 1234, 0.5)


def test_differences_are_paired_by_seed_and_only_over_common_seeds():
    trials = [trial('a', 0, 20.0), trial('b', 1, 33.0), trial('b', 0, 21.0), trial('a', 1, 30.0), trial('b', 2, 0.0)]
    table = tabulate('study', 'a', ['a', 'b'], 6, trials)
    row = table.row('b', 'set', 'psnr')
    assert row.mean == 18 and row.difference.mean == 2  # of 1 and 3
    half = math.tan(math.pi * 0.475)
    assert (row.difference.low, row.difference.high) == pytest.approx((2 - half, 2 + half))
    assert table.row('a', 'set', 'psnr').difference is None
    text = to_markdown(table)
    assert '5 of 6 finished' in text and '+2.000 \\[-10.706, +14.706\\]' in text and '25.000 ± 7.071' in text
    assert to_csv(table).splitlines()[2].startswith('b,set,psnr,3,18.0,')


def test_a_study_with_one_seed_has_no_interval_and_valid_json():
    table = tabulate('study', 'a', ['a', 'b'], 2, [trial('a', 0, 20.0), trial('b', 0, 21.0)])
    assert '+1.000 (one seed)' in to_markdown(table)
    difference = json.loads(to_json(table))['rows'][1]['difference']
    assert difference == {'mean': 1.0, 'low': None, 'high': None}


def test_a_perfect_result_is_infinite_and_the_table_is_written(tmp_path):
    trials = [trial('a', 0, math.inf), trial('b', 0, 40.0), trial('a', 1, 41.0), trial('b', 1, 42.0)]
    table = tabulate('study', 'a', ['a', 'b'], 4, trials)
    write_table(table, tmp_path)
    text = (tmp_path / 'study.md').read_text()
    assert re.search(r'\| a +\|.* inf \|', text) and re.search(r'\| b +\|.* 41.000 ± 1.414 \| +\(not finite\) \|', text)
    first, second = json.loads((tmp_path / 'study.json').read_text())['rows']
    assert first['mean'] is None and second['difference'] == {'mean': None, 'low': None, 'high': None}


def test_trials_on_different_images_are_not_in_one_table():
    with pytest.raises(InputError, match='a/0 and b/0 have different test images'):
        tabulate('study', 'a', ['a', 'b'], 2, [trial('a', 0, 20.0), trial('b', 0, 21.0, {'a': '1'})])


# A study


@contextmanager
def one_thread():
    """As in the processes of a study."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def start_study(folder: Path) -> subprocess.Popen:
    environment = os.environ | {'PYTHONPATH': str(PACKAGE_PARENT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'dpmambair_basicsr', 'study', 'study.yml', '--jobs', '2']
    with open(folder / 'log.txt', 'ab') as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.parametrize('name', ['{seed}', '{b}'])
def test_braces_in_names_stay(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = read_study(write(tmp_path, copy.deepcopy(STUDY) | {'baseline': name, 'variants': {name: {}}}))
    train, test = commands_of_trial(study, Path(f'{name}s'), name, 3)
    assert train.result == Path(f'{name}s/trials/{name}/seed_3/train/models/net_g_latest.pth')
    assert f'path:pretrain_network_g={train.result}' in test.record['force_yml']


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """The folder of a study that was killed in a training, with all its processes, and then continued."""
    folder = tmp_path_factory.mktemp('study')
    write(folder, STUDY)
    process, end = start_study(folder), time.monotonic() + 900
    states = 'studies/tiny/trials/*/seed_4/train/training_states/60.state'
    while not (found := [*folder.glob(states)]):
        assert process.poll() is None and time.monotonic() < end, (folder / 'log.txt').read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (found[0].parents[1] / 'models/net_g_latest.pth').exists(), 'killed too late'
    assert start_study(folder).wait(900) == 0, (folder / 'log.txt').read_text()
    return folder


def test_a_killed_study_continues_to_the_numbers_of_an_uninterrupted_training(study):
    place = study / 'studies/tiny'
    log = (study / 'log.txt').read_text()
    assert 'tiny: 0 of 4' in log and re.search('tiny: [123] of 4 trials finished', log) and '[4/4]' in log
    own = next(
        file.parent for file in place.glob('trials/*/seed_4/output.txt') if 'Resuming training from' in file.read_text()
    )
    for module in ('train', 'test'):
        record = json.loads((own / f'{module}.json').read_text())
        entries = [entry.replace('seed_4/t', 'seed_4/again/t') for entry in record['force_yml']]
        options = (f'{module}.yml', '--force_yml', *entries)
        if module == 'train':  # in its own process: a second training in a process would have other random numbers
            assert command('train', '-opt', *options, cwd=study).returncode == 0
        else:
            with one_thread():
                pipelines.test(*options, cwd=study)
    again = json.loads((own / 'again/test/results.json').read_text())
    table = json.loads((place / 'study.json').read_text())
    for part in [*again['sets'], again['average'] | {'name': 'average'}]:
        (row,) = (row for row in table['rows'] if (row['variant'], row['set']) == (own.parent.name, part['name']))
        assert row['values']['4'] == part['restored']['psnr']


def test_a_study_writes_its_table_with_intervals(study):
    place = study / 'studies/tiny'
    table = json.loads((place / 'study.json').read_text())
    large = next(row for row in table['rows'] if (row['variant'], row['set']) == ('large', 'average'))
    assert large['difference']['low'] < large['difference']['mean'] < large['difference']['high']
    assert table['facts']['trials'] == '4 of 4 finished'
    names = {f'study.{suffix}' for suffix in ('md', 'csv', 'json', 'html', 'png')}
    assert {file.name for file in place.iterdir() if file.is_file()} == names
    page = (place / 'study.html').read_text()
    assert page.count('class="pair"') == 4, 'two variants, two sets'
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_study_refuses_trials_started_with_other_options(study):
    changed = copy.deepcopy(STUDY)
    changed['variants']['large']['force_yml'] = ['network_g:num_feat=8']
    (study / 'changed.yml').write_text(yaml.safe_dump(changed))
    result = warm_python('-m', 'dpmambair_basicsr', 'study', 'changed.yml', cwd=study)
    assert result.returncode == 1
    assert 'large/seed_3: was started with options that differ from the study file' in result.stdout.splitlines()[-1]


def test_wrong_options_of_all_variants_are_reported_before_anything_starts(study):
    wrong = copy.deepcopy(STUDY) | {'name': 'wrong'}
    wrong['variants']['large']['force_yml'] = ['network_g:num_fea=8']
    wrong['train']['force_yml'] = [*wrong['train'].get('force_yml', []), 'train:total_itr=3']
    (study / 'wrong.yml').write_text(yaml.safe_dump(wrong))
    result = warm_python('-m', 'dpmambair_basicsr', 'study', 'wrong.yml', cwd=study)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    start = lines.index('dpmambair study: wrong: problems in the options:')
    told = [line.strip() for line in lines[start + 1 :]]
    assert told == [
        'variants.large, train: train.total_itr: unknown key, did you mean total_iter?',  # of both, told once
        'variants.large, train: network_g.num_fea: unknown key, did you mean num_feat?',
    ]
    assert not list((study / 'studies/wrong').rglob('output.txt'))


def test_tests_that_cannot_share_a_table_are_reported_before_anything_starts(study):
    other = yaml.safe_load((study / 'test.yml').read_text())
    other['datasets'] = {'test_1': other['datasets']['test_2'], 'test_2': other['datasets']['test_1']}
    (study / 'order.yml').write_text(yaml.safe_dump(other))
    del other['datasets']['test_1']
    other['val']['metrics']['psnr']['crop_border'] = 2
    (study / 'other.yml').write_text(yaml.safe_dump(other))
    del other['val']['metrics']
    (study / 'without.yml').write_text(yaml.safe_dump(other))
    files = {'large': 'other.yml', 'third': 'without.yml', 'fourth': 'order.yml'}
    variants = {'small': {}} | {name: {'test': file} for name, file in files.items()}
    (study / 'tests.yml').write_text(yaml.safe_dump(STUDY | {'name': 'tests', 'variants': variants}, sort_keys=False))
    result = warm_python('-m', 'dpmambair_basicsr', 'study', 'tests.yml', cwd=study)
    assert result.returncode == 1
    assert [line.strip() for line in result.stdout.splitlines()][-3:] == [
        'variants.large, test: val.metrics: must be those of variants.small, test',
        'variants.large, test: the names of datasets: must be those of variants.small, test',
        'variants.third, test: val.metrics: required, as a study compares them',
    ]
    assert not (study / 'studies/tests/trials').exists()


def test_a_failed_command_is_one_line_with_its_last_output(tmp_path):
    output = tmp_path / 'output.txt'
    output.write_text('much\nValueError: this\n\n')
    message = failure(Command('train', [], output, tmp_path / 'result', {}), 1)
    assert message == f'train ended with status 1: ValueError: this (full output: {output})'


def test_completed_jobs_end_at_once(tmp_path):
    """Like the trainings before the trials when a study continues."""
    (tmp_path / 'result').touch()
    jobs = [[Command('train', [], tmp_path / f'{i}.txt', tmp_path / 'result', {})] for i in range(3)]
    done, started = [], []
    thread = threading.Thread(target=run_jobs, args=(jobs, [''], done.append, started.append), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and done == jobs and not started


# Verification


def verified(folder: Path, monkeypatch, capsys) -> tuple[int | str, str]:
    """The exit status or message, and what was printed."""
    monkeypatch.setattr(sys, 'argv', ['verify', str(folder)])
    with one_thread(), pytest.raises(SystemExit) as end:
        verify.main()
    return end.value.code, capsys.readouterr().out


@pytest.fixture
def results(study, monkeypatch):
    """The results folder of a test, whose results.json is as it was after each test."""
    folder = study / 'studies/tiny/trials/small/seed_3/test'
    monkeypatch.chdir(study)
    file = folder / 'results.json'
    content = file.read_text()
    yield folder, json.loads(content)
    file.write_text(content)


def test_results_are_reproduced_bit_for_bit(results, monkeypatch, capsys):
    before = {file: file.stat().st_mtime_ns for file in results[0].rglob('*')}
    status, output = verified(results[0], monkeypatch, capsys)
    lines = [line for line in output.splitlines() if 'psnr' in line]
    assert [line.partition(':')[0] for line in lines] == ['first/00', 'second/00', 'first/01']
    assert all(line.endswith('bit-identical') for line in lines) and status == 0
    assert output.endswith('the numbers repeat (same device and versions)\n')
    assert {file: file.stat().st_mtime_ns for file in results[0].rglob('*')} == before, 'it writes nothing'


@pytest.mark.parametrize(('change', 'status'), [(1e-9, 1), (0.0, 0)])
def test_a_number_that_differs_in_its_last_digits_is_reported(change, status, results, monkeypatch, capsys):
    folder, content = results
    content['sets'][0]['samples']['00']['values']['psnr'] += change
    (folder / 'results.json').write_text(json.dumps(content))
    found, output = verified(folder, monkeypatch, capsys)
    assert found == status and ('DO NOT repeat' in output) == bool(status)


@pytest.mark.parametrize(('change', 'status', 'text'), [(1e-9, 0, 'agree to 0.001'), (1.0, 1, 'DO NOT repeat')])
def test_with_other_versions_numbers_must_agree_to_a_thousandth(change, status, text, results, monkeypatch, capsys):
    folder, content = results
    content['versions']['torch'] = '1.0'
    content['sets'][0]['samples']['00']['values']['psnr'] += change
    (folder / 'results.json').write_text(json.dumps(content))
    found, output = verified(folder, monkeypatch, capsys)
    assert found == status and text in output and f'torch {torch.__version__}, then 1.0' in output


def change_checkpoint(folder, content):
    content['sha256'] = '0' * 64


def change_image(folder, content):
    content['sets'][0]['hashes']['00'] = '0' * 64


def change_truth(folder, content):
    content['sets'][0]['samples']['00']['truth'] = '0' * 64


def forget_hashes(folder, content):
    for part in content['sets']:
        del part['hashes'], part['samples']
    del content['device']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (change_checkpoint, 'net_g_latest.pth: not the checkpoint of the test, whose SHA-256 is 0000'),
        (change_image, 'first: image 0 is no longer 00: the data have changed'),
        (change_truth, 'first: the clean image of 00 has changed since the test'),
        (forget_hashes, 'its results.json has no hashes, since an earlier version wrote it; run the test again'),
    ],
)
def test_anything_that_differs_from_the_test_is_one_line(change, message, results, monkeypatch, capsys):
    folder, content = results
    change(folder, content)
    (folder / 'results.json').write_text(json.dumps(content))
    error, _ = verified(folder, monkeypatch, capsys)
    assert message in error and '\n' not in error
