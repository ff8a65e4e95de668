"""The page of `dpmambair app`, used in a real browser."""

import re
import subprocess
import sys
import time
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
from skimage import data
from support.browser import browser
from support.commands import PACKAGE_PARENT, python

from dpmambair_basicsr.data.degradations import degrade, to_uint8
from dpmambair_basicsr.files.images import to_float


@contextmanager
def served(folder):
    """The address of the page, once it answers."""
    command = [sys.executable, '-u', '-m', 'dpmambair_basicsr', 'app', '--no-browser', '--port', '0']
    (folder / 'temporary').mkdir()
    environment = {'PYTHONPATH': str(PACKAGE_PARENT), 'PATH': '/usr/bin:/bin', 'HOME': str(folder)}
    environment |= {'TMPDIR': str(folder / 'temporary')}
    with open(folder / 'log', 'w') as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        while not (found := re.search(r'http://127\.0\.0\.1:\d+', (folder / 'log').read_text())):
            assert process.poll() is None, (folder / 'log').read_text()
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def wait_for(page, condition: str):
    """The value of a script, once it is truthy."""
    while not (value := page.evaluate(condition)):
        time.sleep(0.2)  # the browser's watchdog ends a futile wait
    return value


def test_without_gradio_it_names_what_is_missing(tmp_path):
    block = "import sys; sys.modules['gradio'] = None; sys.argv = ['dpmambair', 'app'];"
    done = python('-c', f'{block} from dpmambair_basicsr.__main__ import main; main()', cwd=tmp_path)
    assert done.returncode == 1 and 'needs gradio' in done.stdout and 'pip install gradio' in done.stdout


def test_a_picture_is_restored_in_the_browser_and_downloaded(tmp_path):
    pytest.importorskip('gradio')
    photo = np.ascontiguousarray(data.coffee()[140:236, 230:342])
    rainy = to_uint8(degrade(to_float(photo), 'rain', np.random.default_rng(0), strength=0.8))
    assert cv2.imwrite(str(tmp_path / 'rainy.png'), rainy[..., ::-1])
    with served(tmp_path) as address, browser(tmp_path / 'browser', seconds=240) as page:
        page.open(address)
        wait_for(page, "document.querySelector('#source input[type=file]') !== null")
        page.set_files('#source input[type=file]', tmp_path / 'rainy.png')
        assert 'rain' in wait_for(page, "document.querySelector('#found').innerText.match(/rain[^]*%/)?.[0]")
        page.evaluate("document.querySelector('#restore').click()")
        wait_for(page, "document.querySelector('#note').innerText.includes('rainy_restored.png')")
        shown = '[...document.querySelectorAll("#slider img")]'
        wait_for(page, f'{shown}.length >= 2 && {shown}.every(image => image.complete && image.naturalWidth == 112)')
        page.call('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(tmp_path / 'downloads'))
        page.evaluate("document.querySelector('#download').click()")
        file = tmp_path / 'downloads/rainy_restored.png'
        while not file.is_file():
            page.evaluate('0')  # its watchdog ends a futile wait
            time.sleep(0.2)
        downloaded = cv2.imread(str(file))[..., ::-1]
        before, after = (np.mean((image.astype(float) - photo) ** 2) for image in (rainy, downloaded))
        assert after < before / 2
        requests = [event for event in page.events if event.get('method') == 'Network.requestWillBeSent']
        hosts = {event['params']['request']['url'].split('/')[2] for event in requests if '://' in str(event)}
        assert hosts <= {address.split('/')[2], ''}, 'it fetches nothing from elsewhere'
    assert not [*(tmp_path / 'temporary').rglob('*rainy*')], 'no picture stays behind'
