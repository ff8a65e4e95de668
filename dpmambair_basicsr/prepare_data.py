"""Arranges a public data set, as it was downloaded, in the folders that the option files expect. Downloads nothing.

    python -m dpmambair_basicsr.prepare_data gopro GOPRO_Large.zip
    python -m dpmambair_basicsr.prepare_data df2k DIV2K_train_HR.zip Flickr2K.tar --output /big/disk/datasets
    python -m dpmambair_basicsr.prepare_data snow100k --help    layout, count, and where both come from

Takes folders, zip and tar archives, several where a set comes in several, and never changes them. Every image used is
decoded. All problems (a number of images that is not the published one, images without partner, broken images) come in
one report, and then nothing is put in place. From a folder the results are links, or copies with --copy; from an
archive they are files. LQ images and tiles that have to be made are PNG files.

An interrupted run continues where it was when it is repeated. Until a part is complete it grows in hidden folders
beside its place (.GT.gopro.train); <output>/.prepared keeps its list of files, by which a repeated command knows that
it has nothing to do, and a changed one which files it may replace. Files of yours in a result folder are a problem to
report. docs/data.md has a table of all sets, dpmambair_basicsr/prepare/public_sets.py what is known of them.
"""

import argparse
import errno
import json
import os
import re
import shutil
import sys
import tarfile
import textwrap
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dpmambair_basicsr.files.images import EXTENSIONS, list_images, list_keys
from dpmambair_basicsr.prepare.public_sets import (
    SETS,
    Layout,
    Part,
    PublicSet,
    compile_pattern,
    find_names,
    pair,
    spaced,
)

# isort: split
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from basicsr.utils.matlab_functions import cubic

TILE, STEP = 480, 240  # BasicSR's extract_subimages
SCALES, SHORT_SIDE = (0.75, 0.5, 1 / 3), 400  # Real-ESRGAN's generate_multiscale_DF2K
UNREADABLE = (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path beside the target to write to, renamed to it at the end: there is never a half-written target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f'.{target.name}.part')
    temporary.unlink(missing_ok=True)
    yield temporary
    os.replace(temporary, target)


class Download:
    """A folder or an archive. `names` are its images, {path as patterns see it: name inside}, in an archive's order.

    Raises:
        SystemExit: no such folder or archive, or not one that can be read.
    """

    def __init__(self, path: Path):
        self.path, self.archive, self.sizes = path, None, {}
        try:
            if path.is_dir():
                found = (Path(folder, file) for folder, _, files in os.walk(path, followlinks=True) for file in files)
                names = [file.relative_to(path).as_posix() for file in found]
            elif zipfile.is_zipfile(path):
                self.archive = zipfile.ZipFile(path)
                names = self.sizes = {info.filename: info.file_size for info in self.archive.infolist()}
            elif path.is_file() and tarfile.is_tarfile(path):
                self.archive = tarfile.open(path)  # noqa: SIM115  (read from until the program ends)
                self.members = {info.name: info for info in self.archive if info.isfile()}
                names = self.sizes = {name: info.size for name, info in self.members.items()}
            elif path.exists():
                raise SystemExit(f'{path} is neither a folder nor a zip or tar archive (rar, 7z: unpack it first)')
            else:
                raise SystemExit(f'{path} does not exist')
        except UNREADABLE as error:
            raise SystemExit(f'{path} cannot be read: {error}') from error
        root = re.sub(r'(\.tar(\.\w+)?|\.tgz|\.zip)$', '', path.as_posix())
        self.names = {f'{root}/{name.removeprefix("./")}': name for name in names if is_image(name)}
        self.order = {name: position for position, name in enumerate(self.names.values())}

    def extract(self, name: str, target: Path) -> None:
        if is_file(target, self.sizes[name]):
            return
        zipped = isinstance(self.archive, zipfile.ZipFile)
        member = self.archive.open(name) if zipped else self.archive.extractfile(self.members[name])
        with member, whole(target) as temporary, temporary.open('wb') as file:
            shutil.copyfileobj(member, file)


def is_image(name: str) -> bool:
    """By its name; not hidden files, nor what macOS adds to archives."""
    parts = name.removeprefix('./').split('/')
    return name.lower().endswith(EXTENSIONS) and not any(part.startswith('.') or part == '__MACOSX' for part in parts)


def is_file(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def fetch(source: Path, target: Path, copy: bool) -> None:
    """Link or copy, unless it is there."""
    if copy:
        state = source.stat()
        if target.is_symlink() or not is_file(target, state.st_size) or target.stat().st_mtime_ns != state.st_mtime_ns:
            with whole(target) as temporary:
                shutil.copy2(source, temporary)
    elif not target.is_symlink() or os.readlink(target) != str(source):
        with whole(target) as temporary:
            os.symlink(source, temporary)


def read(path: Path) -> np.ndarray:
    """(h, w, 3) BGR, uint8 or uint16, decoded as our data sets do.

    Raises:
        OSError: cannot be read.
        ValueError: not an image, or cut short.
    """
    content = path.read_bytes()
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise ValueError('not an image that decodes')
    return image


def write(path: Path, image: np.ndarray) -> None:
    with whole(path) as temporary:
        temporary.write_bytes(cv2.imencode('.png', image)[1])


def shrink(image: np.ndarray) -> np.ndarray:
    """4 times smaller by bicubic, as MATLAB does it with 8 bits. Sides that are no multiples of 4 lose the rest first.

    It weights 16 pixels, those of a column first, and rounds in between. BasicSR's imresize does not round, and mirrors
    the border; here the border is repeated. That gives the published LQ images of Set5, Set14 and Urban100 bit for bit
    (tests/test_prepare_data.py).
    """
    weights = (cubic(torch.arange(-7.5, 8) / 4) / 4).numpy()  # multiples of 1 / 4096, so that float32 is exact
    image = image[: image.shape[0] // 4 * 4, : image.shape[1] // 4 * 4]
    for _ in range(2):
        padded = np.pad(image, ((6, 6), (0, 0), (0, 0)), mode='edge').astype(np.float32)
        total = sum(weight * padded[start : start + len(image) : 4] for start, weight in enumerate(weights))
        image = np.floor(total.clip(0, 255) + 0.5).astype(np.uint8).swapaxes(0, 1)
    return image


def scaled(image: np.ndarray) -> dict[str, np.ndarray]:
    """{ending of the name: image} at the original scale and Real-ESRGAN's others."""
    height, width = image.shape[:2]
    sizes = [(int(width * scale), int(height * scale)) for scale in SCALES]
    sizes.append(tuple(SHORT_SIDE * side // min(height, width) for side in (width, height)))
    picture = Image.fromarray(image)  # in BGR, which is all the same for resizing
    return {'': image} | {f'T{n}': np.asarray(picture.resize(size, Image.LANCZOS)) for n, size in enumerate(sizes)}


def tiles(image: np.ndarray, size: int, step: int) -> list[np.ndarray]:
    """`step` apart, the last at the borders. A side shorter than a tile stays whole."""
    tops, lefts = ([*range(0, side - size, step), max(side - size, 0)] for side in image.shape[:2])
    return [image[top : top + size, left : left + size] for top in tops for left in lefts]


def read_journal(file: Path) -> tuple[dict | None, list[dict]]:
    """The recipe and the entries of a part; (None, []) if there is no file. A line cut short ends it."""
    lines = []
    if file.is_file():
        for line in file.read_text(encoding='utf-8').splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return (lines[0], lines[1:]) if lines else (None, [])


def files_of(entries: list[dict]) -> dict[str, int]:
    """{file: size in bytes}"""
    return {file: size for entry in entries for file, size in entry['files'].items()}


class Job:
    """One part of a set on its way to its folders.

    Args:
        name: such as gopro.train.
        root: what the part's folders are relative to.
        recipe: what the results depend on. Those of another recipe are not continued.
        copy: copies of what is in folders, not links.
    """

    def __init__(self, name: str, part: Part, root: Path, recipe: dict, copy: bool):
        self.name, self.part, self.root, self.recipe, self.copy = name, part, root, recipe, copy
        self.record, self.journal = (root / '.prepared' / f'{name}.{kind}' for kind in ('done', 'journal'))
        self.folders = [folder for folder in (part.gt, part.lq) if folder]
        self.pairs: dict[str, list[tuple[Download, str] | None]] = {}  # {stem of the result: [LQ or None, GT]}

    def check_count(self) -> list[str]:
        if self.found in self.part.counts:
            return []
        published = ' or '.join(map(str, self.part.counts))
        return [f'{self.name}: found {self.found} pairs or clean images, published are {published} (see --any-count)']

    def is_complete(self) -> bool:
        recipe, entries = read_journal(self.record)
        return recipe == self.recipe and all(is_file(self.root / file, n) for file, n in files_of(entries).items())

    def plan(self, downloads: list[Download], layouts: tuple[Layout, ...], subset: list[str] | None) -> list[str]:
        """Finds the pairs; returns what has no partner.

        Raises:
            ValueError: no layout fits.
        """
        images = {path: (download, name) for download in downloads for path, name in download.names.items()}
        fitting = (layout for layout in layouts if all(find_names(pattern, images, []) for pattern in layout.patterns))
        layout = next(fitting, None)
        if layout is None:
            raise ValueError(f'{self.name}: no images as {" or ".join(map(str, layouts))}; --part chooses parts')
        problems = []
        found = pair(layout, self.part.stem, images, problems)
        self.found = len(found)
        if subset is not None:
            problems += [f'{name}, of the subset, is missing' for name in subset if name not in found]
        elif self.part.subset:
            subset = spaced(list(found), self.part.subset)
        chosen = found if subset is None else {stem: found[stem] for stem in subset if stem in found}
        self.pairs = {stem: [images.get(path) for path in paths] for stem, paths in chosen.items()}
        return [f'{self.name}: {problem}' for problem in problems]

    def hidden(self, file: str) -> Path:
        """Where a file, relative to the root, is until the part is complete."""
        path = self.root / file
        return path.parent.with_name(f'.{path.parent.name}.{self.name}') / path.name

    def brought(self, stem: str) -> list[str | Path | None]:
        """[LQ, GT] of a pair: the file of the result, or where the image is found from which the results are made."""
        places = []
        for image, folder in zip(self.pairs[stem], (self.part.lq, self.part.gt), strict=True):
            if image is None:
                places.append(None)
                continue
            download, name = image
            file = f'{stem}{Path(name).suffix.lower()}'
            if self.part.make != 'sub_images':
                places.append(f'{folder}/{file}')
            elif download.archive:
                places.append(self.hidden(f'{folder}/x').with_name('whole') / file)
            else:
                places.append(download.path / name)
        return places

    def stamps(self, stem: str) -> list[list[int] | None]:
        """What changes when an image does. Archives are part of the recipe."""
        paths = [image and image[0].path / image[1] for image in self.pairs[stem]]
        states = [path.stat() if path and path.is_file() else None for path in paths]
        return [state and [state.st_size, state.st_mtime_ns] for state in states]

    def is_made(self, entry: dict) -> bool:
        return (
            entry['stem'] in self.pairs
            and entry['stamps'] == self.stamps(entry['stem'])
            and all(is_file(self.hidden(file), n) or is_file(self.root / file, n) for file, n in entry['files'].items())
        )

    def run(self, workers: int) -> list[str]:
        """Makes the results, as hidden files; returns the problems, whose pairs are left out."""
        recipe, entries = read_journal(self.journal)
        if recipe != self.recipe:
            self.discard()
            entries = []
        entries = [entry for entry in entries if self.is_made(entry)]
        with whole(self.journal) as temporary:
            temporary.write_text(''.join(json.dumps(line) + '\n' for line in [self.recipe, *entries]), encoding='utf-8')
        made = {entry['stem'] for entry in entries}
        problems = self.bring([stem for stem in self.pairs if stem not in made])
        todo = [stem for stem in self.pairs if stem not in made and stem not in problems]
        with (
            ThreadPoolExecutor(workers) as pool,
            self.journal.open('a', encoding='utf-8') as journal,
            tqdm(desc=f'{self.name}: check', total=len(todo) + len(made), initial=len(made), unit='pair') as progress,
        ):
            for start in range(0, len(todo), 4 * workers):  # in batches: an interruption has little to wait for
                batch = todo[start : start + 4 * workers]
                for stem, result in zip(batch, pool.map(self.make, batch), strict=True):
                    if isinstance(result, dict):
                        journal.write(json.dumps(result) + '\n')
                    else:
                        problems[stem] = result
                    progress.update()
                journal.flush()
        for stem in problems:
            del self.pairs[stem]
        return [f'{self.name}: {problem}' for problem in problems.values()]

    def bring(self, stems: list[str]) -> dict[str, str]:
        """Links, copies or extracts what the pairs need, archives in their own order; returns {stem: problem}."""
        wanted = []
        for stem in stems:
            for image, place in zip(self.pairs[stem], self.brought(stem), strict=True):
                place = self.hidden(place) if isinstance(place, str) else place
                if image and place != image[0].path / image[1]:
                    wanted.append((str(image[0].path), image[0].order[image[1]], *image, place, stem))
        problems = {}
        for *_, download, name, place, stem in tqdm(
            sorted(wanted, key=lambda item: item[:2]), desc=f'{self.name}: bring', unit='image'
        ):
            try:
                if download.archive:
                    download.extract(name, place)
                else:
                    fetch(download.path / name, place, self.copy)
            except UNREADABLE as error:
                if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
                    raise SystemExit(f'{place}: {error.strerror}; repeat the command to go on') from error
                problems[stem] = f'{download.path / name}: {error}'
        return problems

    def make(self, stem: str) -> dict | str:
        """Checks a pair and makes what has to be made: an entry of the journal, or the problem."""
        images, problems, files = [], [], []
        for image, place in zip(self.pairs[stem], self.brought(stem), strict=True):
            try:
                images.append(place and read(self.hidden(place) if isinstance(place, str) else place))
            except (OSError, ValueError) as error:
                problems.append(f'{image[0].path / image[1]}: {error}')
            files += [place] if isinstance(place, str) else []
        if problems:
            return '; '.join(problems)
        lq, gt = images
        scale = self.part.scale
        sources = [image and image[0].path / image[1] for image in self.pairs[stem]]
        if lq is not None and not all(0 <= gt.shape[axis] - scale * lq.shape[axis] < scale for axis in (0, 1)):
            sizes = [
                f'{path} is {image.shape[1]}x{image.shape[0]}' for path, image in zip(sources, images, strict=True)
            ]
            return f'sizes do not fit at scale {scale}: {", ".join(sizes)} (width x height)'
        if self.part.make and gt.dtype != np.uint8:
            return f'{sources[1]}: has 16 bits for each colour, not 8'
        for file, image in self.results(stem, lq, gt):
            write(self.hidden(file), image)
            files.append(file)
        return {
            'stem': stem,
            'stamps': self.stamps(stem),
            'files': {file: self.hidden(file).stat().st_size for file in files},
        }

    def results(self, stem: str, lq: np.ndarray | None, gt: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(file, image) of what is not in the download."""
        part = self.part
        if part.make == 'bicubic' and lq is None:
            yield f'{part.lq}/{stem}.png', shrink(gt)
        elif part.make == 'sub_images':
            for ending, image in (scaled(gt) if part.lq else {'': gt}).items():
                image = image[: image.shape[0] // part.scale * part.scale, : image.shape[1] // part.scale * part.scale]
                cut = {part.gt: tiles(image, TILE, STEP)}
                if part.lq:
                    cut[part.lq] = tiles(shrink(image), TILE // 4, STEP // 4)
                for folder, parts in cut.items():
                    yield from ((f'{folder}/{stem}{ending}_s{n:03}.png', tile) for n, tile in enumerate(parts, 1))

    def finish(self) -> None:
        """Puts the results in place, and away those of an earlier recipe that are no more."""
        files, old = (files_of(read_journal(file)[1]) for file in (self.journal, self.record))
        for file in files:
            if os.path.lexists(self.hidden(file)):  # else it was put in place by an interrupted run
                (self.root / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.hidden(file), self.root / file)
        for file in old.keys() - files.keys():
            (self.root / file).unlink(missing_ok=True)
        os.replace(self.journal, self.record)
        self.remove_hidden()

    def discard(self) -> None:
        """Forgets an unfinished run, and what it had put in place."""
        files, old = (files_of(read_journal(file)[1]) for file in (self.journal, self.record))
        for file in files.keys() - old.keys():
            if not os.path.lexists(self.hidden(file)):
                (self.root / file).unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)
        self.remove_hidden()

    def remove_hidden(self) -> None:
        for folder in self.folders:
            shutil.rmtree(self.hidden(f'{folder}/x').parent, ignore_errors=True)


def find_obstacles(jobs: list[Job], public: PublicSet, root: Path, paths: list[Path]) -> list[str]:
    """What would be mixed up or overwritten."""
    records = [file for kind in ('done', 'journal') for file in (root / '.prepared').glob(f'*.{kind}')]
    ours = {file for record in records for file in files_of(read_journal(record)[1])}
    problems = []
    for folder in sorted({folder for job in jobs for folder in job.folders}):
        for path in paths:
            if path.is_dir() and (root / folder).resolve().is_relative_to(path.resolve()):
                problems.append(f'the results, {root / folder}, would be inside the download {path}: move it elsewhere')
        if (root / folder).is_dir():
            found = {f'{folder}/{path.name}' for path in (root / folder).iterdir() if is_image(path.name)}
            problems += [
                f'{root / file} is in the way: it was not made by this command' for file in sorted(found - ours)
            ]
    for link, folder in public.aliases.items():
        if os.path.lexists(root / link) and os.path.realpath(root / link) != os.path.realpath(root / folder):
            problems.append(f'{root / link} is in the way: it should be a link to {folder}')
    return problems


def make_alias(link: Path, folder: Path) -> None:
    """A relative link, so that the results can be moved as a whole."""
    if not os.path.lexists(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(os.path.relpath(folder.resolve(), link.parent.resolve()), link, target_is_directory=True)


def write_list(root: Path, file: str, folders: tuple[str, ...]) -> None:
    """Paths below the file's folder, one in a line, as BasicSR's RealESRGANDataset reads them."""
    there = [folder for folder in folders if (root / folder).is_dir()]
    base = (root / file).parent
    images = [Path(path) for folder in there for path in list_images(str(root / folder)).values()]
    with whole(root / file) as temporary:
        temporary.write_text(''.join(f'{image.relative_to(base)}\n' for image in images), encoding='utf-8')
    missing = ''.join(f'; {folder} is still missing' for folder in folders if folder not in there)
    print(f'{root / file}: {len(images)} images of {", ".join(there)}{missing}')


def make_lmdb(folder: Path) -> None:
    """<folder>.lmdb, by BasicSR, unless it is there and no image is newer. Images are stored as PNG."""
    images = {stem: Path(path) for stem, path in list_images(str(folder)).items()}
    target, temporary = folder.with_name(f'{folder.name}.lmdb'), folder.with_name(f'.{folder.name}.part.lmdb')
    same = (target / 'meta_info.txt').is_file() and sorted(list_keys(str(target))) == sorted(images)
    if same and (target / 'data.mdb').stat().st_mtime >= max(image.lstat().st_ctime for image in images.values()):
        print(f'{target} is complete.')
        return
    shutil.rmtree(temporary, ignore_errors=True)
    pixels = 0
    for image in images.values():
        with Image.open(image) as header:
            pixels += header.width * header.height
    room = 2**24 + 8 * pixels + 2**14 * len(images)  # above what 3 channels of 16 bits can take, and pages
    names = [image.name for image in images.values()]
    make_lmdb_from_imgs(str(folder), str(temporary), names, list(images), map_size=room)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def report(public: PublicSet, problems: list[str]) -> str:
    plural = '' if len(problems) == 1 else 's'
    return '\n  '.join([f'{public.title}: {len(problems)} problem{plural}:', *problems])


def arrange(jobs: list[Job], public: PublicSet, root: Path, paths: list[Path], args: argparse.Namespace) -> None:
    """All parts, or none.

    Raises:
        SystemExit: with all problems.
    """
    if obstacles := find_obstacles(jobs, public, root, paths):
        raise SystemExit(report(public, obstacles))
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
        problems += [f'{job.name}: nothing is left' for job in jobs if not job.pairs]
        if bad:
            print(f'{report(public, bad)}\nThese images are left out.', file=sys.stderr)
    else:
        problems += bad
    if problems:
        raise SystemExit(
            f'{report(public, problems)}\nNothing was put in place. What is fine is kept for the next run.'
        )
    for job in jobs:
        job.finish()


def prepare(args: argparse.Namespace) -> None:
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
    """What --help says of a set."""
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
        one.add_argument('--copy', action='store_true', help='copy what is in folders; default: link')
        one.add_argument('--lmdb', action='store_true', help='make <folder>.lmdb as well')
        one.add_argument('--any-count', action='store_true', help='accept another number of images than was published')
        one.add_argument(
            '--skip-bad', action='store_true', help='leave out, with a warning, images without partner or broken'
        )
        one.add_argument(
            '--layout', nargs='+', metavar='PATTERN', help="where the images are, GT and LQ: 'GT/{key}' 'LQ/{key}'"
        )
        if any(part.subset for part in public.parts.values()):
            one.add_argument('--subset', type=Path, help='text file of the stems, in the result, of the pairs to use')
        one.add_argument(
            '--workers', type=int, default=min(8, os.cpu_count() or 1), help='threads; default: %(default)s'
        )
    args = parser.parse_args(arguments)
    args.subset = args.subset.read_text(encoding='utf-8').split() if getattr(args, 'subset', None) else None
    if (args.layout or args.subset) and len(args.part) > 1:
        parser.error(f'{args.set}: --layout and --subset are for one part: add --part {" or ".join(args.part)}')
    if args.layout:
        check_layout(parser, args.layout, SETS[args.set].parts[args.part[0]])
    if args.workers < 1:
        parser.error(f'--workers must be at least 1, got {args.workers}')
    return args


def check_layout(parser: argparse.ArgumentParser, layout: list[str], part: Part) -> None:
    """Ends the program if the patterns cannot be used for the part."""
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
        prepare(args)
    except KeyboardInterrupt:
        raise SystemExit('Interrupted; repeat the command to go on.') from None


if __name__ == '__main__':
    main()
