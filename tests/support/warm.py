"""A Python that starts at once: forked from a process that has imported libraries, but neither BasicSR nor our package.

`executable()` is used like `sys.executable`. Each command is a process of its own, with its arguments, environment,
folder, output and exit status; what it starts by `sys.executable` starts at once as well. Unlike a real start, it has
no input, does not get its client's signals, and ignores what only the interpreter reads in the environment, such as
PYTHONSAFEPATH. Tests of these, of imports and of the start itself use the real Python.
"""

import atexit
import functools
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CORE = ('numpy', 'cv2', 'torch', 'yaml')  # what the package needs
TRAINING = (*CORE, 'numba', 'scipy.stats', 'setuptools', 'torchvision')  # what BasicSR needs as well


@functools.cache
def executable(libraries: tuple[str, ...] = TRAINING) -> Path:
    """The program. The process that has imported the libraries lives as long as the tests."""
    folder = tempfile.TemporaryDirectory(prefix='warm')
    program, address = Path(folder.name, 'python'), Path(folder.name, 'socket')
    client = shlex.join([sys.executable, '-IS', str(Path(__file__).with_name('warm_client.py')), str(address)])
    program.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(address))
        listening.listen()
        command = [sys.executable, str(Path(__file__).with_name('warm_server.py')), str(listening.fileno())]
        environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        server = subprocess.Popen(
            [*command, str(program), *libraries],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
            env=environment | {'OMP_NUM_THREADS': '1'},
        )
    atexit.register(end, server, folder)
    return program


def end(server: subprocess.Popen, folder: tempfile.TemporaryDirectory) -> None:
    server.kill()
    server.wait()
    folder.cleanup()
