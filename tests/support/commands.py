"""For tests that run real commands: a subprocess, small images, options for BasicSR's MSRResNet, BasicSR's source."""

import copy
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

import dpmambair_basicsr
from support import warm

PACKAGE_PARENT = Path(dpmambair_basicsr.__file__).parents[1]


def run(*command, cwd, **environment) -> subprocess.CompletedProcess:
    """Runs a command that finds this checkout's dpmambair_basicsr; stderr goes to stdout."""
    environment = {'PYTHONPATH': PACKAGE_PARENT, 'OMP_NUM_THREADS': 1, 'PYTHONDONTWRITEBYTECODE': 1} | environment
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def python(*arguments, cwd, **environment) -> subprocess.CompletedProcess:
    return run(sys.executable, *arguments, cwd=cwd, **environment)


def warm_python(*arguments, cwd, libraries=warm.TRAINING, **environment) -> subprocess.CompletedProcess:
    """Like `python`, without the seconds that importing PyTorch and other libraries takes; see `warm`."""
    return run(warm.executable(libraries), *arguments, cwd=cwd, **environment)


def command(name: str, *arguments, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """`python -m dpmambair_basicsr.<name> <arguments>`, forked from a process that has imported PyTorch and BasicSR.

    Saves the seconds that Python takes to start; tests of a command's start and imports use `python`.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['dpmambair_basicsr.evidence.preload'])
    environment = {'PYTHONPATH': PACKAGE_PARENT, 'OMP_NUM_THREADS': 1} | environment
    environment = os.environ | {variable: str(value) for variable, value in environment.items()}
    arguments = [str(argument) for argument in arguments]
    saved = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, 'output.txt')
        process = context.Process(target=forked, args=(name, arguments, cwd, environment, output))
        os.environ |= environment
        try:  # the first call starts the process that the others are forked from
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(saved)
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(name, 300, output.read_bytes())
        return subprocess.CompletedProcess([name, *arguments], process.exitcode, output.read_text(encoding='utf-8'))


def forked(name: str, arguments: list[str], cwd: Path, environment: dict[str, str], output: Path) -> None:
    multiprocessing.set_start_method('fork', force=True)  # for the loader's workers, as in a command
    with output.open('wb') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(cwd))
    sys.argv = [name, *arguments]
    runpy.run_module(f'dpmambair_basicsr.{name}', run_name='__main__', alter_sys=True)


def write_images(folder: Path) -> dict[str, str]:
    """Four pairs, GT 32 x 32 and LQ 8 x 8; returns a dataset's dataroot_gt and dataroot_lq."""
    rng = np.random.default_rng(0)
    for kind, size in (('gt', 32), ('lq', 8)):
        (folder / kind).mkdir(parents=True)
        for index in range(4):
            image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            assert cv2.imwrite(str(folder / kind / f'{index}.png'), image)
    return {'dataroot_gt': str(folder / 'gt'), 'dataroot_lq': str(folder / 'lq')}


# Two iterations of a tiny MSRResNet on the CPU, by BasicSR's own model; AdamW is unknown to an unpatched BasicSR 1.4.2.
STOCK = yaml.safe_load("""
name: tiny
model_type: SRModel
scale: 4
num_gpu: 0
manual_seed: 0
datasets:
  train:
    name: train set
    type: PairedImageDataset
    io_backend: {type: disk}
    gt_size: 16
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 2
  val:
    name: val set
    type: PairedImageDataset
    io_backend: {type: disk}
network_g: {type: MSRResNet, num_feat: 4, num_block: 1, upscale: 4}
path: {pretrain_network_g: ~, strict_load_g: true, resume_state: ~}
train:
  optim_g: {type: AdamW, lr: 1.0e-3}
  scheduler: {type: MultiStepLR, milestones: [100], gamma: 0.5}
  total_iter: 2
  pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}
val:
  val_freq: 2
  save_img: false
  metrics: {psnr: {type: calculate_psnr, crop_border: 4}}
logger: {print_freq: 1, save_checkpoint_freq: 2, use_tb_logger: false}
""")


def stock_options(images: dict[str, str]) -> dict:
    """STOCK with data, a fresh copy to change."""
    opt = copy.deepcopy(STOCK)
    for dataset in opt['datasets'].values():
        dataset.update(images)
    return opt


def write_options(opt: dict, file: Path) -> Path:
    """Replaces the file at once: another process of the same training may be reading it."""
    part = file.with_name(f'{file.name}.part')
    part.write_text(yaml.safe_dump(opt, sort_keys=False))
    return part.replace(file)


def basicsr_source(folder: Path) -> Path:
    """Unpacks BasicSR 1.4.2's source distribution there; downloaded once and cached in the virtual environment."""
    cache = Path(sys.prefix) / 'cache'
    archive = cache / 'basicsr-1.4.2.tar.gz'
    if not archive.is_file():
        pip = ('-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:', '--no-build-isolation')
        download = python(*pip, '--dest', folder / 'download', 'basicsr==1.4.2', cwd=folder)
        if download.returncode:
            pytest.skip(f"BasicSR's source cannot be downloaded: {download.stdout.strip().splitlines()[-1]}")
        cache.mkdir(exist_ok=True)
        shutil.move(folder / 'download' / archive.name, archive)
    with tarfile.open(archive) as source:
        source.extractall(folder, filter='data')
    return folder / 'basicsr-1.4.2'
