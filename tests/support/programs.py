"""The training command as a shell starts it, by torchrun and the like, with `2>&1 | tee log`; without TinyNet."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.commands import PACKAGE_PARENT, write_options
from support.forked import changed

NETWORK = {'type': 'SRVGGNetCompact', 'num_feat': 4, 'num_conv': 1, 'upscale': 1}
TIMEOUT = ('timeout', '900', sys.executable)
TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
TORCHRUN += ('--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1',)  # it is ended by others
TORCHRUN += ('--shutdown-timeout=200',)  # on a busy machine, an iteration and its checkpoint may take that long


@contextmanager
def training(program: tuple[str, ...], opt: dict, folder: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A program that runs a training, after six iterations, and its log. It leads a process group that includes tee."""
    file, log = write_options(changed(opt, {'network_g': NETWORK}), folder / 'options.yml'), folder / 'log'
    command = [*program, '-m', 'dpmambair_basicsr.train', '-opt', str(file)]
    if program is TORCHRUN:
        command += ['--launcher', 'pytorch']
    environment = os.environ | {'PYTHONPATH': str(PACKAGE_PARENT), 'OMP_NUM_THREADS': '1'}
    script = f'exec {shlex.join(command)} > >(exec tee {log.name} > /dev/null) 2>&1'
    log.touch()
    run = subprocess.Popen(['bash', '-c', script], cwd=folder, env=environment, start_new_session=True)
    started = []
    try:
        end = time.monotonic() + 400
        while 'iter:       6,' not in log.read_text():
            assert time.monotonic() < end and run.poll() is None, log.read_text()
            time.sleep(0.05)
        started = children(run.pid)
        yield run, log
    finally:
        for pid in started or children(run.pid):  # nothing else waits for them
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.kill()
        run.wait()


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    try:
        own = [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return []
    return [*own, *(grandchild for child in own for grandchild in children(child))]
