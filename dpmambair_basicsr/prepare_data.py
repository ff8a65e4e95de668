"""Arrange a downloaded public dataset in the folders that the option files expect. Downloads nothing.

    python -m dpmambair_basicsr.prepare_data gopro GOPRO_Large.zip
    python -m dpmambair_basicsr.prepare_data df2k DIV2K_train_HR.zip Flickr2K.tar --output /big/disk/datasets
    python -m dpmambair_basicsr.prepare_data snow100k --help    layouts and counts, with sources

Accepts folders, zip and tar archives (several if the dataset has several) and never changes them. Every image used is
decoded. All problems (an unexpected count, images without partner, broken images) are reported together, and then
nothing is put in place. From a folder, results are links, or copies with --copy; from an archive, they are files.
Generated LQ images and tiles are PNG files.

To resume an interrupted command, repeat it. Until a part is complete, it is built in hidden folders beside its
destination (.GT.gopro.train); <output>/.prepared lists its files, so that a repeated command does nothing, and a
changed one replaces only these. Your own files in a result folder are reported as a problem. docs/data.md has a table
of all datasets; their definitions are in dpmambair_basicsr/prepare/public_sets.py.
"""

import argparse
import importlib.util
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

from dpmambair_basicsr.files.codec import image_size
from dpmambair_basicsr.files.errors import INSTALL_TRAINING, InputError, MissingLibraryError, exit_on_error
from dpmambair_basicsr.files.image_folders import list_images
from dpmambair_basicsr.files.image_lists import list_keys
from dpmambair_basicsr.prepare.download import Download, is_image, whole
from dpmambair_basicsr.prepare.job import Job, files_of, read_journal
from dpmambair_basicsr.prepare.public_sets import (
    SETS,
    Layout,
    Part,
    PublicSet,
    compile_pattern,
)


def find_obstacles(jobs: list[Job], public: PublicSet, root: Path, paths: list[Path]) -> list[str]:
    """Problems: results inside a download, and files that would be overwritten."""
    records = [file for kind in ('done', 'journal') for file in (root / '.prepared').glob(f'*.{kind}')]
    ours = {file for record in records for file in files_of(read_journal(record)[1])}
    problems = []
    for folder in sorted({folder for job in jobs for folder in job.folders}):
        for path in paths:
            if path.is_dir() and (root / folder).resolve().is_relative_to(path.resolve()):
                problems.append(f'the results, {root / folder}, would be inside the download {path}; move it elsewhere')
        if (root / folder).is_dir():
            found = {f'{folder}/{path.name}' for path in (root / folder).iterdir() if is_image(path.name)}
            problems += [f'{root / file} is in the way: not created by this command' for file in sorted(found - ours)]
    for link, folder in public.aliases.items():
        if os.path.lexists(root / link) and os.path.realpath(root / link) != os.path.realpath(root / folder):
            problems.append(f'{root / link} is in the way: it should be a link to {folder}')
    return problems


def make_alias(link: Path, folder: Path) -> None:
    """Create a relative link, so that the results can be moved as a whole."""
    if not os.path.lexists(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(os.path.relpath(folder.resolve(), link.parent.resolve()), link, target_is_directory=True)


def write_list(root: Path, file: str, folders: tuple[str, ...]) -> None:
    """Write paths relative to the file's folder, one per line, as BasicSR's RealESRGANDataset reads them."""
    there = [folder for folder in folders if (root / folder).is_dir()]
    base = (root / file).parent
    images = [Path(path) for folder in there for path in list_images(str(root / folder)).values()]
    with whole(root / file) as temporary:
        temporary.write_text(''.join(f'{image.relative_to(base)}\n' for image in images), encoding='utf-8')
    missing = ''.join(f'; {folder} is still missing' for folder in folders if folder not in there)
    print(f'{root / file}: {len(images)} images of {", ".join(there)}{missing}')


def make_lmdb(folder: Path) -> None:
    """Create <folder>.lmdb with BasicSR, unless it is up to date. Images are stored as PNG."""
    images = {stem: Path(path) for stem, path in list_images(str(folder)).items()}
    target, temporary = folder.with_name(f'{folder.name}.lmdb'), folder.with_name(f'.{folder.name}.part.lmdb')
    same = (target / 'meta_info.txt').is_file() and sorted(list_keys(str(target))) == sorted(images)
    if same and (target / 'data.mdb').stat().st_mtime >= max(image.lstat().st_ctime for image in images.values()):
        print(f'{target} is complete.')
        return
    shutil.rmtree(temporary, ignore_errors=True)
    pixels = 0
    for image in images.values():
        size = image_size(image.read_bytes())
        assert size is not None, 'an image, since it was decoded before'
        pixels += size[0] * size[1]
    room = 2**24 + 8 * pixels + 2**14 * len(images)  # an upper bound for 3 channels of 16 bits, and pages
    names = [image.name for image in images.values()]
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    make_lmdb_from_imgs(str(folder), str(temporary), names, list(images), map_size=room)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def report(public: PublicSet, problems: list[str]) -> str:
    plural = '' if len(problems) == 1 else 's'
    return '\n  '.join([f'{public.title}: {len(problems)} problem{plural}:', *problems])


def arrange(jobs: list[Job], public: PublicSet, root: Path, paths: list[Path], args: argparse.Namespace) -> None:
    """Arrange all parts, or none.

    Raises:
        InputError: listing all problems.
    """
    if obstacles := find_obstacles(jobs, public, root, paths):
        raise InputError(report(public, obstacles))
    downloads, problems, bad = [Download(path) for path in paths], [], []
    for job in jobs:
        try:
            bad += job.plan(downloads, (Layout(*args.layout),) if args.layout else job.part.layouts, args.subset)
            problems += [] if args.any_count else job.check_count()
        except ValueError as error:
            problems.append(str(error))
    for job in jobs:
        bad += job.run(args.workers) if job.pairs else []
    if args.skip_bad:
        problems += [f'{job.name}: no images left' for job in jobs if not job.pairs]
        if bad:
            print(f'{report(public, bad)}\nThese images are skipped.', file=sys.stderr)
    else:
        problems += bad
    if problems:
        raise InputError(
            f'{report(public, problems)}\nNothing was put in place. Valid images are kept for the next run.'
        )
    for job in jobs:
        job.finish()


def prepare(args: argparse.Namespace) -> None:
    if importlib.util.find_spec('basicsr') is None:  # for its lmdb and its bicubic weights; checked up front
        raise MissingLibraryError(f'needs BasicSR, which is not installed: {INSTALL_TRAINING}')
    public, root = SETS[args.set], args.output.absolute()
    paths = [path.absolute() for path in args.download]
    files = {path: path.stat() for path in paths if path.is_file()}
    states = [[str(path), *([files[path].st_size, files[path].st_mtime_ns] if path in files else [])] for path in paths]
    recipe = {'downloads': states, 'copy': args.copy, 'layout': args.layout, 'subset': args.subset}
    jobs = [Job(f'{args.set}.{split}', public.parts[split], root, recipe, args.copy) for split in args.part]
    if todo := [job for job in jobs if not job.is_complete()]:
        arrange(todo, public, root, paths, args)
    for link, folder in public.aliases.items():
        make_alias(root / link, root / folder)
    for job in jobs:
        number = f'{len(read_journal(job.record)[1])} {"pairs" if job.part.lq else "images"}'
        folders = ' and '.join(str(args.output / folder) for folder in job.folders)
        print(f'{job.name}: {"arranged" if job in todo else "already complete"}, {number} in {folders}')
    if public.lists:
        write_list(root, *public.lists)
    for folder in sorted({folder for job in jobs for folder in job.folders}) if args.lmdb else []:
        make_lmdb(root / folder)


def describe(name: str) -> str:
    """The --help text of a set."""
    public = SETS[name]
    lines = [f'{public.title}: {public.published}.', '']
    for split, part in public.parts.items():
        chosen = f', of which {part.subset} are used' if part.subset else ''
        lines.append(f'{split}: {" or ".join(map(str, part.counts))} pairs or clean images{chosen}')
        lines += [f'    from {layout}' for layout in part.layouts]
        lines += [f'    to   {folder}' for folder in (part.lq, part.gt) if folder]
    lines += [f'{link} becomes a link to {folder}' for link, folder in public.aliases.items()]
    return '\n'.join([*lines, '', *textwrap.wrap(public.facts, 100)])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sets = parser.add_subparsers(dest='set', required=True, metavar='set')
    for name, public in SETS.items():
        one = sets.add_parser(name, help=public.title, description=describe(name), formatter_class=raw)
        one.add_argument('download', type=Path, nargs='+', help='folder, zip or tar archive')
        one.add_argument('--output', type=Path, default=Path('datasets'), help='default: datasets')
        one.add_argument('--part', nargs='+', choices=public.parts, default=list(public.parts), help='default: all')
        one.add_argument('--copy', action='store_true', help='copy images from folders; default: link')
        one.add_argument('--lmdb', action='store_true', help='also create <folder>.lmdb')
        one.add_argument(
            '--any-count', action='store_true', help='accept a number of images that differs from the published one'
        )
        one.add_argument(
            '--skip-bad', action='store_true', help='skip broken images and images without partner, with a warning'
        )
        one.add_argument(
            '--layout', nargs='+', metavar='PATTERN', help="patterns of the GT and LQ images: 'GT/{key}' 'LQ/{key}'"
        )
        if any(part.subset for part in public.parts.values()):
            one.add_argument(
                '--subset', type=Path, help='text file with the stems (as in the result) of the pairs to use'
            )
        one.add_argument(
            '--workers', type=int, default=min(8, os.cpu_count() or 1), help='threads; default: %(default)s'
        )
    args = parser.parse_args(arguments)
    args.subset = read_subset(parser, args.subset) if getattr(args, 'subset', None) else None
    if (args.layout or args.subset) and len(args.part) > 1:
        parser.error(f'{args.set}: --layout and --subset apply to one part; add --part {" or ".join(args.part)}')
    if args.layout:
        check_layout(parser, args.layout, SETS[args.set].parts[args.part[0]])
    if args.workers < 1:
        parser.error(f'--workers must be at least 1, got {args.workers}')
    return args


def read_subset(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The stems in the file; ends the program if it cannot be read."""
    try:
        return file.read_text(encoding='utf-8').split()
    except OSError as error:
        parser.error(f'--subset: {file}: {error.strerror}')
    except UnicodeDecodeError:
        parser.error(f'--subset: {file}: not text in UTF-8')


def check_layout(parser: argparse.ArgumentParser, layout: list[str], part: Part) -> None:
    """End the program if the patterns are unusable for the part."""
    choices = {1, 2} if part.make == 'bicubic' else {2} if part.lq and not part.make else {1}
    if len(layout) not in choices:
        parser.error(f'--layout takes {" or ".join(map(str, sorted(choices)))} patterns here, GT before LQ')
    try:
        names = [set(compile_pattern(pattern).groupindex) for pattern in layout]
    except ValueError as error:
        parser.error(f'--layout: {error}')
    needed = set(re.findall(r'\{(\w+)\}', part.stem))
    if not needed <= names[-1]:
        parser.error(f'--layout: the last pattern must have {", ".join(sorted(needed))} in braces')
    if not names[0] <= names[-1]:
        parser.error('--layout: the LQ pattern must have all names of the GT pattern')


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        with exit_on_error('dpmambair_basicsr.prepare_data'):
            prepare(args)
    except KeyboardInterrupt:
        raise SystemExit('Interrupted; repeat the command to continue.') from None
    except OSError as error:
        raise SystemExit(
            f'{error.filename or ""}: {error.strerror or error}; repeat the command to continue'
        ) from error


if __name__ == '__main__':
    main()
