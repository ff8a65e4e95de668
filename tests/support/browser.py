"""A real browser without extra packages: headless Chromium, controlled over a pipe (DevTools protocol)."""

import fcntl
import json
import os
import shutil
import subprocess
import threading
from contextlib import contextmanager

import pytest

PROGRAMS = ('chromium', 'chromium-browser', 'google-chrome')


class Browser:
    """One page. `events` are the protocol's unsolicited messages: requests, exceptions, log entries."""

    def __init__(self, reading, writing):
        self.reading, self.writing = reading, writing
        self.count, self.session, self.events = 0, None, []

    def call(self, method: str, **parameters) -> dict:
        self.count += 1
        message = {'id': self.count, 'method': method, 'params': parameters}
        if self.session:
            message['sessionId'] = self.session
        self.writing.write(json.dumps(message).encode() + b'\0')
        self.writing.flush()
        while True:
            answer = self.receive()
            if answer.get('id') == self.count:
                assert 'error' not in answer, answer
                return answer['result']
            self.events.append(answer)

    def receive(self) -> dict:
        text = bytearray()
        while (byte := self.reading.read(1)) != b'\0':
            assert byte, 'the browser has gone'
            text += byte
        return json.loads(text)

    def open(self, url: str) -> None:
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Network', 'Runtime', 'Log'):
            self.call(f'{domain}.enable')
        self.call('Page.navigate', url=url)
        while not any(event.get('method') == 'Page.loadEventFired' for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, script: str):
        answer = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def set_files(self, selector: str, *files) -> None:
        """As if chosen in a file dialog."""
        root = self.call('DOM.getDocument')['root']['nodeId']
        node = self.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
        self.call('DOM.setFileInputFiles', nodeId=node, files=[str(file) for file in files])

    def press(self, key: str) -> None:
        code = {'Home': 36, 'End': 35, 'ArrowRight': 39}[key]
        for kind in ('rawKeyDown', 'keyUp'):
            self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def above_nine(descriptor: int) -> int:
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


@contextmanager
def browser(folder, seconds: float = 60):
    """A browser with its files in `folder`, for `seconds` at most; skips the test if none is installed."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f'no browser: none of {", ".join(PROGRAMS)} is installed')
    # Above 9, so that none collides with descriptors 3 and 4, which Chromium reads and writes.
    to_browser, from_browser = (tuple(map(above_nine, os.pipe())) for _ in range(2))
    arguments = ('--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', f'--user-data-dir={folder}')
    script = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    process = subprocess.Popen(
        ['bash', '-c', script, 'bash', program, *arguments, '--remote-debugging-pipe', 'about:blank'],
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    watchdog = threading.Timer(seconds, process.kill)  # reading from a silent browser would block forever
    watchdog.start()
    os.close(to_browser[0])
    os.close(from_browser[1])
    with os.fdopen(from_browser[0], 'rb') as reading, os.fdopen(to_browser[1], 'wb') as writing:
        try:
            page = Browser(reading, writing)
            yield page
            page.session = None
            page.call('Browser.close')
            process.wait(timeout=20)
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
