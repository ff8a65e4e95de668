"""Restore pictures: `python -m dpmambair_basicsr.restore pictures/ -o restored/`.

Without -w, the small bundled network is used; its model card lists its strengths and weaknesses.

Each result keeps the name and format of its picture, its bit depth, colour profile, EXIF data and alpha channel.
EXIF orientation is applied: results are upright. JPEG stays JPEG, at quality 98. Files that cannot be read or written
are reported and skipped, and the exit status is then 1. Videos (.mp4, .m4v, .mov, .mkv, .webm) are restored frame by
frame and keep their sound. See `pictures` and `videos` for files, `restorer` for the rest.
"""

import argparse
import errno
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor
from tqdm import tqdm

from dpmambair_basicsr.files.atomic import check_file, replacing
from dpmambair_basicsr.files.codec import write_bytes
from dpmambair_basicsr.files.errors import InputError, UserError, exit_on_error, print_any_name
from dpmambair_basicsr.files.option_files import read_network
from dpmambair_basicsr.files.picture_jobs import Plan, plan
from dpmambair_basicsr.files.pictures import (
    FORMATS,
    Picture,
    check_format,
    format_of,
    read_picture,
    read_pictures,
    restored_picture,
    side_by_side,
    write_pictures,
)
from dpmambair_basicsr.files.videos import VIDEOS, rewrite
from dpmambair_basicsr.inference.degradation_classifier import Finding
from dpmambair_basicsr.inference.memory import OutOfMemory, is_out_of_memory
from dpmambair_basicsr.inference.restorer import OVERLAP, SHIPPED_WEIGHTS, Restorer, load
from dpmambair_basicsr.inference.video import find_in, find_shots, measure, restore_video
from dpmambair_basicsr.ops.selective_scan import BACKENDS
from dpmambair_basicsr.results import restored_images
from dpmambair_basicsr.results.restored_images import LEFT, NOT_TRIED, RESTORED, RestoredImage

EXPECTED = (UserError, OSError, ValueError, MemoryError, RuntimeError, cv2.error)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the next picture would fail too


def main() -> int:
    """Return the exit status: 0, 1 if a picture failed, 130 after Ctrl-C; 1 or 2 for wrong arguments."""
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
    work = plan(inputs, arguments.output, arguments.suffix, arguments.ext, arguments.recursive, arguments.compare)
    for record in (arguments.table, arguments.report):
        if record is not None:
            check_file(record)
    network = None if arguments.opt is None else read_network(arguments.opt)
    restorer = load(
        arguments.weights,
        network=network,
        device=arguments.device,
        half=arguments.half,
        scan_backend=arguments.scan_backend,
    )
    steering = steering_embedding(restorer, arguments)
    if arguments.weights is None:
        card = SHIPPED_WEIGHTS.with_name('README.md')
        print(f'no -w: using {SHIPPED_WEIGHTS.name}, a trial trained for six minutes; its weaknesses: {card}')
    work.folder.mkdir(parents=True, exist_ok=True)
    if work.skipped:
        print(work.skipped_summary(), flush=True)

    left = [(source, target) for source, target in work.jobs if not (arguments.resume and target.exists())]
    images = []
    bar = tqdm(left, unit='picture', disable=None)
    for source, target in bar:
        bar.set_description(source.name)
        begin = time.monotonic()
        try:
            is_video = source.suffix.lower() in VIDEOS
            restore_any = restore_video_file if is_video else restore_file
            image = restore_any(restorer, source, target, arguments, steering, work, bar)
        except KeyboardInterrupt:
            write_records(images, left, arguments)
            raise
        except Exception as error:  # of whatever kind: the other pictures do not depend on it
            reason = ' '.join(str(error).split())
            if not reason or not isinstance(error, EXPECTED):
                reason = f'{type(error).__name__} {reason}'.strip()
            if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
                reason = f'out of memory before or after the network, where tiles do not help: {reason}'
            bar.write(f'{source}: {reason}', file=sys.stderr)
            images.append(RestoredImage(str(source), None, f'failed: {reason}', time.monotonic() - begin))
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                break
        else:
            images.append(image)
            bar.write(image.line())
            sys.stdout.flush()
    failed = sum(image.result is None for image in images)
    clean = sum(image.action == LEFT for image in images)
    images = write_records(images, left, arguments)
    others = f', {clean} left unchanged' if clean else ''
    others += f', {len(work.jobs) - len(left)} already done' if arguments.resume else ''
    not_tried = sum(image.action == NOT_TRIED for image in images)
    others += f', {not_tried} not tried: free some space and use --resume' if not_tried else ''
    print(f'{arguments.output}: {len(left) - failed - clean - not_tried} restored, {failed} failed{others}')
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m dpmambair_basicsr.restore',
        description=(__doc__ or '').partition('\n\n')[2].partition(' See ')[0],
    )
    add = parser.add_argument
    add(
        'inputs',
        nargs='*',
        metavar='INPUT',
        help='picture, video, pattern such as "*.png", or folder: the files directly in it; with -r, all below it',
    )
    add('-i', '--input', nargs='+', default=[], metavar='INPUT', help='same as INPUT')
    add(
        '-w',
        '--weights',
        metavar='FILE',
        help='checkpoint, net_g_*.pth or *.safetensors, or hf:user/name on the Hugging Face Hub; '
        'default: the bundled weights',
    )
    add(
        '-o',
        '--output',
        required=True,
        type=Path,
        metavar='PATH',
        help='folder for the results, created if missing; or, for a single picture, a file such as out.png',
    )
    add('-r', '--recursive', action='store_true', help='include sub-folders; results keep the folder structure')
    add(
        '--ext',
        type=lambda text: f'.{text.lower().removeprefix(".")}',
        metavar='FORMAT',
        help='format of the results: png, tif, jpg, webp, ...; default: the format of each picture',
    )
    add('--opt', metavar='FILE', help='option file with network_g, for a checkpoint without its own')
    add('--tile', type=int, metavar='N', help='tile size; 0: no tiles; default: by the size of the picture, see README')
    add('--overlap', type=int, default=OVERLAP, metavar='N', help='of tiles, at most half a tile; default: %(default)s')
    add('--one-pass', action='store_true', help='tiles in half the time, less accurate')
    add('--device', default='auto', help='auto, cpu, mps, cuda or cuda:<n>; default: %(default)s')
    add('--scan-backend', metavar='NAME', help=f'one of {", ".join(BACKENDS)}; default: the best available')
    add('--half', action='store_true', help='compute in half precision')
    add('--self-ensemble', action='store_true', help='average over eight flips and rotations, in eight times the time')
    add('--suffix', default='', help='suffix added to the names of the results')
    add('--resume', action='store_true', help='skip pictures whose result exists')
    add(
        '--strength',
        type=float,
        default=1,
        metavar='S',
        help='blend input and result: 0 gives the input, 1 the result; default: 1',
    )
    add('--force', action='store_true', help='also restore pictures found to be clean, which otherwise are copied')
    steering = parser.add_mutually_exclusive_group()
    steering.add_argument('--kind', metavar='NAME', help='undo this degradation, whatever is found: rain, haze, ...')
    steering.add_argument('--like', type=Path, metavar='FILE', help='undo the degradation of this picture')
    add(
        '--table',
        type=Path,
        metavar='FILE',
        help='.csv or .json: what was found and done, one row per picture of this run',
    )
    add('--report', type=Path, metavar='FILE.html', help='page with sliders, and reasons not to trust a result')
    add('--compare', action='store_true', help='also write picture and result side by side, to compare/')
    arguments = parser.parse_args()
    if arguments.ext is not None and arguments.ext not in FORMATS:
        parser.error(f'--ext: must be one of {", ".join(extension[1:] for extension in FORMATS)}')
    if not arguments.inputs and not arguments.input:
        parser.error('no INPUT')
    if not 0 <= arguments.strength <= 1:
        parser.error('--strength: must be from 0 to 1')
    if arguments.table is not None and arguments.table.suffix not in ('.csv', '.json'):
        parser.error('--table: must end in .csv or .json')
    if arguments.report is not None and arguments.report.suffix.lower() not in ('.html', '.htm'):
        parser.error('--report: must end in .html')
    if arguments.tile is not None and arguments.tile < 0 or arguments.overlap < 0:
        parser.error('--tile and --overlap: must be 0 or more')
    return arguments


def steering_embedding(restorer: Restorer, arguments: argparse.Namespace) -> Tensor | None:
    """The embedding of --kind or --like, (1, E), that replaces every picture's own.

    Raises:
        InputError: the network has no such kind, or no embedding; the picture of --like cannot be restored.
        OSError: the picture of --like cannot be read.
    """
    if arguments.kind is not None:
        if restorer.classifier is None:
            raise InputError(f'--kind: {arguments.weights} contains no degradation classes; use --like with a picture')
        try:
            return restorer.classifier.embedding_of(arguments.kind)
        except ValueError as error:
            raise InputError(f'--{error}') from None
    if arguments.like is None:
        return None
    try:
        embedding = restorer.embedding_of(read_picture(arguments.like).visible_image())
    except ValueError as error:
        raise InputError(f'--like: {arguments.like}: {error}') from None
    if embedding is None:
        raise InputError(f'--like: {type(restorer.net).__name__} has no degradation embedding')
    return embedding


def restore_file(
    restorer: Restorer,
    source: Path,
    target: Path,
    arguments: argparse.Namespace,
    steering: Tensor | None,
    work: Plan,
    bar: tqdm,
) -> RestoredImage:
    """Restore one picture, or all frames or pages of a file; if all are found clean, copy it.

    Args:
        steering: see `steering_embedding`.

    Raises:
        OSError, ValueError, MemoryError, RuntimeError: the picture cannot be read, restored or written.
    """
    begin = time.monotonic()
    pictures, timing = read_pictures(source)
    keeps_format = arguments.ext is None and target.suffix == source.suffix
    kind = format_of(source) if keeps_format else target.suffix.lower()
    check_format(target, pictures, timing, kind)  # up front
    findings = [restorer.find(picture.visible_image()) for picture in pictures]
    clean = all(finding is not None and finding.is_clean for finding in findings)
    clean = clean and steering is None and not arguments.force
    results, spreads = pictures, []
    if not clean:
        results, spreads = restore_pictures(restorer, pictures, findings, steering, arguments, bar)
    target.parent.mkdir(parents=True, exist_ok=True)
    lost, refused = [], ''
    if arguments.compare:  # first, so that an existing result means that everything was written
        beside = work.beside(target)
        beside.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_pictures(beside, [*map(side_by_side, pictures, results)], timing, kind)
        except ValueError as error:
            refused = f'not compared: {error}'
    if clean and keeps_format:
        write_bytes(target, source.read_bytes(), shared=True)
    else:
        lost = write_pictures(target, results, timing, kind)
    seconds = time.monotonic() - begin
    notes = [summary(restorer, pictures, arguments.tile, seconds)]
    notes += [f'left out: {", ".join(lost)}'] * bool(lost)
    notes += [refused] * bool(refused)
    notes += [f'actually a {kind[1:]} file, and so is the result'] * (kind != target.suffix.lower())
    found_after = findings[0] if clean else find_in_result(restorer, results[0], arguments)
    return RestoredImage(
        str(source),
        str(target),
        LEFT if clean else RESTORED,
        seconds,
        '; '.join(notes),
        **found(findings[0]),
        found_after=None if found_after is None else found_after.kind,
        probability_after=None if found_after is None else found_after.probability,
        spread=float(np.mean([spread.mean() for spread in spreads])) if spreads else None,
        spread_map=spreads[0] if spreads else None,
    )


def restore_video_file(
    restorer: Restorer,
    source: Path,
    target: Path,
    arguments: argparse.Namespace,
    steering: Tensor | None,
    work: Plan,
    bar: tqdm,
) -> RestoredImage:
    """Restore a video, or copy it if all sampled frames are found clean. Arguments and errors as in `restore_file`."""
    begin = time.monotonic()
    bar.set_postfix_str('looking for cuts')
    shots = find_shots(source)
    find_in(restorer, source, shots)
    findings = [finding for shot in shots for finding in shot.findings]
    clean = all(finding is not None and finding.is_clean for finding in findings)
    clean = clean and steering is None and not arguments.force
    target.parent.mkdir(parents=True, exist_ok=True)
    frames = shots[-1].end
    keeps_format = target.suffix.lower() == source.suffix.lower()
    if clean and keeps_format:
        lost = []
        with replacing(target) as part:
            shutil.copyfile(source, part)
    elif clean:
        lost = rewrite(source, target, lambda frame: frame.image)
    else:
        options = {name: getattr(arguments, name) for name in ('tile', 'overlap', 'self_ensemble')}
        measure(restorer, source, shots, steering, **options)
        lost = restore_video(
            restorer,
            source,
            target,
            shots,
            lambda done: bar.set_postfix_str(f'frame {done}/{frames}'),
            strength=arguments.strength,
            **options,
        )
    seconds = time.monotonic() - begin
    notes = [f'{frames} frames, {len(shots)} shot{"s" * (len(shots) > 1)}, {seconds:.1f} s']
    notes += [f'encoded again, for {target.suffix.lower()}'] * (clean and not keeps_format)
    notes += [f'left out: {", ".join(lost)}'] * bool(lost)
    notes += ['--compare applies to pictures only'] * arguments.compare
    notes += ['--one-pass applies to pictures only: videos always take one pass over their tiles'] * arguments.one_pass
    worst = next((finding for finding in findings if finding is not None and not finding.is_clean), findings[0])
    action = LEFT if clean else RESTORED
    return RestoredImage(str(source), str(target), action, seconds, '; '.join(notes), **found(worst))


def restore_pictures(
    restorer: Restorer,
    pictures: list[Picture],
    findings: list[Finding | None],
    steering: Tensor | None,
    arguments: argparse.Namespace,
    bar: tqdm,
) -> tuple[list[Picture], list[np.ndarray]]:
    """The restored frames or pages and, with --self-ensemble, the spread of the eight results."""
    results, spreads = [], []
    for index, picture in enumerate(pictures):
        of_all = f'{index + 1}/{len(pictures)} ' if len(pictures) > 1 else ''
        image = picture.visible_image()
        embedding = restorer.embedding_for(image, findings[index]) if steering is None else steering
        image = restorer.restore(
            image,
            tile=arguments.tile,
            overlap=arguments.overlap,
            strength=arguments.strength,
            embedding=embedding,
            return_spread=arguments.self_ensemble,
            one_pass=arguments.one_pass,
            progress=lambda done, total, of_all=of_all: bar.set_postfix_str(
                of_all + ('' if total == 1 else f'tile {done}/{total}')
            ),
        )
        if arguments.self_ensemble:
            image, spread = image
            spreads.append(spread)
        results.append(restored_picture(picture, image))
    return results, spreads


def find_in_result(restorer: Restorer, result: Picture, arguments: argparse.Namespace) -> Finding | None:
    """What is found in the result, if it goes into a table or report."""
    return None if arguments.table is arguments.report is None else restorer.find(result.visible_image())


def found(finding: Finding | None) -> dict:
    if finding is None:
        return {}
    (kind, probability), (second, second_probability) = list(finding.probabilities.items())[:2]
    return {
        'found': kind,
        'probability': probability,
        'second': second,
        'second_probability': second_probability,
        'distance': finding.distance,
        'familiar': finding.familiar,
    }


def write_records(
    images: list[RestoredImage], jobs: list[tuple[Path, Path]], arguments: argparse.Namespace
) -> list[RestoredImage]:
    """Write the table and the report, if requested; returns their images, the last of which were not tried."""
    images = images + [RestoredImage(str(source), None, NOT_TRIED, 0) for source, _ in jobs[len(images) :]]
    if arguments.table is not None:
        restored_images.write_table(arguments.table, images)
    if arguments.report is not None:
        weights = arguments.weights or SHIPPED_WEIGHTS.name
        restored_images.write_text(arguments.report, restored_images.page(images, weights))
    return images


def summary(restorer: Restorer, pictures: list[Picture], tile: int | None, seconds: float) -> str:
    height, width = pictures[0].image.shape[:2]
    tile = restorer.fitting_tile(height, width) if tile is None else tile
    number = f', {len(pictures)} frames or pages' if len(pictures) > 1 else ''
    tiles = f', tiles of {tile}' if 0 < tile < max(height, width) else ''
    return f'{width} x {height}{number}{tiles}, {seconds:.1f} s'


if __name__ == '__main__':
    sys.exit(main())
