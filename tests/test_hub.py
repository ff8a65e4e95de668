"""`load('hf:user/name')` and `dpmambair push`, with a local server that has the hub's layout."""

import base64
import hashlib
import http.server
import json
import re
import threading

import numpy as np
import pytest
import torch
from support.commands import warm_python

from dpmambair_basicsr import load
from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.files.checkpoints import read_checkpoint

pytest.importorskip('huggingface_hub')
NETWORK = {'type': 'VmambaIR', 'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's API as far as the client uses it for one repository: its files, and commits of small files."""

    protocol_version = 'HTTP/1.1'
    files: dict[str, bytes] = {}
    asked: list[str] = []

    def answer(self, content: bytes = b'', status: int = 200, **headers):
        self.send_response(status)
        for name, value in ({'Content-Length': str(len(content))} | headers).items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def answer_json(self, value):
        self.answer(json.dumps(value).encode(), Content_Type='application/json')

    def do_GET(self):
        self.asked.append(self.path)
        name = re.fullmatch(r'/someone/net/resolve/main/(.+)', self.path)
        if name and name[1] in self.files:
            content = self.files[name[1]]
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit='0' * 40)
        elif name:
            self.answer(status=404, X_Error_Code='EntryNotFound')
        else:
            self.answer(status=404, X_Error_Code='RepoNotFound')

    do_HEAD = do_GET

    def do_POST(self):
        self.asked.append(self.path)
        length = self.headers.get('Content-Length')
        body = self.rfile.read(int(length)) if length else self.chunks()
        if self.path == '/api/repos/create':
            self.answer_json({'url': f'http://{self.headers["Host"]}/someone/net', 'id': 'someone/net'})
        elif self.path == '/api/models/someone/net/preupload/main':
            files = json.loads(body)['files']
            self.answer_json({'files': [{**file, 'uploadMode': 'regular', 'shouldIgnore': False} for file in files]})
        elif self.path == '/api/models/someone/net/commit/main':
            for line in body.splitlines():
                entry = json.loads(line)
                if entry['key'] == 'file':
                    self.files[entry['value']['path']] = base64.b64decode(entry['value']['content'])
            url = f'http://{self.headers["Host"]}/someone/net/commit/{"0" * 40}'
            self.answer_json({'commitUrl': url, 'commitOid': '0' * 40, 'success': True})
        elif self.path == '/api/validate-yaml':
            self.answer_json({'errors': [], 'warnings': []})
        else:
            self.answer(status=404)

    def chunks(self) -> bytes:
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The class of the server, with the files and requests of this test; commands connect to it."""
    server = type('HubOfThisTest', (Hub,), {'files': {}, 'asked': []})
    with http.server.ThreadingHTTPServer(('localhost', 0), server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv('HF_ENDPOINT', f'http://localhost:{running.server_port}')
        monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
        monkeypatch.setenv('HF_TOKEN', 'hf_of_this_test')
        monkeypatch.setenv('HF_HUB_DISABLE_XET', '1')
        monkeypatch.setenv('NO_PROXY', 'localhost')
        yield server
        running.shutdown()


def write_checkpoint(folder):
    torch.manual_seed(0)
    arguments = {key: value for key, value in NETWORK.items() if key != 'type'}
    nets = {key: VmambaIR(**arguments).state_dict() for key in ('params', 'params_ema')}
    torch.save(nets | {'network_g': NETWORK}, folder / 'net_g_8.pth')


def command(*arguments, cwd):
    return warm_python('-m', 'dpmambair_basicsr', *arguments, cwd=cwd)


LOAD = """
import numpy as np, dpmambair_basicsr
image = np.random.default_rng(0).integers(0, 256, (17, 20, 3), dtype=np.uint8)
np.save('restored.npy', dpmambair_basicsr.load('hf:someone/net').restore(image))
"""


def test_pushed_files_are_what_others_load(hub, tmp_path):
    write_checkpoint(tmp_path)
    result = command('push', 'net_g_8.pth', 'someone/net', cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.splitlines()[-1].endswith('/someone/net'), result.stdout
    assert {*hub.files} == {'README.md', 'config.json', 'model.safetensors'}
    assert json.loads(hub.files['config.json']) == {'network_g': NETWORK}
    card = hub.files['README.md'].decode()
    assert card.startswith('---\nlibrary_name: dpmambair_basicsr\n') and "load('hf:someone/net')" in card
    (tmp_path / 'pushed.safetensors').write_bytes(hub.files['model.safetensors'])
    pushed = read_checkpoint(str(tmp_path / 'pushed.safetensors'))
    average = torch.load(tmp_path / 'net_g_8.pth')['params_ema']
    assert pushed['network_g'] == NETWORK and pushed['params'].keys() == average.keys()
    assert all(torch.equal(pushed['params'][name], value) for name, value in average.items())

    result = warm_python('-c', LOAD, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    image = np.random.default_rng(0).integers(0, 256, (17, 20, 3), dtype=np.uint8)
    expected = load(tmp_path / 'net_g_8.pth').restore(image)
    assert np.array_equal(np.load(tmp_path / 'restored.npy'), expected)

    hub.asked.clear()
    result = warm_python('-c', LOAD, cwd=tmp_path, HF_HUB_OFFLINE=1)
    assert result.returncode == 0 and not hub.asked, 'the file is kept'


def test_an_existing_card_is_kept(hub, tmp_path):
    write_checkpoint(tmp_path)
    hub.files['README.md'] = b'what the owner wrote'
    result = command('push', 'net_g_8.pth', 'someone/net', cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert hub.files['README.md'] == b'what the owner wrote' and 'model.safetensors' in hub.files


def test_files_that_load_would_refuse_are_not_pushed(hub, tmp_path):
    torch.save({'params': {'weight': torch.zeros(2)}, 'network_g': {'type': 'MSRResNet'}}, tmp_path / 'other.pth')
    result = command('push', 'other.pth', 'someone/net', cwd=tmp_path)
    assert result.returncode == 1 and re.search(r'^dpmambair push: other\.pth: network_g', result.stdout, re.M)
    assert not hub.asked


def test_missing_repositories_and_files_are_named(hub, tmp_path):
    (tmp_path / 'x.png').write_bytes(b'')
    result = command('restore', '-w', 'hf:someone/nothing', '-o', 'restored', 'x.png', cwd=tmp_path)
    assert re.search(r'^.*hf:someone/nothing: model\.safetensors cannot be downloaded \(\w+', result.stdout, re.M)
    result = command('restore', '-w', 'hf:someone/net', '-o', 'restored', 'x.png', cwd=tmp_path)
    assert re.search(
        r'^.*hf:someone/net: model\.safetensors cannot be downloaded \(\w*EntryNotFound', result.stdout, re.M
    )


def test_nothing_is_asked_of_the_hub_for_a_file(hub, tmp_path):
    write_checkpoint(tmp_path)
    code = LOAD.replace('hf:someone/net', 'net_g_8.pth') + "import sys; assert 'huggingface_hub' not in sys.modules"
    result = warm_python('-c', code, cwd=tmp_path)
    assert result.returncode == 0 and not hub.asked, result.stdout
