"""What runs without BasicSR, and how BasicSR is installed."""

import functools
import hashlib
import http.server
import threading

import cv2
import numpy as np
import pytest
import torch
from support import warm
from support.commands import PACKAGE_PARENT, python, warm_python

from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.prepare import install_basicsr
from dpmambair_basicsr.prepare.install_basicsr import NAME

SMALL = {'dim': 16, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
# Runs a command as `python -m` does, without the packages of the extra `train`.
WITHOUT_TRAINING = """
import importlib.machinery, runpy, sys
MISSING = {'basicsr', 'addict', 'future', 'lmdb', 'lpips', 'requests', 'scipy', 'skimage', 'tensorboard',
           'torchvision', 'yapf'}
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition('.')[0] in MISSING else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
assert not MISSING & sys.modules.keys()
sys.argv = sys.argv[1:]
runpy.run_module(f'dpmambair_basicsr.{sys.argv[0]}', run_name='__main__', alter_sys=True)
"""


def without_training(*arguments, cwd):
    return warm_python('-c', WITHOUT_TRAINING, *arguments, cwd=cwd, libraries=warm.CORE)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A checkpoint and a picture."""
    folder = tmp_path_factory.mktemp('core')
    torch.manual_seed(0)
    network = {'type': 'VmambaIR', **SMALL}
    torch.save({'params': VmambaIR(**SMALL).state_dict(), 'network_g': network}, folder / 'net.pth')
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    assert cv2.imwrite(str(folder / 'a.png'), pixels)
    return folder


def test_restoring_without_basicsr_gives_the_same_bytes(folder):
    arguments = ('-w', 'net.pth', 'a.png', '-o')
    for done in (
        without_training('restore', *arguments, 'without', cwd=folder),
        warm_python('-m', 'dpmambair_basicsr.restore', *arguments, 'with', cwd=folder),
    ):
        assert done.returncode == 0, done.stdout
    assert (folder / 'without/a.png').read_bytes() == (folder / 'with/a.png').read_bytes()


def test_restoring_imports_no_basicsr_where_it_is_installed(folder):
    code = """
import sys
from dpmambair_basicsr import load
load('net.pth')
print(sorted({'basicsr', 'torchvision', 'lpips', 'skimage', 'tensorboard'} & set(sys.modules)))
"""
    done = python('-c', code, cwd=folder)
    assert (done.returncode, done.stdout) == (0, '[]\n')


@pytest.mark.parametrize(
    'arguments',
    [('convert', 'net.pth', 'net.safetensors'), ('export', '--help'), ('degradation', '--help'), ('report', '--help')],
)
def test_other_commands_run_without_basicsr(arguments, folder):
    done = without_training(*arguments, cwd=folder)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    'arguments', [('train', '-opt', 'x.yml'), ('test', '-opt', 'x.yml'), ('prepare_data', 'gopro', '.')]
)
def test_commands_that_need_basicsr_say_how_to_install_it(arguments, folder):
    done = without_training(*arguments, cwd=folder)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith(f'dpmambair_basicsr.{arguments[0]}: needs BasicSR')
    assert line.endswith("pip install 'dpmambair_basicsr[train]', then dpmambair install_basicsr")


def test_a_network_of_basicsr_is_looked_up_there_or_reported_as_missing(folder):
    network = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 2}
    (folder / 'edsr.yml').write_text(f'network_g: {network}')
    from basicsr.archs.edsr_arch import EDSR

    arguments = {key: value for key, value in network.items() if key != 'type'}
    torch.save({'params': EDSR(**arguments).state_dict()}, folder / 'edsr.pth')
    command = ('restore', '-w', 'edsr.pth', '--opt', 'edsr.yml', 'a.png', '-o', 'edsr')
    done = warm_python('-m', 'dpmambair_basicsr', *command, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert cv2.imread(str(folder / 'edsr/a.png')).shape == (80, 100, 3)
    done = without_training(*command, cwd=folder)
    assert done.returncode == 1
    assert 'unknown type EDSR' in done.stdout and 'BasicSR, which may have it, is not installed' in done.stdout


def test_option_files_are_copied_once_and_never_replaced(tmp_path):
    for _ in range(2):
        done = warm_python('-m', 'dpmambair_basicsr', 'init', 'project', cwd=tmp_path)
        assert done.returncode == 0, done.stdout
    options = {file.name: file.read_bytes() for file in (PACKAGE_PARENT / 'options').iterdir() if file.is_file()}
    assert {file.name: file.read_bytes() for file in (tmp_path / 'project/options').iterdir()} == options
    edited = tmp_path / 'project/options/train_your_own.yml'
    edited.write_text('name: mine')
    done = warm_python('-m', 'dpmambair_basicsr', 'init', 'project', cwd=tmp_path)
    assert done.returncode == 1 and 'not replaced, because they were changed: train_your_own.yml' in done.stdout
    assert edited.read_text() == 'name: mine'


def test_the_packaged_option_file_is_used_if_there_is_no_local_one(tmp_path):
    done = warm_python('-m', 'dpmambair_basicsr', 'train', '-opt', 'train_your_own.yml', cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith(f'-opt train_your_own.yml: no such file here; using {PACKAGE_PARENT / "options"}')
    assert 'datasets/your_own/train/GT' in done.stdout  # the missing data
    (tmp_path / 'train_your_own.yml').write_text('name: 1')
    done = warm_python('-m', 'dpmambair_basicsr', 'train', '-opt', 'train_your_own.yml', cwd=tmp_path)
    assert done.returncode == 1 and 'no such file here' not in done.stdout


@pytest.fixture
def index(tmp_path):
    """An index of packages with one file of the right name and other content; its address."""
    (tmp_path / 'files').mkdir()
    (tmp_path / 'files' / NAME).write_bytes(b'something else')
    (tmp_path / 'simple/basicsr').mkdir(parents=True)
    links = [f'<a href="../../files/{name}">{name}</a>' for name in ('basicsr-1.4.1.tar.gz', f'{NAME}#sha256=0')]
    (tmp_path / 'simple/basicsr/index.html').write_text('\n'.join(links))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/simple'
        server.shutdown()


def test_any_file_but_basicsr_is_refused_before_anything_is_installed(index, monkeypatch):
    monkeypatch.setenv('PIP_INDEX_URL', index)
    content = install_basicsr.download()
    assert content == b'something else'
    with pytest.raises(ValueError, match=f'expected SHA-256 .*, got {hashlib.sha256(content).hexdigest()}'):
        install_basicsr.unpack(content, PACKAGE_PARENT)


def test_an_index_without_basicsr_is_named(index, monkeypatch, tmp_path):
    monkeypatch.setenv('PIP_INDEX_URL', f'{index}/nowhere')
    with pytest.raises(ValueError, match=f'^{index}/nowhere/basicsr/: HTTP Error 404.*pass it as --file'):
        install_basicsr.download()
    monkeypatch.setenv('PIP_INDEX_URL', index)
    (tmp_path / 'simple/basicsr/index.html').write_text('nothing')
    with pytest.raises(ValueError, match='does not list basicsr-1.4.2.tar.gz exactly once'):
        install_basicsr.download()


def test_without_configuration_the_index_is_that_of_pip(monkeypatch):
    monkeypatch.delenv('PIP_INDEX_URL', raising=False)
    assert install_basicsr.index().startswith('http')
