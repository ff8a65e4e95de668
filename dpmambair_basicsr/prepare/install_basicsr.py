"""Installs BasicSR 1.4.2 on any Python, without compiling: `dpmambair install_basicsr`.

BasicSR is published only as source. Its setup.py does not run on Python 3.13, downloads a second PyTorch for the
build, and requires tb-nightly, which conflicts with tensorboard. This command downloads that source from pip's index
(or takes --file), checks its SHA-256, changes these three places, and lets pip install the rest unchanged.
"""

import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from dpmambair_basicsr.files.errors import InputError, exit_on_error

VERSION = '1.4.2'
NAME = f'basicsr-{VERSION}.tar.gz'
SHA256 = 'b89b595a87ef964cda9913b4d99380ddb6554c965577c0c10cb7b78e31301e87'
MAX_BYTES = 10 * 2**20  # the file has 172 kB
# {file: (text, replacement), ...}. `exec` no longer changes the locals of a function, see PEP 667.
CHANGES = {
    'setup.py': [
        ("exec(compile(f.read(), version_file, 'exec'))", "exec(compile(f.read(), version_file, 'exec'), globals())"),
        ("locals()['__version__']", "globals()['__version__']"),
        ("        setup_requires=['cython', 'numpy', 'torch'],\n", ''),
    ],
    'requirements.txt': [('tb-nightly', 'tensorboard')],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='dpmambair install_basicsr',
        description=(__doc__ or '').partition('\n\n')[2],
        epilog='All other arguments go to pip install, such as --no-deps.',
    )
    parser.add_argument('--file', type=Path, metavar=NAME, help='source distribution, if already downloaded')
    arguments, for_pip = parser.parse_known_args()
    with exit_on_error('dpmambair install_basicsr', OSError):
        source = arguments.file.read_bytes() if arguments.file else download()
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, '-m', 'pip', 'install', *for_pip, str(unpack(source, Path(folder)))]
            sys.exit(subprocess.run(command).returncode)


def index() -> str:
    """The index that pip uses.

    Raises:
        InputError: there is no pip.
    """
    if from_environment := os.environ.get('PIP_INDEX_URL'):
        return from_environment
    command = [sys.executable, '-m', 'pip', 'config', 'get', 'global.index-url']
    configured = subprocess.run(command, capture_output=True, text=True)
    if configured.returncode == 0:
        return configured.stdout.strip()
    try:
        from pip._internal.models.index import PyPI
    except ImportError as error:
        raise InputError(f'needs pip in this environment, or --file {NAME} and pip ({error})') from error
    return PyPI.simple_url


def download() -> bytes:
    """BasicSR's source distribution. Raises InputError or OSError."""
    page = f'{index().rstrip("/")}/basicsr/'
    try:
        with urllib.request.urlopen(page, timeout=60) as response:
            links = re.findall(r'href="([^"]+)"', response.read(MAX_BYTES).decode())
            page = response.url
        (link,) = {link.partition('#')[0] for link in links if urllib.parse.urlparse(link).path.endswith(f'/{NAME}')}
        with urllib.request.urlopen(urllib.parse.urljoin(page, link), timeout=60) as response:
            size = int(response.headers.get('Content-Length') or 0) or None
            with tqdm.wrapattr(response, 'read', total=size, desc=NAME, disable=None) as stream:
                return stream.read(MAX_BYTES)
    except ValueError as error:
        raise InputError(f'{page} does not list {NAME} exactly once; pass the file as --file') from error
    except OSError as error:
        raise InputError(f'{page}: {error}; download {NAME} elsewhere and pass it as --file') from error


def unpack(source: bytes, folder: Path) -> Path:
    """Unpacks the changed source into a folder below `folder`.

    Raises:
        InputError: it is not the expected source.
    """
    if (found := hashlib.sha256(source).hexdigest()) != SHA256:
        raise InputError(f'{NAME}: expected SHA-256 {SHA256}, got {found}')
    with tarfile.open(fileobj=io.BytesIO(source)) as archive:
        archive.extractall(folder, filter='data')
    root = folder / NAME.removesuffix('.tar.gz')
    for name, changes in CHANGES.items():
        text = (root / name).read_text(encoding='utf-8')
        for old, new in changes:
            if text.count(old) != 1:
                raise InputError(f'{NAME}: {name} does not contain exactly one {old!r}')
            text = text.replace(old, new)
        (root / name).write_text(text, encoding='utf-8')
    return root


if __name__ == '__main__':
    main()
