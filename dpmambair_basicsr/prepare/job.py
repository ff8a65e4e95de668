"""Arranges one part of a public dataset in its folders, and continues after an interruption."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dpmambair_basicsr.files.errors import InputError
from dpmambair_basicsr.prepare.download import UNREADABLE, Download, fetch, is_file, whole
from dpmambair_basicsr.prepare.images import STEP, TILE, read, scaled, shrink, tiles, write
from dpmambair_basicsr.prepare.public_sets import (
    Layout,
    Part,
    find_names,
    pair,
    spaced,
)


def read_journal(file: Path) -> tuple[dict | None, list[dict]]:
    """Recipe and entries of a part; (None, []) if there is no file. Reading ends at a truncated line."""
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
    """The arrangement of one part of a dataset.

    Args:
        name: such as gopro.train.
        root: base of the part's folders.
        recipe: everything that the results depend on. Results of another recipe are not resumed.
        copy: copy files from folders instead of linking them.
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
        return [f'{self.name}: found {self.found} pairs or clean images, published: {published} (see --any-count)']

    def is_complete(self) -> bool:
        recipe, entries = read_journal(self.record)
        return recipe == self.recipe and all(is_file(self.root / file, n) for file, n in files_of(entries).items())

    def plan(self, downloads: list[Download], layouts: tuple[Layout, ...], subset: list[str] | None) -> list[str]:
        """Find the pairs; return problems, such as images without partner.

        Raises:
            ValueError: no layout matches.
        """
        images = {path: (download, name) for download in downloads for path, name in download.names.items()}
        fitting = (layout for layout in layouts if all(find_names(pattern, images, []) for pattern in layout.patterns))
        layout = next(fitting, None)
        if layout is None:
            raise ValueError(f'{self.name}: no images match {" or ".join(map(str, layouts))}; see --part')
        problems = []
        found = pair(layout, self.part.stem, images, problems)
        self.found = len(found)
        if subset is not None:
            problems += [f'{name} is in the subset but missing' for name in subset if name not in found]
        elif self.part.subset:
            subset = spaced(list(found), self.part.subset)
        chosen = found if subset is None else {stem: found[stem] for stem in subset if stem in found}
        self.pairs = {
            stem: [None if path is None else images.get(path) for path in paths] for stem, paths in chosen.items()
        }
        return [f'{self.name}: {problem}' for problem in problems]

    def hidden(self, file: str) -> Path:
        """Temporary path of a file, given relative to the root, until the part is complete."""
        path = self.root / file
        return path.parent.with_name(f'.{path.parent.name}.{self.name}') / path.name

    def brought(self, stem: str) -> list[str | Path | None]:
        """[LQ, GT] of a pair: the file of the result, or the source image from which results are generated."""
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
        """File stamps, which change with the images. Archives are part of the recipe."""
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
        """Creates the results as hidden files; returns the problems, whose pairs are skipped."""
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
            for start in range(0, len(todo), 4 * workers):  # in batches, so that an interruption does not wait long
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
        """Links, copies or extracts the files of the pairs, archives in their own order; returns {stem: problem}."""
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
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise InputError(f'{place}: {error.strerror}; repeat the command to continue') from error
                problems[stem] = f'{download.path / name}: {error}'
        return problems

    def make(self, stem: str) -> dict | str:
        """Checks a pair and generates missing images; returns a journal entry, or the problem."""
        images, problems, files = [], [], []
        for image, place in zip(self.pairs[stem], self.brought(stem), strict=True):
            try:
                images.append(place and read(self.hidden(place) if isinstance(place, str) else place))
            except (OSError, ValueError) as error:
                assert image is not None, 'only images of the download are read'
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
            return f'sizes do not match at scale {scale}: {", ".join(sizes)} (width x height)'
        if self.part.make and gt.dtype != np.uint8:
            return f'{sources[1]}: has 16 bits per channel, expected 8'
        for file, image in self.results(stem, lq, gt):
            write(self.hidden(file), image)
            files.append(file)
        return {
            'stem': stem,
            'stamps': self.stamps(stem),
            'files': {file: self.hidden(file).stat().st_size for file in files},
        }

    def results(self, stem: str, lq: np.ndarray | None, gt: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(file, image) for images that are not in the download."""
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
        """Put the results in place, and remove obsolete ones of an earlier recipe."""
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
        """Discards an unfinished run, including what it had put in place."""
        files, old = (files_of(read_journal(file)[1]) for file in (self.journal, self.record))
        for file in files.keys() - old.keys():
            if not os.path.lexists(self.hidden(file)):
                (self.root / file).unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)
        self.remove_hidden()

    def remove_hidden(self) -> None:
        for folder in self.folders:
            shutil.rmtree(self.hidden(f'{folder}/x').parent, ignore_errors=True)
