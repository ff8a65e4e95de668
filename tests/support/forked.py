"""The training command in processes that start at once: forked from one that has only imported everything.

Real processes: they can be killed, signalled and limited, and have an exit status.
"""

import fcntl
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import dpmambair_basicsr.train  # before BasicSR, which cannot be imported otherwise: then nothing would be preloaded

# isort: split
import cv2
import numpy as np
import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY
from torch import nn

from support.commands import write_options

dpmambair_basicsr.register()


# Including what the command imports lazily.
CHECKS = ('dry_run', 'host', 'migration', 'sections', 'structure')
PRELOADED = ['support.forked', *(f'dpmambair_basicsr.option_checks.{name}' for name in CHECKS)]


@ARCH_REGISTRY.register()
class TinyNet(nn.Module):
    """Contains what makes two trainings differ: dropout, and a buffer that counts training iterations.

    Args:
        dropout: probability.
        seconds: minimum duration of an iteration.
        nan_in: iterations whose output is NaN.
    """

    stride = 1

    def __init__(self, *, dim: int = 4, dropout: float = 0.2, seconds: int = 0, nan_in: Sequence[int] = ()):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, dim, 3, padding=1), nn.Dropout(dropout), nn.Conv2d(dim, 3, 1))
        self.register_buffer('calls', torch.zeros((), dtype=torch.int64))
        self.seconds, self.nan_in = seconds, nan_in

    def forward(self, lq):
        output = self.body(lq) + lq
        if self.training:
            if self.seconds:
                print(f'TinyNet takes {self.seconds} s', flush=True)
                time.sleep(self.seconds)
            self.calls += 1
            if self.calls in self.nan_in:
                output = output * math.nan
        return output


@LOSS_REGISTRY.register()
class InfiniteInOneProcess(nn.L1Loss):
    """Infinite in the second process of a training, with a finite gradient."""

    def forward(self, pred, target):
        return super().forward(pred, target) + (math.inf if os.environ.get('RANK') == '1' else 0)


OPTIONS = """
name: run
model_type: RestorationModel
scale: 1
num_gpu: 0
manual_seed: 1
datasets:
  train:
    name: train set
    type: PairedDegradationDataset
    gt_size: 8
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 2
  val:
    name: val set
    type: PairedDegradationDataset
network_g: {type: TinyNet}
path: {pretrain_network_g: ~, resume_state: ~}
train:
  optim_g: {type: AdamW, lr: 1.0e-2}
  scheduler: {type: MultiStepLR, milestones: [3, 7], gamma: 0.5}
  total_iter: 10
  warmup_iter: 2
  ema_decay: 0.9
  pixel_opt: {type: L1Loss}
val:
  val_freq: 2
  save_img: false
  metrics: {psnr: {type: calculate_psnr, crop_border: 0}}
logger: {print_freq: 1, save_checkpoint_freq: 2, use_tb_logger: false}
"""


def write_images(folder: Path, count: int = 7) -> dict[str, str]:
    """Noise of 12 x 14 pixels; with batches of two an epoch has three iterations and leaves one image out."""
    rng = np.random.default_rng(0)
    for kind in ('gt', 'lq'):
        (folder / kind).mkdir(parents=True)
        for index in range(count):
            assert cv2.imwrite(str(folder / kind / f'{index}.png'), rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
    return {'dataroot_gt': str(folder / 'gt'), 'dataroot_lq': str(folder / 'lq')}


def options(images: dict[str, str]) -> dict:
    opt = yaml.safe_load(OPTIONS)
    for dataset in opt['datasets'].values():
        dataset.update(images)
    return opt


def changed(opt: dict, changes: dict) -> dict:
    """A copy with other values, by keys such as 'datasets.train.gt_size'."""
    opt = yaml.safe_load(yaml.safe_dump(opt))
    for path, value in changes.items():
        section = opt
        *sections, key = path.split('.')
        for name in sections:
            section = section[name]
        section[key] = value
    return opt


def redirect_output(output: str, log: Path) -> None:
    """Redirects stdout and stderr of this process, a group leader, to the log: a file, or through another process.

    'tee' is in the group, as in a shell's pipeline. 'terminal' is a program that shows a pseudo terminal, the
    controlling one of this process; killing it closes the terminal. Its process id is in the file <log>.pid.
    'nohup' is a file, and SIGHUP is ignored.
    """
    if output == 'nohup':
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with open(log, 'wb') as file:
        if output == 'tee':
            reader = subprocess.Popen(['tee', str(log)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            target = os.dup(reader.stdin.fileno())
        elif output == 'terminal':
            master, target = os.openpty()
            reader = subprocess.Popen(['cat'], stdin=master, stdout=file, start_new_session=True)
            os.close(master)
            fcntl.ioctl(target, termios.TIOCSCTTY, 0)
            log.with_suffix('.pid').write_text(str(reader.pid))
        else:
            target = os.dup(file.fileno())
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def child(
    arguments: list[str], folder: Path, log: Path, limit: int | None, environment: dict[str, str], output: str
) -> None:
    os.setsid() if output == 'terminal' else os.setpgid(0, 0)
    multiprocessing.set_start_method('fork', force=True)  # for the loader's workers, as in a command
    redirect_output(output, log)
    os.chdir(folder)
    os.environ |= environment
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ['train.py', *arguments]
    dpmambair_basicsr.train.main()


class Training:
    """A training in `folder` of the options `opt`; its files are in folder/experiments/run.

    Args:
        limit: maximum size of a file, in bytes.
        environment: additional variables.
        output: 'file', 'tee', 'terminal' or 'nohup', see `redirect_output`.
    """

    def __init__(
        self,
        opt: dict,
        folder: Path,
        *arguments: str,
        limit: int | None = None,
        environment: dict = {},  # noqa: B006
        output: str = 'file',
    ):
        folder.mkdir(exist_ok=True)
        self.log_file = folder / f'output {time.monotonic_ns()}.txt'
        file = write_options(opt, folder / 'options.yml')
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(PRELOADED)
        arguments = ['-opt', str(file), *arguments], folder, self.log_file, limit, dict(environment), output
        saved, tests = dict(os.environ), Path(__file__).parents[1]
        os.environ |= {'PYTHONPATH': f'{tests.parent}{os.pathsep}{tests}', 'OMP_NUM_THREADS': '1'}
        try:  # the first call starts the process that the others are forked from
            self.process = context.Process(target=child, args=arguments)
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def status(self, timeout: float = 120) -> int:
        """The exit status, negative for a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.process.pid, 9)
            raise TimeoutError(f'still running after {timeout} s:\n{self.log()}')
        return self.process.exitcode

    def log(self) -> str:
        return self.log_file.read_text(errors='replace')

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Waits until the text is in the log."""
        end = time.monotonic() + timeout
        while text not in (self.log() if self.log_file.exists() else ''):
            if time.monotonic() > end or self.process.exitcode is not None:
                raise TimeoutError(f'{text!r} is not in\n{self.log()}')
            time.sleep(0.01)


def train(opt: dict, folder: Path, *arguments: str) -> str:
    """Trains to the end; returns the log."""
    run = Training(opt, folder, *arguments)
    assert run.status() == 0, run.log()
    return run.log()


def free_port() -> int:
    """Below the ephemeral ports, so that no outgoing connection takes it before the training does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(('localhost', port))
            return port


def start_processes(opt: dict, folder: Path | list[Path], *arguments: str) -> list[Training]:
    """One training in two processes, as torchrun starts them; in one folder, or each in its own."""
    folders = folder if isinstance(folder, list) else [folder, folder]
    environment = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': '2'}
    arguments = ('--launcher', 'pytorch', *arguments)
    ranks = [environment | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(2)]
    return [Training(opt, own, *arguments, environment=rank) for own, rank in zip(folders, ranks, strict=True)]


def load(folder: Path, name: str):
    """A file of the run: models/... or training_states/..."""
    return torch.load(folder / 'experiments/run' / name, weights_only=True)


def states(folder: Path) -> list[int]:
    return sorted(int(file.stem) for file in (folder / 'experiments/run/training_states').glob('*.state'))
