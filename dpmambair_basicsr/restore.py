"""Restore pictures: `python -m dpmambair_basicsr.restore -w net_g_latest.pth pictures/ -o restored/`.

Each result has the name and the format of its picture, and its bit depth, colour profile, EXIF data and alpha channel.
EXIF orientation is carried out: results are upright. JPEG stays JPEG, at quality 98. What cannot be read or written is
reported and skipped, and the exit status is 1 in the end. See `pictures` for files, `restorer` for the rest.
"""

import argparse
import sys
from pathlib import Path

import cv2
from tqdm import tqdm

from dpmambair_basicsr.files.errors import InputError, exit_on_error
from dpmambair_basicsr.files.option_files import read_network
from dpmambair_basicsr.files.pictures import (
    check_format,
    list_pictures,
    read_picture,
    restored_picture,
    side_by_side,
    write_picture,
)
from dpmambair_basicsr.inference.memory import OutOfMemory, is_out_of_memory
from dpmambair_basicsr.inference.restorer import OVERLAP, Restorer, load
from dpmambair_basicsr.ops.selective_scan import BACKENDS


def main() -> int:
    """Returns the exit status: 0, or 1 if a picture failed. Wrong arguments end with a message and 1 or 2."""
    arguments = parse_arguments()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # its warnings name no file
    with exit_on_error('', ValueError, OSError):
        jobs = plan([*arguments.inputs, *arguments.input], arguments.output, arguments.suffix)
        network = None if arguments.opt is None else read_network(arguments.opt)
        restorer = load(
            arguments.weights,
            network=network,
            device=arguments.device,
            half=arguments.half,
            scan_backend=arguments.scan_backend,
        )
        arguments.output.mkdir(parents=True, exist_ok=True)

    left = [(source, target) for source, target in jobs if not (arguments.resume and target.exists())]
    failed = 0
    bar = tqdm(left, unit='picture', disable=None)
    for source, target in bar:
        bar.set_description(source.name)
        try:
            restore_file(restorer, source, target, arguments, bar)
        except (OSError, ValueError, MemoryError, RuntimeError, cv2.error) as error:
            failed += 1
            reason = ' '.join(str(error).split()) or type(error).__name__
            if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
                reason = f'out of memory before or after the network, where tiles do not help: {reason}'
            bar.write(f'{source}: {reason}', file=sys.stderr)
    there = f', {len(jobs) - len(left)} there already' if arguments.resume else ''
    print(f'{arguments.output}: {len(left) - failed} restored, {failed} failed{there}')
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m dpmambair_basicsr.restore', description=__doc__.partition('\n\n')[2].partition(' See ')[0]
    )
    add = parser.add_argument
    add(
        'inputs',
        nargs='*',
        metavar='INPUT',
        help='picture, folder (pictures directly in it) or pattern such as "*.png"',
    )
    add('-i', '--input', nargs='+', default=[], metavar='INPUT', help='the same')
    add(
        '-w',
        '--weights',
        required=True,
        metavar='FILE',
        help='checkpoint, net_g_*.pth or *.safetensors, or hf:user/name of the Hugging Face hub',
    )
    add('-o', '--output', required=True, type=Path, metavar='FOLDER', help='for the results; made if it is missing')
    add('--opt', metavar='FILE', help='option file with network_g, for a checkpoint that does not hold its own')
    add('--tile', type=int, metavar='N', help='size of tiles; 0: none; default: none, or as large as memory allows')
    add('--overlap', type=int, default=OVERLAP, metavar='N', help='of tiles, up to half a tile; default: %(default)s')
    add('--one-pass', action='store_true', help='tiles in half the time, but less like the whole image')
    add('--device', default='auto', help='auto, cpu, cuda or cuda:<n>; default: %(default)s')
    add('--scan-backend', metavar='NAME', help=f'of the scans: {", ".join(BACKENDS)}; default: the best available')
    add('--half', action='store_true', help='half precision')
    add('--self-ensemble', action='store_true', help='mean over eight flips and rotations, in eight times the time')
    add('--suffix', default='', help='added to the names of the results')
    add('--resume', action='store_true', help='skip pictures whose result is there')
    add('--compare', action='store_true', help='also write picture and result side by side, in FOLDER/compare')
    arguments = parser.parse_args()
    if not arguments.inputs and not arguments.input:
        parser.error('no INPUT')
    if arguments.tile is not None and arguments.tile < 0 or arguments.overlap < 0:
        parser.error('--tile and --overlap: 0 or more')
    return arguments


def plan(inputs: list[str], output: Path, suffix: str) -> list[tuple[Path, Path]]:
    """(picture, result) of each picture once, in the order of the arguments.

    Raises:
        InputError: no picture under an argument, two pictures with one result, or a result in place of a picture.
    """
    sources = {}  # result -> picture
    for argument in inputs:
        found = list_pictures(argument)
        if not found:
            raise InputError(f'{argument}: no picture there')
        for source in found:
            target = output / f'{source.stem}{suffix}{source.suffix}'
            other = sources.setdefault(target, source)
            if not same_file(other, source):
                raise InputError(f'{target}: would be the result of both {other} and {source}')
    pictures = {source.resolve() for source in sources.values()}
    for target in sources:
        if target.resolve() in pictures:
            raise InputError(f'{target}: is a picture itself; choose another -o than its folder, or a --suffix')
    return [(source, target) for target, source in sources.items()]


def same_file(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def restore_file(restorer: Restorer, source: Path, target: Path, arguments: argparse.Namespace, bar: tqdm) -> None:
    """Restores one picture.

    Raises:
        OSError, ValueError, MemoryError, RuntimeError: it cannot be read, restored or written.
    """
    picture = read_picture(source)
    check_format(target, picture)  # before the work
    image = restorer.restore(
        picture.image,
        tile=arguments.tile,
        overlap=arguments.overlap,
        self_ensemble=arguments.self_ensemble,
        one_pass=arguments.one_pass,
        progress=lambda done, total: bar.set_postfix_str('' if total == 1 else f'tile {done}/{total}'),
    )
    result = restored_picture(picture, image)
    if arguments.compare:  # first: where the result is, everything is
        folder = arguments.output / 'compare'
        folder.mkdir(exist_ok=True)
        write_picture(folder / target.name, side_by_side(picture, result))
    write_picture(target, result)


if __name__ == '__main__':
    sys.exit(main())
