"""Any content of a file of options, results, weights or pixels is read, or refused with the intended error."""

import copy
import inspect
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.utils import options as basicsr_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import forked

import dpmambair_basicsr
from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.files.images import ImageReader
from dpmambair_basicsr.registry import ARCH_REGISTRY
from dpmambair_basicsr.results import run as results
from dpmambair_basicsr.results.comparison import compare, label_runs, to_markdown
from dpmambair_basicsr.results.page import page

dpmambair_basicsr.register()
# The same examples in each run of the same tests: a finding deserves its own test.
BOUNDED = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


# Options


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('fuzz')


@pytest.fixture(scope='module')
def opt(folder):
    return forked.options(forked.write_images(folder / 'images'))


def parse(file, *arguments) -> dict | None:
    """The options as BasicSR's parser returns them; None if they are refused with a message that names the file."""
    saved = sys.argv
    sys.argv = ['train.py', '-opt', str(file), *arguments]
    try:
        return basicsr_options.parse_options(str(file.parent), is_train=True)[0]
    except SystemExit as refusal:
        assert str(refusal.code).startswith(f'{file}: '), refusal.code
        return None
    finally:
        sys.argv = saved


EXTREMES = st.sampled_from([10**6, 10**9, 10**12, -(10**12), 10**25, 1e300, '../x', '/', 'x' * 300])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=3),
    EXTREMES,
)
VALUES = st.recursive(
    SCALARS,
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.one_of(st.text(max_size=5), SCALARS), part, max_size=3)
    ),
    max_leaves=5,
)


def places(section, path=()) -> list[tuple]:
    """Paths of all values."""
    found = [(*path, key) for key in section]
    parts = [places(value, (*path, key)) for key, value in section.items() if isinstance(value, dict)]
    return found + [place for part in parts for place in part]


def with_value(opt: dict, place: tuple, value, replace: bool) -> dict:
    opt = copy.deepcopy(opt)
    section = opt
    for key in place[:-1]:
        section = section[key]
    if replace:
        section[place[-1]] = value
    else:
        del section[place[-1]]
    return opt


@settings(BOUNDED, max_examples=150)
@given(data=st.data())
def test_any_value_anywhere(opt, folder, data):
    place = data.draw(st.sampled_from(places(opt)))
    changed = with_value(opt, place, data.draw(VALUES), replace=data.draw(st.integers(0, 5)) > 0)
    file = folder / 'any value.yml'
    file.write_text(yaml.safe_dump(changed, sort_keys=False, allow_unicode=True), encoding='utf-8')
    parse(file)


@settings(BOUNDED, max_examples=100)
@given(
    content=st.one_of(
        st.binary(max_size=60), st.text(max_size=60), st.text('{}[]:-!&*#|>\'"%@` \n\tab1.~', max_size=40)
    )
)
def test_any_content(folder, content):
    file = folder / 'any content.yml'
    file.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass'))
    assert parse(file) is None


@settings(BOUNDED, max_examples=60)
@given(
    section=st.sampled_from(['', 'train', 'train:optim_g', 'datasets:train', 'name', 'no_such']),
    key=st.text('abcdefghijklmnopqrstuvwxyz_"[];()\\\'=:. ', max_size=12),
    value=st.text(max_size=12),
)
def test_any_forced_option(opt, folder, section, key, value):
    file = folder / 'forced.yml'
    if not file.exists():
        file.write_text(yaml.safe_dump(opt, sort_keys=False))
    entry = f'{section}:{key}={value}' if section else f'{key}={value}'
    if not entry.startswith('-') and '\0' not in entry:
        parse(file, '--force_yml', entry)


# Results and checkpoints

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | EXTREMES,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3),
    max_leaves=5,
)


@settings(BOUNDED, max_examples=200)
@given(data=st.data())
def test_any_value_in_results(folder, data):
    """Whatever is read can be put into tables and a page."""
    part = results.SetResult('Rain100H', 1, 'rain', {'1': 'input/1.png'}, {'psnr': 30.0}, {'psnr': 20.0})
    metrics = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}
    run = asdict(results.Run('x', 'x.yml', [], 'x.pth', 'params', 'abc', {'torch': '2'}, metrics, 'x', [part]))
    place = data.draw(
        st.sampled_from(places(run)) | st.sampled_from(places(run['sets'][0])).map(lambda path: (0, *path))
    )
    if place[0] == 0:
        run['sets'] = [with_value(run['sets'][0], place[1:], data.draw(JSON_VALUES), data.draw(st.booleans()))]
    else:
        run = with_value(run, place, data.draw(JSON_VALUES), data.draw(st.booleans()))
    file = folder / 'results.json'
    file.write_text(json.dumps(run))
    try:
        runs = label_runs([str(file)])
        comparison = compare(runs)
        assert to_markdown(comparison) and page(comparison, dict.fromkeys(runs, folder), runs, None, [])
    except ValueError as error:
        assert str(error)


@pytest.fixture(scope='module')
def tiny_weights():
    return VmambaIR(**TINY).state_dict()


TINY = {'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}


@settings(BOUNDED, max_examples=60)
@given(data=st.data())
def test_any_network_in_a_checkpoint(folder, tiny_weights, data):
    known = sorted(ARCH_REGISTRY.known()) + ['dim', 'x']
    options = {'type': data.draw(st.just('VmambaIR') | st.sampled_from(known)), **TINY}
    keys = sorted(inspect.signature(VmambaIR).parameters)
    options |= data.draw(st.dictionaries(st.sampled_from(keys), JSON_VALUES, max_size=2))
    file = folder / 'any network.pth'
    torch.save({'params': tiny_weights, 'network_g': options}, file)
    try:
        net = dpmambair_basicsr.load(file).net
    except ValueError as error:
        assert str(error).startswith(f'{file}: ')
    else:
        assert net.state_dict().keys() == tiny_weights.keys()


# Images


def encoded(extension: str, channels: int = 3, kind=np.uint8) -> bytes:
    image = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (9, 11, channels), kind)
    done, content = cv2.imencode(extension, image)
    assert done
    return content.tobytes()


IMAGES = [encoded('.png'), encoded('.jpg'), encoded('.bmp'), encoded('.webp'), encoded('.tiff'), encoded('.png', 1)]
IMAGES += [encoded('.png', 4), encoded('.png', 3, np.uint16), encoded('.tiff', 3, np.uint16)]


@pytest.fixture(scope='module')
def quiet():
    """The decoders' own messages go to the terminal, bypassing pytest."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    yield
    os.dup2(saved, 2)
    os.close(saved)
    os.close(nowhere)


@settings(BOUNDED, max_examples=400)
@given(data=st.data())
def test_any_image_file(folder, quiet, data):
    content = bytearray(data.draw(st.sampled_from(IMAGES) | st.binary(max_size=40)))
    for _ in range(data.draw(st.integers(0, 6))):
        place = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(['change', 'cut', 'insert', 'remove']))
        if kind == 'change' and place < len(content):
            content[place] = data.draw(st.integers(0, 255))
        elif kind == 'cut':
            del content[place:]
        elif kind == 'insert':
            content[place:place] = data.draw(st.binary(max_size=5))
        else:
            del content[place : place + 3]
    file = Path(folder, 'image.png')
    file.write_bytes(content)
    try:
        image = ImageReader({'type': 'disk'}, {'lq': str(folder)}).read(str(file), 'lq', 7)
    except ValueError as error:
        assert str(error).startswith(f'item 7: lq image {file} is ')
    else:
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype in (np.uint8, np.uint16)
