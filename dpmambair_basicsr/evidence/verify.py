"""Restore three images of a test again and check that the numbers repeat: `dpmambair verify results/NAME`.

Checkpoint, option file and images are those named in the folder's results.json; their hashes are compared first. On the
same device and with the same versions as the test, restored images and numbers must be bit-identical; otherwise the
numbers must agree to a thousandth. The exit status is 1 if they do not.
"""

import argparse
import math
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from dpmambair_basicsr.files.atomic import sha256
from dpmambair_basicsr.files.errors import CheckpointError, InputError, exit_on_error
from dpmambair_basicsr.results.run import Run, Sample, read_run

IMAGES = 3
TOLERANCE = 1e-3  # relative, on another device or with other versions


@dataclass(frozen=True)
class Repetition:
    """An image restored again: the sample of the test, and the new one."""

    name: str
    then: Sample
    now: Sample

    @property
    def is_equal(self) -> bool:
        return self.then == self.now

    @property
    def is_close(self) -> bool:
        values = self.then.values
        return values.keys() == self.now.values.keys() and all(
            value == self.now.values[metric] or math.isclose(value, self.now.values[metric], rel_tol=TOLERANCE)
            for metric, value in values.items()
        )

    def line(self) -> str:
        values = ', '.join(f'{metric} {value:.6f}' for metric, value in self.now.values.items())
        if self.is_equal:
            return f'{self.name}: {values}: bit-identical'
        before = ', '.join(f'{metric} {value:.6f}' for metric, value in self.then.values.items())
        return f'{self.name}: {values}; in the test {before}'


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='dpmambair verify', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('results', type=Path, help='results folder of a test')
    folder = parser.parse_args().results
    with exit_on_error('dpmambair verify', ValueError, OSError):
        run = read_run(folder)
        places = chosen(folder, run)
        check_files(folder, run)
        changed, images = restore_again(folder, run, places)
    for image in images:
        print(image.line())
    equal = all(image.is_equal for image in images)
    if not changed:
        print(f'{folder}: the numbers {"repeat" if equal else "DO NOT repeat"} (same device and versions)')
        sys.exit(not equal)
    close = all(image.is_close for image in images)
    repeat = 'are bit-identical' if equal else f'agree to {TOLERANCE:g}' if close else 'DO NOT repeat'
    print(f'{folder}: the numbers {repeat}; changed since the test: {"; ".join(changed)}')
    sys.exit(not close)


def chosen(folder: Path, run: Run) -> list[tuple[str, str]]:
    """(set, image) of three samples, from as many sets as possible.

    Raises:
        InputError: the results were written by a version without hashes.
    """
    by_set = [[(part.name, image) for image in part.samples] for part in run.sets]
    rounds = [images[place] for place in range(IMAGES) for images in by_set if place < len(images)]
    if not rounds:
        raise InputError(
            f'{folder}: its results.json has no hashes, since an earlier version wrote it; run the test again'
        )
    return rounds[:IMAGES]


def check_files(folder: Path, run: Run) -> None:
    """Raise CheckpointError or InputError if the checkpoint or the option file is missing or has changed."""
    if run.checkpoint and not Path(run.checkpoint).is_file():
        raise CheckpointError(f'{run.checkpoint}: not found; run verify in the folder where the test was run')
    if run.checkpoint and sha256(run.checkpoint) != run.sha256:
        raise CheckpointError(f'{run.checkpoint}: not the checkpoint of the test, whose SHA-256 is {run.sha256}')
    if not option_file(folder, run).is_file():
        raise InputError(f'{option_file(folder, run)}: not found; a test leaves a copy of its option file there')


def option_file(folder: Path, run: Run) -> Path:
    return folder / Path(run.options).name


def restore_again(folder: Path, run: Run, places: list[tuple[str, str]]) -> tuple[list[str], list[Repetition]]:
    """What has changed since the test, and the images; by BasicSR's validation, without writing anything.

    Raises:
        OptionError: the option file can no longer be used.
        InputError: the data have changed.
    """
    from dpmambair_basicsr import registration

    pipeline = sys.modules[registration.pipeline('test').__module__]
    sys.argv = ['dpmambair verify', '-opt', str(option_file(folder, run))]
    sys.argv += ['--force_yml', *run.forced] if run.forced else []
    opt, _ = pipeline.parse_options(str(Path.cwd()), is_train=False)
    opt['val']['save_img'] = False
    model = pipeline.build_model(opt)
    if not hasattr(model, 'measure_again'):
        raise InputError(f'{folder}: {shlex.quote(opt["model_type"])} is not one of our models')
    images = []
    datasets = {dataset['name']: dataset for dataset in opt['datasets'].values()}
    for set_name, image in places:
        part = next(part for part in run.sets if part.name == set_name)
        if set_name not in datasets:
            raise InputError(f'{folder}: the option file no longer has a set {set_name}')
        then = part.samples[image]
        again = model.measure_again(pipeline.build_dataset(datasets[set_name]), then.index)
        if again.hashes != {image: part.hashes[image]}:
            raise InputError(f'{set_name}: image {then.index} is no longer {image}: the data have changed')
        if again.samples[image].truth != then.truth:
            raise InputError(f'{set_name}: the clean image of {image} has changed since the test')
        now = replace(again.samples[image], index=then.index)
        images.append(Repetition(f'{set_name}/{image}', then, now))
    return changes(run, model.monitor.circumstances()), images


def changes(run: Run, now: dict[str, str]) -> list[str]:
    then = {'device': run.device, **run.versions}
    return [f'{name} {value}, then {then.get(name, "none")}' for name, value in now.items() if value != then.get(name)]
