"""The table of a test, several tests in one table, the page, and a training's log: averages, best network, draws."""

import base64
import csv
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from support import commands, pipelines
from support.browser import browser

from dpmambair_basicsr import report
from dpmambair_basicsr.archs import DegradationAutoencoder, VmambaIR
from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.results import published_tables as published
from dpmambair_basicsr.results import run as results
from dpmambair_basicsr.results.comparison import key_of
from dpmambair_basicsr.results.page import bars

metrics = pytest.importorskip('skimage.metrics', reason='its metrics are the reference')

NETWORK = {'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}
METRICS = {
    'psnr': {'type': 'calculate_psnr', 'crop_border': 0},
    'ssim': {'type': 'calculate_ssim', 'crop_border': 0},
}
MADE = 'made | <here>'  # a dataset's name with markup, whose degraded images are not files


def options(name: str, datasets: dict, path: dict, **sections) -> dict:
    network = {'type': 'VmambaIR', **NETWORK}
    general = {'name': name, 'model_type': 'RestorationModel', 'scale': 1, 'num_gpu': 0, 'manual_seed': 0}
    opt = {**general, 'datasets': datasets, 'network_g': network, 'path': path}
    opt['val'] = {'save_img': True, 'suffix': None, 'metrics': METRICS}
    return opt | sections


def paired(name: str, folders: dict, **more) -> dict:
    return {'name': name, 'type': 'PairedDegradationDataset', **folders, **more}


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return pipelines.write_pairs(tmp_path_factory.mktemp('pairs'), [(40, 48), (33, 45)])


@pytest.fixture(scope='module')
def tested(pairs, tmp_path_factory):
    """A folder in which two networks have been tested on two sets, the first by the command that users type."""
    folder = tmp_path_factory.mktemp('tested')
    sets = {
        'test_1': paired('Rain100H', pairs, degradation='rain'),
        'test_2': {
            'name': MADE,
            'type': 'SyntheticDegradationDataset',
            'dataroot_gt': pairs['dataroot_gt'],
            'degradations': ['noise', 'jpeg'],
        },
    }
    logs = {}
    for seed, name in enumerate(('one', 'two')):
        torch.manual_seed(seed)
        torch.save({'params': VmambaIR(**NETWORK).state_dict()}, folder / f'{name}.pth')
        opt = options(name, sets, {'pretrain_network_g': str(folder / f'{name}.pth')})
        commands.write_options(opt, folder / f'{name}.yml')
    process = commands.command('test', '-opt', 'one.yml', '--force_yml', 'val:suffix=restored', cwd=folder)
    assert process.returncode == 0, process.stdout
    logs = {'one': process.stdout, 'two': pipelines.test(folder / 'two.yml', cwd=folder)}
    return folder, logs


def measure(image, truth) -> dict[str, float]:
    ssim = {'gaussian_weights': True, 'sigma': 1.5, 'use_sample_covariance': False, 'channel_axis': 2}
    return {
        'psnr': metrics.peak_signal_noise_ratio(truth, image, data_range=255),
        'ssim': metrics.structural_similarity(
            truth.astype(np.float64), image.astype(np.float64), data_range=255, **ssim
        ),
    }


def mean_over(paths, pairs) -> dict[str, float]:
    """Mean over the images whose names begin with that of their GT image."""
    gt = {name: cv2.imread(f'{pairs["dataroot_gt"]}/{name}.png') for name in ('00', '01')}
    values = [measure(cv2.imread(str(path)), gt[path.name[:2]]) for path in paths]
    assert values
    return {name: np.mean([value[name] for value in values]) for name in METRICS}


# The table of one test


def test_the_table_has_the_metrics_of_input_and_output_and_their_averages(tested, pairs):
    folder, _ = tested
    root = folder / 'results' / 'one'
    content = json.loads((root / 'results.json').read_text())
    inputs = {
        'Rain100H': list((folder / pairs['dataroot_lq']).glob('*')),
        MADE: list((root / 'input' / MADE).glob('*')),
    }
    assert [(part['name'], part['count'], part['degradation']) for part in content['sets']] == [
        ('Rain100H', 2, 'rain'),
        (MADE, 4, ''),
    ]
    for part in content['sets']:
        restored = list((root / 'visualization' / part['name']).glob('*_restored.png'))
        assert len(restored) == len(inputs[part['name']]) == part['count']
        assert part['unrestored'] == pytest.approx(mean_over(inputs[part['name']], pairs), abs=1e-3)
        assert part['restored'] == pytest.approx(mean_over(restored, pairs), abs=1e-3)
    for kind, average in content['average'].items():
        for metric in METRICS:
            assert average[metric] == pytest.approx(np.mean([part[kind][metric] for part in content['sets']]))


def test_the_three_files_say_the_same_and_what_was_tested_with_what(tested):
    folder, logs = tested
    root = folder / 'results' / 'one'
    run = results.read_run(root)
    assert (run.options, run.forced) == ('one.yml', ['val:suffix=restored'])
    assert run.sha256 == hashlib.sha256((folder / 'one.pth').read_bytes()).hexdigest()
    assert set(run.versions) == {'torch', 'basicsr', 'dpmambair_basicsr'}
    assert run.versions['torch'] == torch.__version__

    text = (root / 'results.md').read_text()
    assert logs['one'].count(text.strip()) == 1, 'logged once'
    assert r'made \| \<here\>' in text
    lines = [re.split(r'(?<!\\)\|', line)[1:-1] for line in text.splitlines() if line.startswith('|')]
    rows = list(csv.reader((root / 'results.csv').read_text().splitlines()))
    assert [cell.strip() for cell in lines[0]] == [
        'dataset',
        'images',
        'psnr',
        'psnr of the input',
        'ssim',
        'ssim of the input',
    ]
    for line, row, part in zip(lines[2:], rows[1:], [*run.sets, results.average_of(run)], strict=True):
        numbers = [getattr(part, kind)[metric] for metric in METRICS for kind in ('restored', 'unrestored')]
        assert [float(cell) for cell in line[2:]] == pytest.approx(numbers, abs=1e-4)
        assert (row[0], [float(cell) for cell in row[3:7]]) == (part.name, numbers)
        assert run.sha256 in row and 'one' in row


def test_the_log_and_the_files_of_a_set_that_changes_its_size_have_no_input(pairs, tmp_path):
    shrunk = pipelines.write_pairs(tmp_path / 'shrunk', [(32, 32)], scale=4)
    torch.save({'params': VmambaIR(**NETWORK, scale=4).state_dict()}, tmp_path / 'net.pth')
    network = {'type': 'VmambaIR', **NETWORK, 'scale': 4}
    path = {'pretrain_network_g': str(tmp_path / 'net.pth')}
    opt = options('sr', {'test': paired('shrunk', shrunk)}, path, scale=4, network_g=network)
    commands.write_options(opt, tmp_path / 'sr.yml')
    pipelines.test(tmp_path / 'sr.yml', cwd=tmp_path)
    run = results.read_run(tmp_path / 'results' / 'sr')
    assert run.sets[0].restored and not run.sets[0].unrestored
    assert 'of the input' not in (tmp_path / 'results' / 'sr' / 'results.md').read_text()


def test_the_input_of_stage_1_is_the_clean_image(pairs, tmp_path):
    network = {'channels': 4, 'num_fusion_blocks': 1, 'num_refine_blocks': 1, 'embed_dim': 8, 'extractor_channels': [4]}
    torch.save({'params': DegradationAutoencoder(**network).state_dict()}, tmp_path / 'net.pth')
    path = {'pretrain_network_g': str(tmp_path / 'net.pth')}
    sections = {'model_type': 'DegradationExtractorModel', 'network_g': {'type': 'DegradationAutoencoder', **network}}
    opt = options('stage1', {'test': paired('pairs', pairs)}, path, **sections)
    commands.write_options(opt, tmp_path / 'stage1.yml')
    pipelines.test(tmp_path / 'stage1.yml', cwd=tmp_path)
    (part,) = results.read_run(tmp_path / 'results' / 'stage1').sets
    assert part.unrestored == pytest.approx(mean_over(Path(pairs['dataroot_lq']).glob('*'), pairs), abs=1e-3)
    for name, file in part.images.items():
        assert np.array_equal(cv2.imread(file), cv2.imread(f'{pairs["dataroot_gt"]}/{name}.png'))


def test_what_is_degraded_on_the_fly_is_shown_degraded(pairs, tmp_path):
    """With one kind of degradation BasicSR names its output after the clean file, which is not the input."""
    torch.save({'params': VmambaIR(**NETWORK).state_dict()}, tmp_path / 'net.pth')
    made = {'name': 'made', 'type': 'SyntheticDegradationDataset', 'dataroot_gt': pairs['dataroot_gt']}
    sets = {'test': made | {'degradations': ['noise']}}
    opt = options('made', sets, {'pretrain_network_g': str(tmp_path / 'net.pth')})
    commands.write_options(opt, tmp_path / 'made.yml')
    pipelines.test(tmp_path / 'made.yml', cwd=tmp_path)
    (part,) = results.read_run(tmp_path / 'results' / 'made').sets
    assert part.unrestored == pytest.approx(mean_over(map(Path, part.images.values()), pairs), abs=1e-3)


def test_numbers_that_json_lacks_survive_a_round_trip(tmp_path):
    part = results.SetResult('set', restored={'psnr': math.inf, 'ssim': math.nan})
    results.write_run(a_run('run', part), tmp_path)
    json.loads((tmp_path / 'results.json').read_text(), parse_constant=lambda name: pytest.fail(name))
    restored = results.read_run(tmp_path).sets[0].restored
    assert restored['psnr'] == math.inf and math.isnan(restored['ssim'])


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / 'file'
    file.write_text('old')
    with pytest.raises(OSError, match='full'), replacing(file) as part:
        part.write_text('ne')
        raise OSError('full')
    assert file.read_text() == 'old' and list(tmp_path.iterdir()) == [file]


# Several tests


def a_run(name: str, *parts: results.SetResult, **changes) -> results.Run:
    facts = {'options': f'{name}.yml', 'forced': [], 'checkpoint': '', 'param_key': '', 'sha256': '', 'versions': {}}
    return results.Run(name=name, **facts | {'metrics': METRICS, 'suffix': name, 'sets': list(parts)} | changes)


def write_runs(folder, *runs: results.Run) -> list[str]:
    for run in runs:
        (folder / run.name).mkdir(parents=True)
        results.write_run(run, folder / run.name)
    return [str(folder / run.name) for run in runs]


def command(*arguments, cwd):
    return commands.command('report', *arguments, cwd=cwd)


def table_of(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """(label, source) -> column -> cell."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    heading, _, *rows = ([cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]] for line in lines)
    return {(row[0], row[-1]): dict(zip(heading, row, strict=True)) for row in rows}


def test_two_runs_are_in_one_table_with_the_papers(tested):
    folder, _ = tested
    process = command('results/one', 'results/two/results.json', cwd=folder)
    assert process.returncode == 0, process.stdout
    table = table_of(process.stdout)
    columns = ['psnr / ssim', 'Rain100H', r'made \| \<here\>', 'average', 'source']
    assert all(list(row) == columns for row in table.values())
    for name in ('one', 'two'):
        run = results.read_run(folder / 'results' / name)
        row = table[name, f'{name}.yml, {name}.pth {run.sha256[:8]}']
        cells = [(part.restored['psnr'], part.restored['ssim']) for part in [*run.sets, results.average_of(run)]]
        assert list(row.values())[1:-1] == [f'{psnr:.2f} / {ssim:.3f}' for psnr, ssim in cells]
    unrestored = results.read_run(folder / 'results' / 'two').sets[0].unrestored
    assert table['degraded image', '']['Rain100H'] == f'{unrestored["psnr"]:.2f} / {unrestored["ssim"]:.3f}'
    paper = table['DPMambaIR', 'DPMambaIR, arXiv 2504.17732v1, Table 1: all in one']
    assert list(paper.values())[1:-1] == ['27.07 / 0.926 (other SSIM)', '-', '-']
    assert not any('VmambaIR, arXiv' in source for _, source in table), 'measured on the Y channel'
    assert (
        'Table 3: deraining: metrics measured in another way were left out: psnr with test_y_channel' in process.stdout
    )


def test_an_average_needs_every_set(tmp_path):
    """That of the published rows equals, up to rounding, the average that the paper prints."""
    names = ('LOL + LSRW', 'snow100k', 'Rain100H', 'RESIDE-6K', 'BSD400_JPEG', 'BSD400 noise', 'GoPro')
    parts = [results.SetResult(name, restored={'psnr': 30.0, 'ssim': 0.9}) for name in names]
    whole, half = a_run('whole', *parts), a_run('half', *parts[:3])
    table = table_of(report.to_markdown(report.compare({'whole': whole, 'half': half})))
    averages = {label: row['average'] for (label, source), row in table.items() if 'Table 2' not in source}
    assert averages['whole'] == '30.00 / 0.900' and averages['half'] == '-'
    printed = {'MPRNet': 26.74, 'NAFNet': 26.52, 'PromptIR': 27.07, 'AdaIR': 27.26, 'DPMambaIR': 27.69}
    for method, psnr in printed.items():
        assert float(averages[method].split(' / ')[0]) == pytest.approx(psnr, abs=0.011)


def test_numbers_measured_differently_are_marked_and_not_compared(tmp_path):
    part = results.SetResult('Rain100H', restored={'psnr': 30.0, 'ssim': 0.9}, unrestored={'psnr': 12.0, 'ssim': 0.4})
    (folder,) = write_runs(tmp_path, a_run('both', part))
    process = command(folder, '--html', 'page.html', cwd=tmp_path)
    alone = 'DPMambaIR, arXiv 2504.17732v1, Table 2: deraining alone'
    shown = {label: row['Rain100H'] for (label, source), row in table_of(process.stdout).items() if source == alone}
    assert shown['Restormer'] == '31.46 (Y) / 0.904 (Y)'
    assert shown['DPMambaIR'] == '32.30 / 0.967 (other SSIM)'
    assert table_of(process.stdout)['both', 'both.yml, no checkpoint']['Rain100H'] == '30.00 / 0.900'
    page = (tmp_path / 'page.html').read_text(encoding='utf-8')
    assert '31.46 (Y)<br>0.904 (Y)' in page
    for mark, meaning in published.MARKS.items():
        assert process.stdout.count(f'- {mark}: {meaning}.') == page.count(f'<p>{mark}: {meaning}.</p>') == 1
    ssim = results.SetResult('Rain100H', restored={'ssim': 0.9}, unrestored={'ssim': 0.4})
    of_ssim, of_both = a_run('run', ssim, metrics={'ssim': METRICS['ssim']}), a_run('run', part)
    drawn = [re.findall(r'<rect class="(\w+)"', bars(report.compare({'run': run}))) for run in (of_ssim, of_both)]
    assert drawn == [['input', 'run'], ['input', 'run', 'published', 'published']]


def test_every_ssim_of_dpmambair_is_marked_and_none_of_vmambair():
    for table in published.TABLES:
        marks = table.marks_of(list(table.rows())[-1])
        expected = {'calculate_ssim': published.OTHER_SSIM} if table.source.startswith('DPMambaIR') else {}
        assert marks == expected, table.source


@pytest.mark.parametrize(
    'file', sorted((commands.PACKAGE_PARENT / 'options').glob('test_*.yml')), ids=lambda file: file.stem
)
def test_the_option_files_have_the_metrics_of_the_published_tables(file):
    """Each published table with sets of the file is shown with every metric of the file that the table has."""
    opt = yaml.safe_load(file.read_text(encoding='utf-8'))
    sets = [
        results.SetResult(data['name'], restored=dict.fromkeys(opt['val']['metrics'], 1.0))
        for data in opt['datasets'].values()
    ]
    comparison = report.compare({'run': a_run('run', *sets, metrics=opt['val']['metrics'])})
    tables = [table for table in published.TABLES if set(map(key_of, table.sets)) & comparison.sets.keys()]
    own = [table for table in tables if opt['network_g']['type'] in table.source.split(',')[0]]
    assert own or file.stem == 'test_your_own'
    shown = {row.source for row in comparison.rows if row.kind == 'published'}
    for table in own:
        assert table.source in shown
        assert not any(note.startswith(f'{table.source}: metrics measured') for note in comparison.notes)


def test_the_published_numbers_are_those_of_the_paper():
    file = commands.PACKAGE_PARENT.parent / 'shared' / 'spec' / 'dpmambair.md'
    if not file.is_file():
        pytest.skip(f'{file} is not here')
    lines = file.read_text(encoding='utf-8').splitlines()
    table = published.TABLES[0]
    for method, cells in table.rows().items():
        line = f'| {method} | ' + ' | '.join('/'.join(cell.values()) for cell in cells.values())
        assert any(text.startswith(line) for text in lines), line


def test_runs_that_cannot_be_compared_are_refused_or_noted(tmp_path):
    rgb = a_run('rgb', results.SetResult('set', 2, restored={'psnr': 30.0}, unrestored={'psnr': 20.0}))
    y = a_run('y', *rgb.sets, metrics={'psnr': METRICS['psnr'] | {'test_y_channel': True}})
    other = a_run('other', results.SetResult('set', 2, restored={'psnr': 30.0}, unrestored={'psnr': 20.1}))
    same = a_run('same', *rgb.sets, metrics={'psnr': METRICS['psnr'] | {'test_y_channel': False}})
    paths = write_runs(tmp_path, rgb, y, other, same)
    process = command(*paths[:2], cwd=tmp_path)
    assert process.returncode == 1
    assert re.search(r'psnr is measured in two ways: .* in rgb, .*test_y_channel True\) in y', process.stdout)
    assert 'not tested on the same images' in command(paths[0], paths[2], cwd=tmp_path).stdout
    assert 'not tested' not in command(paths[0], paths[3], cwd=tmp_path).stdout


@pytest.mark.parametrize('content', [None, '', '[]', '{"name": "run"}', '{"average": {}, "sets": [{"name": 1}]}'])
def test_files_that_are_not_results_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / 'results.json').write_text(content)
    with pytest.raises(ValueError, match=rf'^{re.escape(str(tmp_path / "results.json"))}: '):
        results.read_run(tmp_path)


def test_the_report_needs_no_torch(tmp_path):
    script = 'import sys, dpmambair_basicsr.report; print([m for m in ("torch", "basicsr") if m in sys.modules])'
    assert commands.python('-c', script, cwd=tmp_path).stdout == '[]\n'


# The page

EVIL = '<img src=x onerror=hacked=1>&"\''


@pytest.fixture
def evil_page(tmp_path):
    """The page of a run whose every name is markup, with a red degraded and a blue restored image."""
    part = results.SetResult(EVIL, 1, EVIL, {'a"b': str(tmp_path / 'red.png')}, {'psnr': math.inf}, {'psnr': 20.0})
    run = a_run(EVIL, part, checkpoint=EVIL, sha256=EVIL, suffix='x', versions={EVIL: EVIL}, forced=[EVIL])
    folder = tmp_path / 'run'
    (folder / 'visualization' / EVIL).mkdir(parents=True)
    results.write_run(run, folder)
    for file, color in (
        (tmp_path / 'red.png', (0, 0, 255)),
        (folder / 'visualization' / EVIL / 'a"b_x.png', (255, 0, 0)),
    ):
        cv2.imwrite(str(file), np.full((1600, 1000, 3), color, np.uint8))
    process = command(folder, '--html', 'page.html', '--image', f'{EVIL}/a"b', '--data', tmp_path, cwd=tmp_path)
    assert process.returncode == 0, process.stdout
    return tmp_path / 'page.html'


def test_the_page_fetches_nothing_and_shows_names_as_they_are(evil_page):
    text = evil_page.read_text()
    assert '<img src=x' not in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 2 and all(source.startswith('data:image/png;base64,') for source in sources)
    assert len(text) < 100_000


def test_the_slider_works_in_a_browser(evil_page, tmp_path):
    with browser(tmp_path / 'profile') as page:
        page.open(evil_page.as_uri())
        assert page.evaluate('typeof hacked') == 'undefined'
        assert page.evaluate('document.querySelector("h1").textContent') == f'Restoration results: {EVIL}'
        assert page.evaluate('document.querySelector("svg .set").textContent') == EVIL
        assert page.evaluate('[...document.images].map(image => image.naturalHeight)') == [640, 640]
        assert page.evaluate('document.querySelector("input").ariaLabel').endswith(f'{EVIL}/a"b, {EVIL}')

        box = page.evaluate('document.querySelector(".pair").getBoundingClientRect().toJSON()')
        clip = {'x': box['x'], 'y': box['y'], 'width': box['width'], 'height': 20, 'scale': 1}

        def share_of_red() -> float:
            shot = page.call('Page.captureScreenshot', clip=clip, captureBeyondViewport=True)
            image = cv2.imdecode(np.frombuffer(base64.b64decode(shot['data']), np.uint8), cv2.IMREAD_COLOR)
            return float((image[..., 2] > image[..., 0]).mean())

        assert share_of_red() == pytest.approx(0.5, abs=0.03)
        page.evaluate('document.querySelector("input").focus()')
        for key, share in {'End': 1, 'Home': 0}.items():
            page.press(key)
            assert share_of_red() == pytest.approx(share, abs=0.03)
        page.press('ArrowRight')
        assert page.evaluate('document.querySelector("input").ariaValueText') == '1 % degraded, 99 % restored'
        requests = [e['params']['request']['url'] for e in page.events if e['method'] == 'Network.requestWillBeSent']
        assert [url for url in requests if not url.startswith('data:')] == [evil_page.as_uri()]
        assert not [e for e in page.events if e['method'] in ('Runtime.exceptionThrown', 'Log.entryAdded')]


def test_images_are_chosen_and_missing_ones_are_named(tested, pairs):
    folder, _ = tested
    data = ('--data', Path(pairs['dataroot_lq']).parent)
    (folder / 'results/two/visualization/Rain100H/00_two.png').unlink()
    process = command('results/one', 'results/two', '--html', 'page.html', *data, cwd=folder)
    assert process.returncode == 0, process.stdout
    page = (folder / 'page.html').read_text()
    assert page.count('type="range"') == 3, 'the first image of two sets in two runs, but for one'
    assert 'Rain100H/00, two: no slider: results/two/visualization/Rain100H/00_two.png not found.' in page
    process = command('results/one', '--html', 'other.html', '--image', 'Rain100H/02', cwd=folder)
    assert (
        process.returncode == 1
        and '--image Rain100H/02: no run has this image; available: 6, Rain100H/00' in process.stdout
    )
    assert not (folder / 'other.html').exists()


# Training


def training(pairs, tmp_path, **changes) -> dict:
    rain = {'type': 'SyntheticDegradationDataset', 'dataroot_gt': pairs['dataroot_gt'], 'degradations': ['rain']}
    mixed = {'name': 'mixture', 'type': 'MixedDegradationDataset', 'sampling': {'noise': 3, 'rain': 1}, 'gt_size': 16}
    mixed |= {'datasets': {'noise': dict(pairs), 'rain': rain}}
    loader = {'num_worker_per_gpu': 1, 'batch_size_per_gpu': 2, 'dataset_enlarge_ratio': 2}
    sets = {'train': mixed | loader, 'val_1': paired('first', pairs), 'val_2': paired('second', pairs)}
    train = {
        'optim_g': {'type': 'AdamW', 'lr': 1e-3},
        'scheduler': {'type': 'MultiStepLR', 'milestones': [100], 'gamma': 0.5},
        'total_iter': 4,
        'pixel_opt': {'type': 'L1Loss'},
    }
    opt = options('run', sets, {'pretrain_network_g': None}, train=train)
    opt['val'] = {'val_freq': 2, 'save_img': False, 'metrics': METRICS}
    opt['logger'] = {'print_freq': 2, 'save_checkpoint_freq': 2, 'use_tb_logger': False}
    for path, value in changes.items():
        section, _, key = path.rpartition('__')
        target = opt
        for name in section.split('__'):
            target = target[name]
        target[key] = value
    commands.write_options(opt, tmp_path / 'run.yml')
    return opt


@pytest.fixture(scope='module')
def trained(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    training(pairs, folder, logger__use_tb_logger=True)
    return folder, pipelines.train(folder / 'run.yml', cwd=folder)


def test_the_average_over_the_sets_is_logged(trained):
    _, log = trained
    for metric in METRICS:
        values = [float(value) for value in re.findall(rf'# {metric}: (\d+\.\d+)', log)]
        assert len(values) == 9, 'first, second, average; at iterations 2 and 4, and at the end'
        for first, second, average in zip(*[iter(values)] * 3, strict=True):
            assert average == pytest.approx((first + second) / 2, abs=1e-4)
    assert log.count('Validation average of 2 sets') == 3


def test_the_input_is_measured_once(trained, pairs):
    """By scikit-image's PSNR; the second set has different images."""
    _, log = trained
    said = re.findall(r'Validation (.+): the unrestored input has psnr (\S+), ssim (\S+)\.', log)
    assert len(said) == len({name for name, *_ in said}) == 2
    files = [sorted(Path(pairs[f'dataroot_{kind}']).iterdir()) for kind in ('gt', 'lq')]
    images = [[cv2.imread(str(file)) for file in pair] for pair in zip(*files, strict=True)]
    psnr = np.mean([metrics.peak_signal_noise_ratio(*pair) for pair in images])
    assert any(float(value) == pytest.approx(psnr, abs=1e-3) for _, value, _ in said)


def test_the_best_checkpoint_is_the_network_that_the_log_names(trained):
    folder, log = trained
    best = torch.load(folder / 'experiments/run/models/net_g_best.pth', weights_only=True)
    saved = [(int(iteration), float(value)) for iteration, value in best_lines(log)]
    assert (best['best']['iter'], best['best']['value']) == pytest.approx(saved[-1], abs=1e-4)
    network = torch.load(folder / f'experiments/run/models/net_g_{best["best"]["iter"]}.pth', weights_only=True)
    assert all(torch.equal(best['params'][name], value) for name, value in network['params'].items())


def best_lines(log: str) -> list[tuple[str, str]]:
    """(iteration, value) of each time a best network was saved."""
    parts = re.split(r'iter: +(\d+), lr', log)
    found = [
        (parts[i], re.findall(r'Best psnr so far, ([\d.]+): saved', parts[i + 1])) for i in range(1, len(parts), 2)
    ]
    return [(iteration, value) for iteration, values in found for value in values]


def test_tensorboard_shows_samples_and_averages(trained):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    folder, _ = trained
    events = accumulator.EventAccumulator(str(folder / 'tb_logger/run')).Reload()
    assert sorted(events.Tags()['images']) == ['first/0', 'first/1', 'second/0', 'second/1']
    image = events.Images('first/0')[0]
    assert (image.height, image.width, image.step) == (40, 3 * 48, 2)
    assert {'metrics/average/psnr', 'metrics/first/psnr'} <= set(events.Tags()['scalars'])


@pytest.mark.parametrize(('value', 'kept'), [(99.0, True), (-99.0, False)])
def test_a_resumed_training_replaces_the_best_only_by_a_better_one(trained, tmp_path, value, kept):
    folder, _ = trained
    shutil.copytree(folder / 'experiments', tmp_path / 'experiments')
    opt = yaml.safe_load((folder / 'run.yml').read_text())
    opt['logger']['use_tb_logger'] = False
    commands.write_options(opt, tmp_path / 'run.yml')
    file = tmp_path / 'experiments/run/models/net_g_best.pth'
    content = torch.load(file, weights_only=True)
    content['best']['value'] = value
    torch.save(content, file)
    before = file.read_bytes()
    log = pipelines.train(tmp_path / 'run.yml', '--auto_resume', '--force_yml', 'train:total_iter=6', cwd=tmp_path)
    assert f'Best psnr so far: {value:.4f}, of iteration' in log
    assert (file.read_bytes() == before) == kept
    assert len(best_lines(log)) == (0 if kept else 1)
    assert not list(file.parent.glob('.*'))


def test_a_best_value_of_another_metric_is_not_compared(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / 'experiments', tmp_path / 'experiments')
    opt = yaml.safe_load((folder / 'run.yml').read_text())
    opt['logger']['use_tb_logger'] = False
    opt['val']['metrics'] = {'ssim': METRICS['ssim']}
    commands.write_options(opt, tmp_path / 'run.yml')
    log = pipelines.train(tmp_path / 'run.yml', '--auto_resume', '--force_yml', 'train:total_iter=6', cwd=tmp_path)
    assert 'net_g_best.pth: was the best by another measure' in log and 'Best ssim so far, ' in log


def test_an_infinite_metric_is_never_best(pairs, tmp_path):
    """A network that returns its input, and a set whose input is the GT: its PSNR is infinite."""
    net = VmambaIR(**NETWORK)
    torch.nn.init.zeros_(net.output.weight)
    torch.save({'params': net.state_dict()}, tmp_path / 'identity.pth')
    same = paired('same', {key: pairs['dataroot_gt'] for key in pairs})
    changes = {'train__optim_g__lr': 1e-12, 'path__pretrain_network_g': str(tmp_path / 'identity.pth')}
    training(pairs, tmp_path, datasets__val_2=same, **changes)
    log = pipelines.train(tmp_path / 'run.yml', cwd=tmp_path)
    assert log.count('# psnr: inf\tBest: -inf @ -1 iter') == 3
    assert log.count('\t # psnr: inf\n') == 3, 'the average'
    assert not (tmp_path / 'experiments/run/models/net_g_best.pth').exists()


def test_the_log_counts_what_was_drawn(trained):
    """3 : 1 is exact after an epoch, which has 4 items twice."""
    _, log = trained
    drawn = re.findall(r'Drawn so far by this process: (.*)\.', log)
    assert len(drawn) == 2
    assert sum(map(int, re.findall(r'\w+ (\d+) \(', drawn[0]))) == 4
    assert drawn[1] == 'noise 6 (75.0%), rain 2 (25.0%)'


def test_a_set_of_one_degradation_is_not_counted(pairs, tmp_path):
    loader = {'gt_size': 16, 'num_worker_per_gpu': 0, 'batch_size_per_gpu': 2, 'dataset_enlarge_ratio': 4}
    one = paired('one', pairs, degradation='rain') | loader
    training(pairs, tmp_path, datasets__train=one, train__total_iter=2, val__val_freq=10)
    assert 'Drawn' not in pipelines.train(tmp_path / 'run.yml', cwd=tmp_path)
