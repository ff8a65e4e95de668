"""What is found in an image, and how `restore` uses it: classes, strength, steering, spread, table and report."""

import csv
import json
import sys

import cv2
import numpy as np
import pytest
import torch
from skimage import data
from support.browser import browser
from torch import nn
from torch.nn import functional as F

from dpmambair_basicsr import load, restore
from dpmambair_basicsr.archs import DPMambaIR
from dpmambair_basicsr.data.degradations import degrade, to_uint8
from dpmambair_basicsr.files.checkpoints import read_checkpoint, write_safetensors
from dpmambair_basicsr.files.images import to_float
from dpmambair_basicsr.inference.degradation_classifier import DegradationClassifier
from dpmambair_basicsr.inference.image_statistics import image_statistics
from dpmambair_basicsr.inference.restorer import SHIPPED_WEIGHTS, Restorer

TINY = {'dim': 8, 'num_blocks': [1] * 4, 'num_refinement_blocks': 0, 'd_inner': [8] * 4, 'd_state': 2}
TINY |= {'embed_dim': 8, 'extractor_channels': [4, 4, 4]}
PHOTOGRAPHS = {
    'astronaut': data.astronaut()[:224, 60:380],
    'coffee': data.coffee()[40:360:1, 150:470],
    'chelsea': data.chelsea()[:300, 60:380],
}


def degraded(image, kind, **parameters):
    return to_uint8(degrade(to_float(np.ascontiguousarray(image)), kind, np.random.default_rng(0), **parameters))


@pytest.fixture(scope='module')
def net():
    return load()


@pytest.fixture(scope='module')
def tiny():
    """A DPMambaIR whose prompts and blocks have an effect."""
    torch.manual_seed(0)
    network = DPMambaIR(**TINY)
    for name, value in network.named_parameters():
        if 'modulation' in name or name == 'output.weight':
            nn.init.normal_(value.data, std=3 if 'modulation' in name else 0.3)
        elif name.endswith('dt_projs_bias'):  # otherwise the states are nearly 0
            nn.init.ones_(value.data)
    return Restorer(network, torch.device('cpu'))


@pytest.fixture(scope='module')
def image():
    return degraded(PHOTOGRAPHS['astronaut'][:48, 100:156], 'rain')


# --- statistics and classes


@pytest.mark.parametrize('size', [(1, 1), (7, 3), (33, 130)])
def test_statistics_of_any_size_are_finite(size):
    for image in (np.zeros((*size, 3), np.float32), np.random.default_rng(0).random((*size, 3), np.float32)):
        assert np.isfinite(image_statistics(image)).all()


@pytest.mark.parametrize('kind', ['haze', 'rain', 'snow', 'lowlight', 'noise', 'jpeg'])
def test_the_shipped_classes_name_the_degradations_of_photographs_they_never_saw(kind, net):
    found = [net.find(degraded(photo, kind)).kind for photo in PHOTOGRAPHS.values()]
    assert found.count(kind) >= 2, found


def test_clean_photographs_are_found_clean(net):
    found = [net.find(np.ascontiguousarray(photo)).kind for photo in PHOTOGRAPHS.values()]
    assert found.count('clean') >= 2, found


def test_images_unlike_photographs_are_unfamiliar(net):
    stripes = np.zeros((96, 96, 3), np.uint8)
    stripes[:, ::2] = 255
    for image in (stripes, np.zeros_like(stripes)):
        assert not net.find(image).familiar
    assert net.find(degraded(PHOTOGRAPHS['coffee'], 'rain')).familiar


def test_classes_of_separable_statistics_are_learnt_with_the_same_weight_for_all():
    torch.manual_seed(0)
    statistics = {'a': torch.randn(40, 5) + 3, 'b': torch.randn(400, 5) - 3}
    embeddings = {name: F.normalize(torch.randn(50, 4) + 9 * torch.eye(4)[k], dim=1) for k, name in enumerate('ab')}
    classifier = DegradationClassifier.fit(statistics, embeddings)
    scores = classifier.scores(torch.zeros(1, 5))
    assert scores[0, 0] == pytest.approx(0.5, abs=0.2), 'half way, though b has ten times the images'
    for k, part in enumerate(statistics.values()):
        assert (classifier.scores(part).argmax(dim=1) == k).float().mean() > 0.97
    for k, name in enumerate('ab'):
        assert classifier.embedding_of(name)[0, k] > 0.95 and classifier.embedding_of(name).norm() == pytest.approx(1)
    assert (classifier.distances(torch.cat(list(statistics.values()))) <= classifier.farthest).float().mean() > 0.97


def test_a_file_keeps_the_classifier(net, image, tmp_path):
    checkpoint = read_checkpoint(str(SHIPPED_WEIGHTS))
    text = json.dumps(net.classifier.to_plain())
    again = DegradationClassifier.from_plain(json.loads(text))
    assert again.find(to_float(image)).probabilities == pytest.approx(net.find(image).probabilities, abs=1e-3)
    damaged = json.loads(text)
    damaged['embeddings'][0].pop()
    file = tmp_path / 'damaged.safetensors'
    write_safetensors(str(file), checkpoint['params'], checkpoint['network_g'], damaged)
    with pytest.raises(ValueError, match=r"damaged.safetensors: its key 'degradation_classifier' is not a classifier"):
        load(file)


# --- strength, steering, spread


def test_strength_blends_with_the_image(tiny, image):
    whole = tiny.restore(image).astype(float)
    assert np.array_equal(tiny.restore(image, strength=0), image)
    assert np.abs(tiny.restore(image, strength=0.25) - (0.75 * image + 0.25 * whole)).max() <= 1
    assert np.abs(whole - image).max() > 10


@pytest.mark.parametrize('strength', [-0.1, 1.1, float('nan')])
def test_other_strengths_are_refused(strength, tiny, image):
    with pytest.raises(ValueError, match=r'^strength: .*expected 0 to 1$'):
        tiny.restore(image, strength=strength)


def test_a_larger_result_cannot_be_blended(image):
    larger = Restorer(nn.Upsample(scale_factor=2), torch.device('cpu'))
    with pytest.raises(ValueError, match='2 times as large'):
        larger.restore(image, strength=0.5)


@pytest.mark.parametrize('tile', [0, 32])
def test_an_embedding_steers_the_network(tile, tiny, image):
    own = tiny.embedding_of(image)
    options = {'tile': tile, 'overlap': 8}
    assert np.array_equal(tiny.restore(image, **options, embedding=own), tiny.restore(image, **options))
    assert np.abs(tiny.restore(image, **options, embedding=-own).astype(int) - tiny.restore(image, **options)).max() > 2


@pytest.mark.parametrize('tile', [0, 32])
def test_the_spread_is_the_standard_deviation_of_the_eight(tile, image):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode='replicate')
    nn.init.normal_(conv.weight, std=0.2)
    restorer = Restorer(nn.Sequential(conv), torch.device('cpu'))
    x = torch.from_numpy(to_float(image)).permute(2, 0, 1)
    mean, spread = restorer.restore(x, tile=tile, overlap=16, return_spread=True)
    outputs = []
    for turns in range(4):
        for flipped in (False, True):
            turned = x.rot90(turns, (1, 2))
            output = conv(turned.flip(2) if flipped else turned)
            outputs.append((output.flip(2) if flipped else output).rot90(-turns, (1, 2)))
    expected = torch.stack(outputs).var(dim=0, unbiased=False).mean(dim=0).sqrt()
    assert spread.shape == x.shape[1:] and torch.allclose(spread, expected, atol=1e-3) and expected.mean() > 0.05
    assert torch.allclose(mean, torch.stack(outputs).mean(dim=0).clamp(0, 1), atol=1e-5)
    array, array_spread = restorer.restore(image, tile=tile, overlap=16, return_spread=True)
    assert array.dtype == np.uint8 and np.allclose(array_spread, spread, atol=1e-6)


# --- the command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """pictures/{clean,rain}.png in the working directory of the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'pictures').mkdir()
    photo = np.ascontiguousarray(PHOTOGRAPHS['coffee'][100:196, 80:192])
    for name, content in {'clean': photo, 'rain': degraded(photo, 'rain', strength=0.8)}.items():
        assert cv2.imwrite(f'pictures/{name}.png', content[..., ::-1])
    return tmp_path


def run(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, 'argv', ['restore', *map(str, arguments)])
    status = restore.main()
    return status, *capsys.readouterr()


def test_a_line_says_what_was_found_and_done_and_clean_files_are_copied(folder, monkeypatch, capsys):
    status, output, _ = run(monkeypatch, capsys, 'pictures', '-o', 'out', '--table', 'out/table.csv')
    lines = {line.partition(':')[0]: line for line in output.splitlines()}
    assert status == 0 and output.endswith('out: 1 restored, 0 failed, 1 left unchanged\n')
    assert 'clean' in lines['pictures/clean.png'] and 'left unchanged' in lines['pictures/clean.png']
    assert 'rain' in lines['pictures/rain.png'] and 'restored' in lines['pictures/rain.png']
    assert (folder / 'out/clean.png').read_bytes() == (folder / 'pictures/clean.png').read_bytes()
    with open('out/table.csv', newline='') as file:
        rows = {row['image']: row for row in csv.DictReader(file)}
    assert rows['pictures/rain.png']['found'] == 'rain' and rows['pictures/rain.png']['found_after'] != ''
    assert rows['pictures/clean.png']['action'] == 'left unchanged'


def test_force_kind_like_and_strength_change_the_result(folder, monkeypatch, capsys):
    def restored(*arguments):
        status, output, _ = run(monkeypatch, capsys, 'pictures/clean.png', '-o', 'out', *arguments)
        assert status == 0 and 'restored, ' in output
        return cv2.imread('out/clean.png').astype(int)

    clean = cv2.imread('pictures/clean.png').astype(int)
    forced, kind, like = restored('--force'), restored('--kind', 'lowlight'), restored('--like', 'pictures/rain.png')
    assert (forced != clean).any() and (kind != forced).any() and (like != forced).any()
    assert kind.mean() > forced.mean(), 'brighter'
    assert np.array_equal(restored('--force', '--strength', '0'), clean)


def test_the_report_shows_every_image_including_failures(folder, monkeypatch, capsys):
    (folder / 'pictures/broken.png').write_bytes(b'')
    arguments = ('pictures', '-o', 'out', '--self-ensemble', '--table', 'out/table.json', '--report', 'out/report.html')
    status, _, errors = run(monkeypatch, capsys, *arguments)
    assert status == 1 and 'pictures/broken.png' in errors
    rows = {row['image']: row for row in json.loads((folder / 'out/table.json').read_text())}
    assert rows['pictures/broken.png']['action'].startswith('failed: ') and len(rows) == 3
    assert 0 < rows['pictures/rain.png']['spread'] < 0.2 and rows['pictures/clean.png']['spread'] is None
    page = (folder / 'out/report.html').read_text()
    assert page.count('<figure') == 2 and page.count('class="map"') == 1
    with browser(folder / 'browser') as chromium:
        chromium.open((folder / 'out/report.html').as_uri())
        assert chromium.evaluate("document.querySelectorAll('figure input').length") == 2
        chromium.evaluate("document.querySelector('figure input').focus()")
        chromium.press('End')
        split = "getComputedStyle(document.querySelector('figure')).getPropertyValue('--split')"
        assert chromium.evaluate(split).strip() == '100%'
        requests = [event for event in chromium.events if event.get('method') == 'Network.requestWillBeSent']
        urls = {event['params']['request']['url'].partition(':')[0] for event in requests}
        assert urls <= {'file', 'data'}, 'it fetches nothing'


def test_weights_without_classes_find_nothing_and_have_no_kinds(folder, tiny, monkeypatch, capsys):
    torch.save({'params': tiny.net.state_dict(), 'network_g': {'type': 'DPMambaIR', **TINY}}, 'tiny.pth')
    status, output, _ = run(monkeypatch, capsys, '-w', 'tiny.pth', 'pictures', '-o', 'out')
    assert status == 0 and output.endswith('out: 2 restored, 0 failed\n')
    assert 'pictures/clean.png: 112 x 96, ' in output, 'as before there were classes'
    with pytest.raises(SystemExit, match='--kind: tiny.pth contains no degradation classes'):
        run(monkeypatch, capsys, '-w', 'tiny.pth', 'pictures', '-o', 'out', '--kind', 'rain')


def test_wrong_arguments_end_with_one_line(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--kind: must be one of clean, haze, .*, got 'fog'"):
        run(monkeypatch, capsys, 'pictures', '-o', 'out', '--kind', 'fog')
    with pytest.raises(SystemExit, match='absent.png'):
        run(monkeypatch, capsys, 'pictures', '-o', 'out', '--like', 'absent.png')
    for wrong in (('--strength', '2'), ('--table', 'x.txt'), ('--kind', 'rain', '--like', 'x.png')):
        with pytest.raises(SystemExit, match='2'):
            run(monkeypatch, capsys, 'pictures', '-o', 'out', *wrong)
    assert not (folder / 'out').exists()
