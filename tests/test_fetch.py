"""`dpmambair fetch`: downloads are verified, complete, and where the losses look for them. From a local server."""

import functools
import hashlib
import http.server
import re
import threading
from types import SimpleNamespace

import pytest
import torch
import torchvision

from dpmambair_basicsr.losses.lpips_network import BACKBONES, backbone_path, build_lpips
from dpmambair_basicsr.prepare import fetch


@pytest.fixture
def server(tmp_path):
    """The address of a server, and the folder that it serves."""
    folder = tmp_path / 'served'
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(('localhost', 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f'http://localhost:{running.server_port}', folder
        running.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


def serve_alexnet(server, monkeypatch, digits=None):
    """A file of AlexNet's shape under the name of its SHA-256; returns its name."""
    address, folder = server
    torch.save(torchvision.models.AlexNet().state_dict(), folder / 'random')
    digits = digits or hashlib.sha256((folder / 'random').read_bytes()).hexdigest()[:8]
    (folder / 'random').rename(folder / f'alexnet-owt-{digits}.pth')
    monkeypatch.setitem(BACKBONES, 'alex', SimpleNamespace(url=f'{address}/alexnet-owt-{digits}.pth'))
    return f'alexnet-owt-{digits}.pth'


def run(monkeypatch, *names):
    monkeypatch.setattr('sys.argv', ['dpmambair fetch', *names])
    fetch.main()


def test_what_is_fetched_is_what_lpips_finds(server, cache, monkeypatch, capsys):
    name = serve_alexnet(server, monkeypatch)
    with pytest.raises(FileNotFoundError, match='`dpmambair fetch alex`'):
        build_lpips('alex')
    run(monkeypatch, 'alex')
    assert capsys.readouterr().out.strip() == backbone_path('alex') == str(cache / name)
    assert (cache / name).read_bytes() == (server[1] / name).read_bytes()
    build_lpips('alex')
    (server[1] / name).unlink()
    run(monkeypatch, 'alex')  # it exists, so there is no request


def test_a_file_with_another_checksum_is_not_kept(server, cache, monkeypatch):
    serve_alexnet(server, monkeypatch, digits='00000000')
    with pytest.raises(SystemExit, match='dpmambair fetch: http.*expected "00000000"'):
        run(monkeypatch, 'alex')
    assert not list(cache.iterdir())


def test_an_existing_wrong_file_is_named_and_kept(server, cache, monkeypatch):
    name = serve_alexnet(server, monkeypatch)
    cache.mkdir(parents=True)
    (cache / name).write_bytes(b'truncated')
    with pytest.raises(SystemExit, match=rf'{name}: not the file at .*delete it'):
        run(monkeypatch, 'alex')
    assert (cache / name).read_bytes() == b'truncated'


def test_a_server_without_the_file_is_named(server, cache, monkeypatch):
    name = serve_alexnet(server, monkeypatch)
    (server[1] / name).unlink()
    with pytest.raises(SystemExit, match=f'dpmambair fetch: http.*{name} cannot be downloaded to .*404'):
        run(monkeypatch, 'alex')
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ('name', 'file'), [('alex', 'alexnet-owt-7be5be79'), ('vgg', 'vgg16-397923af'), ('vgg19', 'vgg19-dcbb9e9d')]
)
def test_the_files_are_those_of_torchvision(name, file):
    assert fetch.urls()[name] == f'https://download.pytorch.org/models/{file}.pth'


def test_every_name_but_one_has_a_file_whose_name_ends_in_its_checksum():
    urls = fetch.urls()
    assert urls.keys() > {*BACKBONES, 'vgg11', 'vgg19_bn'}
    without = [name for name, url in urls.items() if not re.search(r'-[0-9a-f]{8}\.pth$', url)]
    assert without == ['dists']


def test_a_misspelt_name_is_refused(monkeypatch):
    with pytest.raises(SystemExit, match='dpmambair fetch: alexx: unknown name, did you mean alex?'):
        run(monkeypatch, 'alexx')
