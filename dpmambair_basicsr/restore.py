"""Restore pictures: `python -m dpmambair_basicsr.restore -w net_g_latest.pth pictures/ -o restored/`.

Each result has the name and the format of its picture, and its bit depth, colour profile, EXIF data and alpha channel.
EXIF orientation is carried out: results are upright. JPEG stays JPEG, at quality 98. What cannot be read or written is
reported and skipped, and the exit status is 1 in the end. See `pictures` for files, `restorer` for the rest.
"""

import argparse
import errno
import sys
import time
from pathlib import Path

import cv2
from tqdm import tqdm

from dpmambair_basicsr.files.errors import exit_on_error, print_any_name
from dpmambair_basicsr.files.option_files import read_network
from dpmambair_basicsr.files.picture_jobs import plan
from dpmambair_basicsr.files.pictures import (
    FORMATS,
    Picture,
    check_format,
    format_of,
    read_pictures,
    restored_picture,
    side_by_side,
    write_pictures,
)
from dpmambair_basicsr.inference.memory import OutOfMemory, is_out_of_memory
from dpmambair_basicsr.inference.restorer import OVERLAP, Restorer, load
from dpmambair_basicsr.ops.selective_scan import BACKENDS

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the next picture would meet them too


def main() -> int:
    """Returns the exit status: 0, 1 if a picture failed, 130 after Ctrl-C. Wrong arguments end with 1 or 2."""
    arguments = parse_arguments()
    print_any_name()
    try:
        with exit_on_error('', ValueError, OSError):
            return run(arguments)
    except KeyboardInterrupt:
        print('stopped by Ctrl-C; --resume continues', file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # its warnings name no file
    inputs = [*arguments.inputs, *arguments.input]
    work = plan(inputs, arguments.output, arguments.suffix, arguments.ext, arguments.recursive)
    network = None if arguments.opt is None else read_network(arguments.opt)
    restorer = load(
        arguments.weights,
        network=network,
        device=arguments.device,
        half=arguments.half,
        scan_backend=arguments.scan_backend,
    )
    work.folder.mkdir(parents=True, exist_ok=True)
    if work.skipped:
        print(work.skipped_summary(), flush=True)

    left = [(source, target) for source, target in work.jobs if not (arguments.resume and target.exists())]
    done = failed = 0
    bar = tqdm(left, unit='picture', disable=None)
    for source, target in bar:
        bar.set_description(source.name)
        try:
            report = restore_file(restorer, source, target, arguments, work.folder, bar)
        except (OSError, ValueError, MemoryError, RuntimeError, cv2.error) as error:
            failed += 1
            reason = ' '.join(str(error).split()) or type(error).__name__
            if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
                reason = f'out of memory before or after the network, where tiles do not help: {reason}'
            bar.write(f'{source}: {reason}', file=sys.stderr)
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                break
        else:
            done += 1
            bar.write(f'{source}: {report}')
            sys.stdout.flush()
    there = f', {len(work.jobs) - len(left)} there already' if arguments.resume else ''
    not_tried = len(left) - done - failed
    there += f', {not_tried} not tried: free some space and use --resume' if not_tried else ''
    print(f'{arguments.output}: {done} restored, {failed} failed{there}')
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
        help='picture, folder (pictures directly in it, or -r) or pattern such as "*.png"',
    )
    add('-i', '--input', nargs='+', default=[], metavar='INPUT', help='the same')
    add(
        '-w',
        '--weights',
        required=True,
        metavar='FILE',
        help='checkpoint, net_g_*.pth or *.safetensors, or hf:user/name of the Hugging Face hub',
    )
    add(
        '-o',
        '--output',
        required=True,
        type=Path,
        metavar='PATH',
        help='folder for the results, made if it is missing; or, of one picture, a file such as out.png',
    )
    add('-r', '--recursive', action='store_true', help='folders with all below them; results keep their folders')
    add(
        '--ext',
        type=lambda text: f'.{text.lower().removeprefix(".")}',
        metavar='FORMAT',
        help='of the results: png, tif, jpg, webp, ...; default: that of their picture',
    )
    add('--opt', metavar='FILE', help='option file with network_g, for a checkpoint that does not hold its own')
    add('--tile', type=int, metavar='N', help='size of tiles; 0: none; default: by the size of the picture, see README')
    add('--overlap', type=int, default=OVERLAP, metavar='N', help='of tiles, up to half a tile; default: %(default)s')
    add('--one-pass', action='store_true', help='tiles in half the time, but less like the whole image')
    add('--device', default='auto', help='auto, cpu, cuda or cuda:<n>; default: %(default)s')
    add('--scan-backend', metavar='NAME', help=f'of the scans: {", ".join(BACKENDS)}; default: the best available')
    add('--half', action='store_true', help='half precision')
    add('--self-ensemble', action='store_true', help='mean over eight flips and rotations, in eight times the time')
    add('--suffix', default='', help='added to the names of the results')
    add('--resume', action='store_true', help='skip pictures whose result is there')
    add('--compare', action='store_true', help='also write picture and result side by side, in compare/')
    arguments = parser.parse_args()
    if arguments.ext is not None and arguments.ext not in FORMATS:
        parser.error(f'--ext: must be one of {", ".join(extension[1:] for extension in FORMATS)}')
    if not arguments.inputs and not arguments.input:
        parser.error('no INPUT')
    if arguments.tile is not None and arguments.tile < 0 or arguments.overlap < 0:
        parser.error('--tile and --overlap: 0 or more')
    return arguments


def restore_file(
    restorer: Restorer, source: Path, target: Path, arguments: argparse.Namespace, folder: Path, bar: tqdm
) -> str:
    """Restores one picture, or all frames or pages of a file.

    Returns:
        What was done, and what the result does not keep.

    Raises:
        OSError, ValueError, MemoryError, RuntimeError: it cannot be read, restored or written.
    """
    begin = time.monotonic()
    pictures, timing = read_pictures(source)
    keeps_format = arguments.ext is None and target.suffix == source.suffix
    kind = format_of(source) if keeps_format else target.suffix.lower()
    check_format(target, pictures, timing, kind)  # before the work
    results = []
    for index, picture in enumerate(pictures):
        of_all = f'{index + 1}/{len(pictures)} ' if len(pictures) > 1 else ''
        image = restorer.restore(
            picture.visible_image(),
            tile=arguments.tile,
            overlap=arguments.overlap,
            self_ensemble=arguments.self_ensemble,
            one_pass=arguments.one_pass,
            progress=lambda done, total, of_all=of_all: bar.set_postfix_str(
                of_all + ('' if total == 1 else f'tile {done}/{total}')
            ),
        )
        results.append(restored_picture(picture, image))
    target.parent.mkdir(parents=True, exist_ok=True)
    if arguments.compare:  # first: where the result is, everything is
        beside = folder / 'compare' / target.relative_to(folder)
        beside.parent.mkdir(parents=True, exist_ok=True)
        write_pictures(beside, [*map(side_by_side, pictures, results)], timing, kind)
    lost = write_pictures(target, results, timing, kind)
    report = [summary(restorer, pictures, arguments.tile, time.monotonic() - begin)]
    report += [f'left out: {", ".join(lost)}'] * bool(lost)
    report += [f'a {kind[1:]} file by its content, and so is the result'] * (kind != target.suffix.lower())
    return '; '.join(report)


def summary(restorer: Restorer, pictures: list[Picture], tile: int | None, seconds: float) -> str:
    height, width = pictures[0].image.shape[:2]
    tile = restorer.fitting_tile(height, width) if tile is None else tile
    number = f', {len(pictures)} frames or pages' if len(pictures) > 1 else ''
    tiles = f', tiles of {tile}' if 0 < tile < max(height, width) else ''
    return f'{width} x {height}{number}{tiles}, {seconds:.1f} s'


if __name__ == '__main__':
    sys.exit(main())
