"""Train weights for `dpmambair restore` on a folder of photographs: data, both stages, classifier, one file.

    python scripts/train_small.py PHOTOS [--minutes 9]

PHOTOS must be clean and sharp, at least 256 pixels in size; two hundred are enough. Writes to the working directory:
datasets/small, experiments/train_small_extractor, experiments/train_small, and small.safetensors in the latter.
With --minutes, it stops after that time with exit status 3; repeat the command to continue. Exit status 0: done. Takes
half an hour on one GPU, days on a CPU. Arguments after -- go to both trainings, e.g. -- --force_yml num_gpu=0.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
from tqdm import tqdm

from dpmambair_basicsr.files.codec import write_image
from dpmambair_basicsr.files.picture_jobs import list_pictures
from dpmambair_basicsr.files.pictures import read_picture

SCRIPTS = Path(__file__).resolve().parent
DATA, EXPERIMENTS = Path('datasets/small'), Path('experiments')
STAGES = ('train_small_extractor', 'train_small')
OUTPUT = EXPERIMENTS / 'train_small' / 'small.safetensors'
SIDE = 512  # pixels of the short side; larger photographs are downscaled to it, which also hides their noise and JPEG
HELD_OUT = 20  # every twentieth photograph is used for validation
NOT_DONE = 3  # exit status


def main() -> int:
    """Returns the exit status: 0, `NOT_DONE`, or a training's own."""
    arguments, training = parse_arguments()
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    if DATA.is_dir():
        print(f'{DATA} exists; {arguments.photos} is not read again')
    else:
        make_data(arguments.photos)
    for stage in STAGES:
        if not finished(stage):
            status = train(stage, training, deadline)
            if status:
                return status
    network = EXPERIMENTS / 'train_small' / 'models' / 'net_g_latest.pth'
    fit = [str(SCRIPTS / 'fit_classifier.py'), str(network), str(DATA / 'train'), '-o', str(OUTPUT)]
    return subprocess.run([sys.executable, *fit, '--check', str(DATA / 'val')]).returncode


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and those for the trainings."""
    split = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    parser.add_argument('photos', type=Path, help='folder of clean photographs')
    parser.add_argument('--minutes', type=float, help='stop after this time; repeat the command to continue')
    return parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]


def make_data(photos: Path) -> None:
    """Write the photographs as PNG to datasets/small/{train,val}, atomically."""
    paths = list_pictures(str(photos))
    if len(paths) < 2:
        raise SystemExit(f'{photos}: {len(paths)} photographs; at least two are needed')
    made = DATA.with_name('small.part')
    shutil.rmtree(made, ignore_errors=True)
    for number, path in enumerate(tqdm(paths, desc='data', unit='photograph', disable=None)):
        image = read_picture(path).image
        short = min(image.shape[:2])
        if short < SIDE // 2:
            raise SystemExit(f'{path}: {image.shape[1]} x {image.shape[0]} pixels; at least {SIDE // 2} are needed')
        if short > SIDE:
            image = cv2.resize(image, None, fx=SIDE / short, fy=SIDE / short, interpolation=cv2.INTER_AREA)
        file = made / ('val' if number % HELD_OUT == 0 else 'train') / f'{number:05d}_{path.stem}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        write_image(file, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    made.rename(DATA)


def finished(stage: str) -> bool:
    return (EXPERIMENTS / stage / 'models' / 'net_g_latest.pth').is_file()


def train(stage: str, arguments: list[str], deadline: float | None) -> int:
    """Run or resume a stage until it ends or the time is up. Returns 0, `NOT_DONE`, or the training's exit status."""
    file = SCRIPTS.parent / 'options' / f'{stage}.yml'
    command = [sys.executable, '-m', 'dpmambair_basicsr.train', '-opt', str(file), '--auto_resume', *arguments]
    process = subprocess.Popen(command)
    try:
        return process.wait(None if deadline is None else max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves and ends
        status = process.wait()
        stopped = status in (-signal.SIGTERM, 128 + signal.SIGTERM)
        return 0 if finished(stage) else NOT_DONE if stopped else status


if __name__ == '__main__':
    sys.exit(main())
