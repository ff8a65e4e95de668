"""The training command as torchrun starts it: real commands, in which TinyNet is not known."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.commands import PACKAGE_PARENT, write_options
from support.forked import changed

NETWORK = {'type': 'SRVGGNetCompact', 'num_feat': 4, 'num_conv': 1, 'upscale': 1}


@contextmanager
def torchrun(opt: dict, folder: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """torchrun's process and the log of a training in two processes that has done six iterations."""
    file, log = write_options(changed(opt, {'network_g': NETWORK}), folder / 'options.yml'), folder / 'log'
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '--shutdown-timeout=100',
    ]
    command += ['-m', 'dpmambair_basicsr.train', '-opt', str(file), '--launcher', 'pytorch']
    environment = os.environ | {'PYTHONPATH': str(PACKAGE_PARENT), 'OMP_NUM_THREADS': '1'}
    with open(log, 'wb') as output:
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 400
        while 'iter:       6,' not in log.read_text():
            assert time.monotonic() < end and run.poll() is None, log.read_text()
            time.sleep(0.05)
        yield run, log
    finally:
        for pid in [*children(run.pid), run.pid] if run.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        run.wait()


def children(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have started."""
    own = [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    return [*own, *(grandchild for child in own for grandchild in children(child))]
