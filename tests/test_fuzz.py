"""Whatever is in an option file or an image file: it is read, or refused by the error that is meant for it."""

import copy
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from basicsr.utils import options as basicsr_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import forked

import dpmambair_basicsr
from dpmambair_basicsr.files.images import ImageReader

dpmambair_basicsr.register()
# The same examples in each run of the same tests: a finding belongs into a test of its own.
BOUNDED = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


# Options


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('fuzz')


@pytest.fixture(scope='module')
def opt(folder):
    return forked.options(forked.write_images(folder / 'images'))


def parse(file, *arguments) -> dict | None:
    """The options as BasicSR's parser gives them, None if they are refused with a message that names the file."""
    saved = sys.argv
    sys.argv = ['train.py', '-opt', str(file), *arguments]
    try:
        return basicsr_options.parse_options(str(file.parent), is_train=True)[0]
    except SystemExit as refusal:
        assert str(refusal.code).startswith(f'{file}: '), refusal.code
        return None
    finally:
        sys.argv = saved


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=8), st.binary(max_size=3)
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
    """The decoders' own messages go to the terminal, past pytest."""
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
