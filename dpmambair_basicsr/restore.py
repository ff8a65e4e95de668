"""Restore pictures: `python -m dpmambair_basicsr.restore pictures/ -o restored/`.

Without -w, the small network that comes with the package restores them; its card says what it does well and badly.

Each result has the name and the format of its picture, and its bit depth, colour profile, EXIF data and alpha channel.
EXIF orientation is carried out: results are upright. JPEG stays JPEG, at quality 98. What cannot be read or written is
reported and skipped, and the exit status is 1 in the end. Videos (.mp4, .mkv, .mov, .webm) are restored frame by frame,
with their sound. See `pictures` and `videos` for files, `restorer` for the rest.
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

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.codec import write_bytes
from dpmambair_basicsr.files.errors import InputError, UserError, exit_on_error, print_any_name
from dpmambair_basicsr.files.option_files import read_network
from dpmambair_basicsr.files.picture_jobs import plan
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
from dpmambair_basicsr.files.videos import VIDEOS
from dpmambair_basicsr.inference.degradation_classifier import Finding
from dpmambair_basicsr.inference.memory import OutOfMemory, is_out_of_memory
from dpmambair_basicsr.inference.restorer import OVERLAP, SHIPPED_WEIGHTS, Restorer, load
from dpmambair_basicsr.inference.video import find_in, find_shots, measure, restore_video
from dpmambair_basicsr.ops.selective_scan import BACKENDS
from dpmambair_basicsr.results import restored_images
from dpmambair_basicsr.results.restored_images import LEFT, NOT_TRIED, RESTORED, RestoredImage

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
    steering = steering_embedding(restorer, arguments)
    if arguments.weights is None:
        card = SHIPPED_WEIGHTS.with_name('README.md')
        print(f'no -w: {SHIPPED_WEIGHTS.name}, a trial of six minutes of training; what it does badly: {card}')
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
            image = restore_any(restorer, source, target, arguments, steering, work.folder, bar)
        except (UserError, OSError, ValueError, MemoryError, RuntimeError, cv2.error) as error:
            reason = ' '.join(str(error).split()) or type(error).__name__
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
    images += [RestoredImage(str(source), None, NOT_TRIED, 0) for source, _ in left[len(images) :]]
    write_records(images, arguments)
    there = f', {clean} left as they are' if clean else ''
    there += f', {len(work.jobs) - len(left)} there already' if arguments.resume else ''
    not_tried = sum(image.action == NOT_TRIED for image in images)
    there += f', {not_tried} not tried: free some space and use --resume' if not_tried else ''
    print(f'{arguments.output}: {len(left) - failed - clean - not_tried} restored, {failed} failed{there}')
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
        help='picture or video, folder (those directly in it, or -r) or pattern such as "*.png"',
    )
    add('-i', '--input', nargs='+', default=[], metavar='INPUT', help='the same')
    add(
        '-w',
        '--weights',
        metavar='FILE',
        help='checkpoint, net_g_*.pth or *.safetensors, or hf:user/name of the Hugging Face hub; '
        'default: those that come with the package',
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
        help='of restored pictures: png, tif, jpg, webp, ...; default: that of their picture',
    )
    add('--opt', metavar='FILE', help='option file with network_g, for a checkpoint that does not hold its own')
    add('--tile', type=int, metavar='N', help='size of tiles; 0: none; default: by the size of the picture, see README')
    add('--overlap', type=int, default=OVERLAP, metavar='N', help='of tiles, up to half a tile; default: %(default)s')
    add('--one-pass', action='store_true', help='tiles in half the time, but less like the whole image')
    add('--device', default='auto', help='auto, cpu, mps, cuda or cuda:<n>; default: %(default)s')
    add('--scan-backend', metavar='NAME', help=f'of the scans: {", ".join(BACKENDS)}; default: the best available')
    add('--half', action='store_true', help='half precision')
    add('--self-ensemble', action='store_true', help='mean over eight flips and rotations, in eight times the time')
    add('--suffix', default='', help='added to the names of the results')
    add('--resume', action='store_true', help='skip pictures whose result is there')
    add(
        '--strength',
        type=float,
        default=1,
        metavar='S',
        help='0 to 1: how much of the restored picture is blended in; default: 1',
    )
    add('--force', action='store_true', help='also restore what is found clean, which otherwise is copied')
    steering = parser.add_mutually_exclusive_group()
    steering.add_argument('--kind', metavar='NAME', help='undo this degradation, whatever is found: rain, haze, ...')
    steering.add_argument('--like', type=Path, metavar='FILE', help='undo what this picture suffers from')
    add(
        '--table',
        type=Path,
        metavar='FILE',
        help='.csv or .json: what was found and done, a row for each picture of this call',
    )
    add('--report', type=Path, metavar='FILE.html', help='a page with sliders, and why not to trust a result')
    add('--compare', action='store_true', help='also write picture and result side by side, in compare/')
    arguments = parser.parse_args()
    if arguments.ext is not None and arguments.ext not in FORMATS:
        parser.error(f'--ext: must be one of {", ".join(extension[1:] for extension in FORMATS)}')
    if not arguments.inputs and not arguments.input:
        parser.error('no INPUT')
    if not 0 <= arguments.strength <= 1:
        parser.error('--strength: from 0 to 1')
    if arguments.table is not None and arguments.table.suffix not in ('.csv', '.json'):
        parser.error('--table: a .csv or .json')
    if arguments.tile is not None and arguments.tile < 0 or arguments.overlap < 0:
        parser.error('--tile and --overlap: 0 or more')
    return arguments


def steering_embedding(restorer: Restorer, arguments: argparse.Namespace) -> Tensor | None:
    """(1, E) in place of every picture's own: of --kind or --like.

    Raises:
        InputError: the network has no such kind, or embeds nothing; the picture of --like cannot be restored.
        OSError: it cannot be read.
    """
    if arguments.kind is not None:
        if restorer.classifier is None:
            raise InputError(f'--kind: {arguments.weights} holds no classes of degradations; --like takes a picture')
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
        raise InputError(f'--like: {type(restorer.net).__name__} is not told what to undo')
    return embedding


def restore_file(
    restorer: Restorer,
    source: Path,
    target: Path,
    arguments: argparse.Namespace,
    steering: Tensor | None,
    folder: Path,
    bar: tqdm,
) -> RestoredImage:
    """Restores one picture, or all frames or pages of a file; one that is found clean, in all of them, is copied.

    Args:
        steering: see `steering_embedding`.

    Raises:
        OSError, ValueError, MemoryError, RuntimeError: it cannot be read, restored or written.
    """
    begin = time.monotonic()
    pictures, timing = read_pictures(source)
    keeps_format = arguments.ext is None and target.suffix == source.suffix
    kind = format_of(source) if keeps_format else target.suffix.lower()
    check_format(target, pictures, timing, kind)  # before the work
    findings = [restorer.find(picture.visible_image()) for picture in pictures]
    clean = all(finding is not None and finding.is_clean for finding in findings)
    clean = clean and steering is None and not arguments.force
    results, spreads = pictures, []
    if not clean:
        results, spreads = restore_pictures(restorer, pictures, findings, steering, arguments, bar)
    target.parent.mkdir(parents=True, exist_ok=True)
    if arguments.compare:  # first: where the result is, everything is
        beside = folder / 'compare' / target.relative_to(folder)
        beside.parent.mkdir(parents=True, exist_ok=True)
        write_pictures(beside, [*map(side_by_side, pictures, results)], timing, kind)
    lost = []
    if clean and keeps_format:
        write_bytes(target, source.read_bytes(), shared=True)
    else:
        lost = write_pictures(target, results, timing, kind)
    seconds = time.monotonic() - begin
    notes = [summary(restorer, pictures, arguments.tile, seconds)]
    notes += [f'left out: {", ".join(lost)}'] * bool(lost)
    notes += [f'a {kind[1:]} file by its content, and so is the result'] * (kind != target.suffix.lower())
    looked_at = findings[0] if clean else look_again(restorer, results[0], arguments)
    return RestoredImage(
        str(source),
        str(target),
        LEFT if clean else RESTORED,
        seconds,
        '; '.join(notes),
        **found(findings[0]),
        found_after=None if looked_at is None else looked_at.kind,
        probability_after=None if looked_at is None else looked_at.probability,
        spread=float(np.mean([spread.mean() for spread in spreads])) if spreads else None,
        spread_map=spreads[0] if spreads else None,
    )


def restore_video_file(
    restorer: Restorer,
    source: Path,
    target: Path,
    arguments: argparse.Namespace,
    steering: Tensor | None,
    folder: Path,
    bar: tqdm,
) -> RestoredImage:
    """Restores a video; one whose sampled frames are all found clean is copied. As `restore_file`."""
    begin = time.monotonic()
    bar.set_postfix_str('looking for cuts')
    shots = find_shots(source)
    find_in(restorer, source, shots)
    findings = [finding for shot in shots for finding in shot.findings]
    clean = all(finding is not None and finding.is_clean for finding in findings)
    clean = clean and steering is None and not arguments.force
    target.parent.mkdir(parents=True, exist_ok=True)
    frames = shots[-1].end
    if clean:
        lost = []
        with replacing(target) as part:
            shutil.copyfile(source, part)
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
    notes += [f'left out: {", ".join(lost)}'] * bool(lost)
    notes += ['--compare is for pictures'] * arguments.compare
    notes += ['--one-pass is for pictures: tiles of a video are seen once anyway'] * arguments.one_pass
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
    """The restored frames or pages, and with --self-ensemble where the eight disagree."""
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


def look_again(restorer: Restorer, result: Picture, arguments: argparse.Namespace) -> Finding | None:
    """What is found in the result, if somebody will read it."""
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


def write_records(images: list[RestoredImage], arguments: argparse.Namespace) -> None:
    """The table and the report, if asked for."""
    if arguments.table is not None:
        restored_images.write_table(arguments.table, images)
    if arguments.report is not None:
        weights = arguments.weights or SHIPPED_WEIGHTS.name
        restored_images.write_text(arguments.report, restored_images.page(images, weights))


def summary(restorer: Restorer, pictures: list[Picture], tile: int | None, seconds: float) -> str:
    height, width = pictures[0].image.shape[:2]
    tile = restorer.fitting_tile(height, width) if tile is None else tile
    number = f', {len(pictures)} frames or pages' if len(pictures) > 1 else ''
    tiles = f', tiles of {tile}' if 0 < tile < max(height, width) else ''
    return f'{width} x {height}{number}{tiles}, {seconds:.1f} s'


if __name__ == '__main__':
    sys.exit(main())
