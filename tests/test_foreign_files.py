"""Untrusted checkpoints, states and results: bounded, one message each, no network access, no private image."""

import json
import os
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.utils import options as basicsr_options
from support import commands, forked
from support.forked import Training, changed

import dpmambair_basicsr
from dpmambair_basicsr import report
from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.files.checkpoints import read_checkpoint, read_on_cpu
from dpmambair_basicsr.registry import ARCH_REGISTRY, make_without_storage
from dpmambair_basicsr.results import run as results

dpmambair_basicsr.register()
NETWORK = {'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}


# Checkpoints


@pytest.fixture(scope='module')
def weights():
    return VmambaIR(**NETWORK).state_dict()


def write(file: Path, weights: dict, **network) -> Path:
    torch.save({'params': weights, 'network_g': network}, file)
    return file


OTHERS = {
    'VGGFeatureExtractor': {'layer_name_list': ['conv1_2']},  # it downloads its weights
    'MSRResNet': {},
    'TinyNet': {},
}


@pytest.mark.parametrize('name', OTHERS)
def test_a_checkpoint_chooses_among_our_networks_alone(name, weights, tmp_path, monkeypatch):
    def download(*_, **__):
        raise AssertionError('it goes online')

    monkeypatch.setattr('torch.hub.download_url_to_file', download)
    file = write(tmp_path / 'x.pth', weights, type=name, **OTHERS[name])
    with pytest.raises(
        ValueError, match=f'^{file}: network_g.type: {name} is not a network of dpmambair_basicsr, .*--opt'
    ):
        dpmambair_basicsr.load(file)


def test_any_network_that_the_user_names_is_used(tmp_path):
    net = forked.TinyNet()
    file = write(tmp_path / 'x.pth', net.state_dict(), type='VGGFeatureExtractor')
    restorer = dpmambair_basicsr.load(file, network={'type': 'TinyNet'})
    for name, value in restorer.net.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


ENDLESS = {
    'blocks': {'num_blocks': [10**9] * 4},
    'width': {'dim': 10**9},
    'states': {'d_state': 10**9},
    'more states than bytes can count': {'d_state': 10**15},
    'an infinite factor': {'ffn_expansion_factor': 1e308},
    'text': {'dim': 'x' * 10**6},
    'an unknown option': {'nonsense': 1},
}


@pytest.mark.parametrize('options', ENDLESS)
def test_huge_sizes_are_refused_before_anything_is_built(options, weights, tmp_path):
    file = write(tmp_path / 'x.pth', weights, type='VmambaIR', **NETWORK | ENDLESS[options])
    with pytest.raises(ValueError, match=f'^{file}: ') as refused:
        dpmambair_basicsr.load(file)
    assert len(str(refused.value)) < 2000


def test_tensors_that_repeat_few_bytes_are_refused(tmp_path):
    """10^11 values with stride 0 in a file of 1 kB, for a network of that size."""
    weights = {'weight': torch.zeros(1).expand(10**11)}
    file = write(tmp_path / 'x.pth', weights, type='VmambaIR', **NETWORK)
    assert file.stat().st_size < 2000
    with pytest.raises(ValueError, match=f'^{file}: its tensors would take more than 4 times the bytes of the file$'):
        dpmambair_basicsr.load(file)


def test_a_network_made_without_storage_is_complete(tmp_path):
    """Loading replaces everything in it."""
    for name, target in ARCH_REGISTRY.items():
        if target.__module__.startswith('dpmambair_basicsr.'):
            net = make_without_storage(target, {})
            tensors = [
                tensor for module in net.modules() for tensor in vars(module).values() if torch.is_tensor(tensor)
            ]
            assert not tensors and {*dict(net.named_buffers())} <= net.state_dict().keys(), name


def test_the_number_of_parts_is_bounded_and_the_bound_does_not_stay():
    for most in (10, 10):
        with pytest.raises(ValueError, match=f'^the network would have more than {most} parameters and modules$'):
            make_without_storage(VmambaIR, NETWORK, most)
    assert len(list(VmambaIR(**NETWORK).parameters())) > 10


def test_a_half_precision_checkpoint_is_computed_in_fp32(weights, tmp_path):
    file = write(tmp_path / 'x.pth', {k: v.half() for k, v in weights.items()}, type='VmambaIR', **NETWORK)
    net = dpmambair_basicsr.load(file).net
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize('read', [read_checkpoint, read_on_cpu, dpmambair_basicsr.load])
@pytest.mark.parametrize('kind', ['fifo.pth', 'fifo.safetensors', 'zero'])
def test_files_that_are_not_regular_are_refused_without_blocking(read, kind, tmp_path):
    file = tmp_path / kind
    if kind == 'zero':
        file.symlink_to('/dev/zero')
    else:
        os.mkfifo(file)
    with pytest.raises(ValueError, match=f'^{file}: not a regular file$'):
        read(file)


@pytest.mark.parametrize('read', [read_checkpoint, read_on_cpu])
def test_a_compressed_checkpoint_is_refused(read, tmp_path):
    """70 kB that expand to 64 MB."""
    plain, file = tmp_path / 'plain.pth', tmp_path / 'x.pth'
    torch.save({'params': {'weight': torch.zeros(2**24)}}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    plain.unlink()
    assert file.stat().st_size < 2**20
    with pytest.raises(ValueError, match=f'^{file}: its part .* is compressed; torch.save never compresses$'):
        read(file)


@pytest.mark.parametrize('model', ['RestorationModel', 'SRModel'])
@pytest.mark.parametrize('key', ['pretrain_network_g', 'resume_state'])
def test_training_does_not_block_on_a_fifo(model, key, tmp_path):
    opt = forked.options(forked.write_images(tmp_path / 'images'))
    os.mkfifo(tmp_path / 'fifo')
    run = Training(changed(opt, {f'path.{key}': str(tmp_path / 'fifo'), 'model_type': model}), tmp_path)
    assert run.status() == 1
    assert f'path.{key}: {tmp_path}/fifo is not a regular file (line ' in run.log()
    assert not (tmp_path / 'experiments').exists()


def test_auto_resume_does_not_block_on_a_fifo(tmp_path):
    opt = changed(forked.options(forked.write_images(tmp_path / 'images')), {'train.total_iter': 4})
    forked.train(opt, tmp_path)
    os.mkfifo(tmp_path / 'experiments/run/training_states/9.state')
    log = forked.train(changed(opt, {'train.total_iter': 6}), tmp_path, '--auto_resume')
    assert '9.state: not a regular file. Trying the previous one.' in log and 'iter: 4.' in log


def test_options_of_a_much_larger_network_than_the_weights_are_refused(tmp_path):
    torch.save({'params': VmambaIR(**NETWORK).state_dict()}, tmp_path / 'small.pth')
    with pytest.raises(ValueError, match=r'small.pth: network_g: .* too many for its \d+ tensors$'):
        dpmambair_basicsr.load(str(tmp_path / 'small.pth'), network={'type': 'DPMambaIR'})


def test_a_network_of_an_option_file_is_bounded_too(tmp_path, monkeypatch):
    opt = forked.options(forked.write_images(tmp_path / 'images'))
    opt['network_g'] = {'type': 'DegradationAutoencoder', 'num_refine_blocks': 10**9}
    file = commands.write_options(opt, tmp_path / 'options.yml')
    monkeypatch.setattr('sys.argv', ['train.py', '-opt', str(file)])
    with pytest.raises(SystemExit, match='network_g: the network would have more than 10000 parameters and modules'):
        basicsr_options.parse_options(str(tmp_path), is_train=True)


# Results


def a_run(**changes) -> dict:
    part = results.SetResult('Rain100H', 1, 'rain', {'1': 'input/1.png'}, {'psnr': 30.0}, {'psnr': 20.0})
    metrics = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}
    run = results.Run('x', 'x.yml', [], 'x.pth', 'params', 'abc', {'torch': '2'}, metrics, 'x', [part])
    return asdict(run) | changes


PART = a_run()['sets'][0]
WRONG = {
    'no metrics': (a_run(metrics={}), 'metrics: must not be empty'),
    'metrics are a list': (a_run(metrics=['psnr']), r'metrics: expected a mapping, got \["psnr"\]'),
    'a metric is a list': (a_run(metrics={'psnr': []}), r'metrics.psnr: expected a mapping, got \[\]'),
    'no type': (a_run(metrics={'psnr': {}}), 'metrics.psnr.type: expected a text, got null'),
    'sets are a mapping': (a_run(sets={}), r'sets: expected a list, got \{\}'),
    'a set is a list': (a_run(sets=[[]]), r'sets\[0\]: expected a mapping, got \[\]'),
    'images are a list': (a_run(sets=[PART | {'images': []}]), r'sets\[0\].images: expected a mapping, got \[\]'),
    'an image is a number': (a_run(sets=[PART | {'images': {'a': 1}}]), r'sets\[0\].images.a: expected a text, got 1'),
    'a value is a list': (
        a_run(sets=[PART | {'restored': {'psnr': []}}]),
        r'psnr: expected a number, got \[\]',
    ),
    'a value is a word': (
        a_run(sets=[PART | {'restored': {'psnr': 'x'}}]),
        'psnr: expected a number, got "x"',
    ),
    'a huge value': (
        a_run(sets=[PART | {'restored': {'psnr': 10**400}}]),
        'psnr: expected a number, got 1000',
    ),
    'a metric that is not measured': (
        a_run(sets=[PART | {'restored': {'ssim': 0.9}}]),
        r"sets\[0\].restored: 'ssim' is not in metrics",
    ),
    'the name is a number': (a_run(name=1), 'name: expected a text, got 1'),
    'no name of a set': (a_run(sets=[{'count': 1}]), r'sets\[0\]: name is missing'),
    'a key too many': (a_run(more=1), "unknown 'more'"),
    'a list': ([], r'the file: expected a mapping, got \[\]'),
    'nothing': ({}, 'the file: name is missing'),
}


def refused(file: Path, monkeypatch) -> str:
    monkeypatch.setattr('sys.argv', ['report', str(file), '--html', 'page.html'])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert not Path('page.html').exists()
    return str(ended.value.code)


@pytest.mark.parametrize('mistake', WRONG)
def test_results_made_by_hand_get_one_message(mistake, tmp_path, monkeypatch):
    content, message = WRONG[mistake]
    (tmp_path / 'results.json').write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    said = refused(Path('results.json'), monkeypatch)
    assert re.match(rf'dpmambair_basicsr.report: results.json: not the results.json of a test \(.*{message}', said), (
        said
    )


@pytest.mark.parametrize('content', [b'[' * 10**5, b'\xff\xfe', b'', b'9' * 5000, b'{"a": 1'])
def test_invalid_bytes_as_results_get_one_message(content, tmp_path, monkeypatch):
    (tmp_path / 'results.json').write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert refused(Path('results.json'), monkeypatch).startswith('dpmambair_basicsr.report: results.json: not the res')


def test_results_do_not_block_on_a_fifo(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / 'results.json')
    monkeypatch.chdir(tmp_path)
    assert 'results.json: not a regular file' in refused(Path('results.json'), monkeypatch)


@pytest.fixture
def private(tmp_path, monkeypatch):
    """A user's private picture, beside received results in the current folder."""
    (tmp_path / 'work/received/visualization/Rain100H').mkdir(parents=True)
    (tmp_path / 'private').mkdir()
    rng = np.random.default_rng(0)
    for file in ('private/1_x.png', 'work/received/visualization/Rain100H/1_x.png'):
        assert cv2.imwrite(str(tmp_path / file), rng.integers(0, 255, (20, 20, 3), np.uint8))
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'private/1_x.png'


def made_page(run: dict, monkeypatch, *arguments) -> str:
    Path('received/results.json').write_text(json.dumps(run))
    monkeypatch.setattr('sys.argv', ['report', 'received', '--html', 'page.html', *arguments])
    report.main()
    return Path('page.html').read_text()


def foreign(private: Path, way: str) -> dict:
    """Results that try to include the private picture in the page."""
    images, name, suffix = {'1': 'visualization/Rain100H/1_x.png'}, 'Rain100H', 'x'
    if way == 'absolute':
        images = {'1': str(private)}
    elif way == 'above':
        images = {'1': '../../private/1_x.png'}
    elif way == 'above the data':
        images = {'1': os.path.abspath('datasets/../../private/1_x.png')}
    elif way == 'a link':
        Path('received/1.png').symlink_to(private)
        images = {'1': '1.png'}
    elif way == 'the name of a set':
        name = '../../../private'
    elif way == 'the suffix':
        images, suffix = {'a': images['1']}, '/../../../../../private/1_x'
        Path('received/visualization/Rain100H/a_').mkdir()
    return a_run(sets=[PART | {'images': images, 'name': name}], suffix=suffix)


@pytest.mark.parametrize('way', ['absolute', 'above', 'above the data', 'a link', 'the name of a set', 'the suffix'])
def test_no_private_picture_gets_into_the_page(way, private, monkeypatch):
    text = made_page(foreign(private, way), monkeypatch)
    assert 'data:image' not in text and 'type="range"' not in text
    assert re.search('no slider: .* is outside received or datasets; pass its folder as --data', text)


def test_pictures_of_the_results_and_of_the_data_named_are_in_the_page(private, monkeypatch):
    own = made_page(foreign(private, 'own'), monkeypatch)
    assert own.count('src="data:image') == 2
    named = made_page(foreign(private, 'absolute'), monkeypatch, '--data', str(private.parent))
    assert named.count('src="data:image') == 2
    Path('datasets').symlink_to(private.parent)
    assert made_page(foreign(private, 'absolute'), monkeypatch).count('src="data:image') == 2
