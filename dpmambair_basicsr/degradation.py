"""What the degradation extractor sees: `python -m dpmambair_basicsr.degradation -w net_g_5.pth x.png --clean photos/`.

Prints the most likely classes of each image with their scores; --output map.png draws a map of the embeddings.
A checkpoint does not define the classes. With --reference, each sub-folder is a class: images of one degradation. With
--clean, the classes are the synthetic degradations, at their default parameters, of the clean images given.
Unreadable images are reported and skipped, and the exit status is then 1. See `Classes` for the scores.
"""

import argparse
import sys
from pathlib import Path

import cv2
import torch
from torch import Tensor

from dpmambair_basicsr.files.errors import InputError, exit_on_error, print_any_name
from dpmambair_basicsr.files.picture_jobs import list_pictures, nothing_found
from dpmambair_basicsr.inference.degradation_classes import Classes, most_likely
from dpmambair_basicsr.inference.embedder import Embedder, load_extractor, sub_folders
from dpmambair_basicsr.inference.embedding_map import check_map, draw_map
from dpmambair_basicsr.inference.restorer import choose_device


def main() -> int:
    """Return the exit status: 0, 1 if a picture failed; 1 or 2 for wrong arguments."""
    arguments = parse_arguments()
    print_any_name()
    try:
        with exit_on_error('', ValueError, OSError):
            pictures, embedder, classes = prepare(arguments)
        with exit_on_error():
            return show(arguments, pictures, embedder, classes)
    except KeyboardInterrupt:
        print('stopped by Ctrl-C', file=sys.stderr)
        return 130


def prepare(arguments: argparse.Namespace) -> tuple[dict[Path, str], Embedder, Classes]:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # its warnings name no file
    if arguments.output is not None:
        check_map(arguments.output, arguments.map)
    pictures = find_pictures([*arguments.inputs, *arguments.input])
    embedder = Embedder(load_extractor(arguments.weights), choose_device(arguments.device), arguments.crop)
    if arguments.reference is None:
        classes = embedder.classes_of_degradations(arguments.clean)
    else:
        classes = embedder.classes_of_folders(arguments.reference)
    return pictures, embedder, classes


def show(arguments: argparse.Namespace, pictures: dict[Path, str], embedder: Embedder, classes: Classes) -> int:
    print(classes.summary())
    found = embedder.embed(list(pictures), 'pictures')
    if found:
        embeddings = torch.cat(list(found.values()))
        kinds = [pictures[path] for path in found]
        print('\n'.join(['', *table(list(found), kinds, classes, embeddings)]))
        if arguments.output is not None:
            draw_map(arguments.output, arguments.map, classes, embeddings, kinds)
            print(f'\nmap: {arguments.output}')
    if embedder.failed:
        print(f'\nfailed pictures: {embedder.failed}', file=sys.stderr)
    return 1 if embedder.failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m dpmambair_basicsr.degradation',
        description=(__doc__ or '').partition('\n\n')[2].partition(' See ')[0],
    )
    add = parser.add_argument
    inputs = 'image, pattern, or folder: its images and those of its sub-folders, whose names are their kinds'
    add('inputs', nargs='*', metavar='INPUT', help=inputs)
    add('-i', '--input', nargs='+', default=[], metavar='INPUT', help='same as INPUT')
    add('-w', '--weights', required=True, metavar='FILE', help='checkpoint of stage 1, or of a DPMambaIR')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--reference', type=Path, metavar='FOLDER', help='one sub-folder of images per class')
    source.add_argument(
        '--clean', type=Path, metavar='FOLDER', help='clean images, to be degraded with every synthetic degradation'
    )
    add('-o', '--output', type=Path, metavar='FILE.png', help='map of the embeddings; needs matplotlib')
    add('--map', choices=('pca', 'tsne'), default='pca', help='projection of the map; tsne needs scikit-learn')
    add('--crop', type=int, metavar='N', help='use only the N x N center crop of each image, which is faster')
    add('--device', default='auto', help='auto, cpu, mps, cuda or cuda:<n>; default: %(default)s')
    arguments = parser.parse_args()
    if not arguments.inputs and not arguments.input:
        parser.error('no INPUT')
    if arguments.crop is not None and arguments.crop < 1:
        parser.error('--crop: must be 1 or more')
    return arguments


def find_pictures(inputs: list[str]) -> dict[Path, str]:
    """{picture: kind}, the name of its sub-folder or ''. Raises InputError for an input without pictures."""
    kinds = {}
    for argument in inputs:
        found = dict.fromkeys(list_pictures(argument), '')
        if Path(argument).is_dir():
            found |= {path: name for name, paths in sub_folders(Path(argument)).items() for path in paths}
        if not found:
            raise InputError(nothing_found(argument))
        kinds |= found
    return kinds


def table(paths: list[Path], kinds: list[str], classes: Classes, embeddings: Tensor) -> list[str]:
    """One line per picture: the three most likely classes, each with its score, and the distance to the first."""
    distances = classes.distances(embeddings)
    scores = classes.scores(distances)
    shown = min(3, len(classes.names))
    rows = [('picture', 'kind', *('class', 'second', 'third')[:shown], 'distance')]
    for path, kind, row, away in zip(paths, kinds, scores, distances, strict=True):
        best = row.argsort(descending=True)[:shown].tolist()
        rows.append((str(path), kind, *(f'{classes.names[k]} {row[k]:.2f}' for k in best), f'{away[best[0]]:.1f}'))
    if not any(kinds):
        rows = [(path, *rest) for path, _, *rest in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    pairs = zip(kinds, most_likely(classes, embeddings), strict=True)
    right = [kind == found for kind, found in pairs if kind in classes.names]
    if right:
        lines += ['', f'{sum(right)} of {len(right)} are assigned to the class that their folder is named after']
    return lines


if __name__ == '__main__':
    sys.exit(main())
