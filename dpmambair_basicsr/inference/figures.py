"""Figures of DPMambaIR: `python -m dpmambair_basicsr figures frequency -w net_g_latest.pth -d test/ -o gap.png`.

frequency  where in the spectrum restored images differ from the clean ones (v1, Fig. 5)
delta      step sizes of the scans, by block and degradation (v3, Fig. 5)
extractor  reconstruction PSNR and classification accuracy of stage 1 (v3, Table VII)
alpha      how much each block's HEB amplifies high frequencies

Each writes the drawing, a .png, and its numbers, a .csv beside it. Several networks are drawn in one figure.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from dpmambair_basicsr.archs import DegradationAutoencoder
from dpmambair_basicsr.files.checkpoints import read_checkpoint, select_weights
from dpmambair_basicsr.files.errors import InputError, exit_on_error
from dpmambair_basicsr.files.image_folders import list_images, pair_images
from dpmambair_basicsr.files.images import to_float
from dpmambair_basicsr.files.pictures import read_picture
from dpmambair_basicsr.inference.embedder import center_crop
from dpmambair_basicsr.inference.extractor_quality import Pairs, accuracies, reconstruct
from dpmambair_basicsr.inference.figure_files import Figure, check_figure, write_figure
from dpmambair_basicsr.inference.frequency_gap import RINGS, amplitudes, frequency_gap
from dpmambair_basicsr.inference.restorer import choose_device, load, load_network
from dpmambair_basicsr.inference.step_sizes import recorded_step_sizes

ALPHA = '.high_frequency.alpha'
ALL = 'all'  # the mean over degradations, with equal weights


def main() -> None:
    arguments = parse_arguments()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # its warnings name no file
    with exit_on_error('dpmambair_basicsr.figures', ValueError, OSError):
        check_figure(arguments.output)
        networks = named_files(arguments.weights)
        write_figure(arguments.output, FIGURES[arguments.figure](networks, arguments))
    print(f'{arguments.output}, {arguments.output.with_suffix(".csv")}')


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m dpmambair_basicsr figures',
        description=__doc__.partition('\n\n')[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('figure', choices=FIGURES)
    weights = 'checkpoint, or NAME=checkpoint; repeatable; default name: the folder of the run, or the file'
    add('-w', '--weights', nargs='+', required=True, metavar='FILE', help=weights)
    data = 'folder with LQ and GT, or with one such sub-folder per degradation, such as datasets/all_in_one/test'
    add('-d', '--data', type=Path, metavar='FOLDER', help=data)
    add('-o', '--output', type=Path, required=True, metavar='FILE.png', help='the drawing; the table is FILE.csv')
    add('--crop', type=int, metavar='N', help='use only the N x N center crop of each image, which is faster')
    add('--count', type=int, metavar='N', help='use only the first N images of each degradation')
    add('--device', default='auto', help='auto, cpu, mps, cuda or cuda:<n>; default: %(default)s')
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.figure == 'alpha'):
        parser.error('-d: required by all figures except alpha, which takes none')
    for name in ('crop', 'count'):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f'--{name}: must be 1 or more')
    return arguments


def named_files(entries: list[str]) -> dict[str, str]:
    """{name: checkpoint}. Raises InputError for duplicate names."""
    files = {}
    for entry in entries:
        name, _, file = ('', '', entry) if Path(entry).is_file() else entry.rpartition('=')
        path = Path(file)
        name = name or (path.parents[1].name if path.parent.name == 'models' and len(path.parents) > 2 else path.stem)
        if name in files:
            raise InputError(f'two networks are called {name}; write NAME={files[name]} NAME={file}')
        files[name] = file
    return files


def pairs_of(folder: Path, count: int | None) -> Pairs:
    """{degradation: its pairs of files}; '' for a folder without sub-folders.

    Raises:
        ValueError, OSError: naming the folder or the file.
    """
    folders = {'': folder} if (folder / 'LQ').is_dir() else {path.name: path for path in sorted(folder.iterdir())}
    folders = {name: path for name, path in folders.items() if (path / 'LQ').is_dir()}
    if not folders:
        raise InputError(f'{folder}: neither it nor any of its sub-folders contains a folder LQ')
    found = {}
    for name, path in folders.items():
        items = pair_images(list_images(str(path / 'LQ')), list_images(str(path / 'GT')))
        found[name] = [(Path(item['lq_path']), Path(item['gt_path'])) for item in items[:count]]
    return found


def read_pairs(arguments: argparse.Namespace, network: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield degradation, degraded and clean image, (H, W, 3) RGB each."""
    pairs = [(kind, *files) for kind, found in pairs_of(arguments.data, arguments.count).items() for files in found]
    for kind, *files in tqdm(pairs, desc=network, unit='image', disable=None):
        images = []
        for file in files:
            try:
                images.append(center_crop(read_picture(file).image, arguments.crop))
            except ValueError as error:
                raise InputError(f'{file}: {error}') from None
        if images[0].shape != images[1].shape:
            raise InputError(f'{files[0]} and {files[1]} differ in size, {images[0].shape} and {images[1].shape}')
        yield kind, *images


def frequency(networks: dict[str, str], arguments: argparse.Namespace) -> Figure:
    found = defaultdict(list)  # (network, degradation) -> amplitudes of each image
    for position, (name, file) in enumerate(networks.items()):
        restorer = load(file, device=arguments.device)
        for kind, degraded, clean in read_pairs(arguments, name):
            images = {name: restorer.restore(degraded)} | ({'degraded image': degraded} if position == 0 else {})
            for label, image in images.items():
                found[label, kind].append(amplitudes(to_float(clean), to_float(image)))
    gaps = {key: frequency_gap(images) for key, images in found.items()}
    counts = {key: len(images) for key, images in found.items()}
    for label in dict.fromkeys(label for label, _ in found):
        own = [key for key in found if key[0] == label]
        gaps[label, ALL] = np.mean([gaps[key] for key in own], axis=0)
        counts[label, ALL] = sum(counts[key] for key in own)
    rows = [
        {
            'network': label,
            'degradation': kind,
            'images': counts[label, kind],
            'cycles per pixel': (ring + 0.5) / (2 * RINGS),
            'missing amplitude (dB)': gap,
            'relative difference': difference,
        }
        for (label, kind), values in gaps.items()
        for ring, (gap, difference) in enumerate(values.T)
    ]
    lines = group((row['network'], row) for row in rows if row['degradation'] == ALL)
    title = 'Spectra of restored and clean images'
    return Figure(rows, lines, 'cycles per pixel', ['missing amplitude (dB)', 'relative difference'], title)


def delta(networks: dict[str, str], arguments: argparse.Namespace) -> Figure:
    sizes = defaultdict(list)  # (network, degradation, block) -> of each image
    for name, file in networks.items():
        restorer = load(file, device=arguments.device)
        with recorded_step_sizes(restorer.net) as found:
            if not found:
                raise InputError(f'{file}: contains a {type(restorer.net).__name__}, which has no DPSS modules')
            for kind, degraded, _ in read_pairs(arguments, name):
                restorer.restore(degraded, tile=0)
                for block, values in found.items():
                    sizes[name, kind, block] += [values.pop().item()]
    rows = [
        {'network': name, 'degradation': kind, 'block': block, 'images': len(values), 'mean Δ': np.mean(values)}
        for (name, kind, block), values in sizes.items()
    ]
    over_kinds = group(((row['network'], row['block']), row['mean Δ']) for row in rows)
    for row in rows:
        row['Δ / mean'] = row['mean Δ'] / np.mean(over_kinds[row['network'], row['block']])
    several = len(networks) > 1
    lines = group((f'{row["network"]}, {row["degradation"]}' if several else row['degradation'], row) for row in rows)
    title = 'Step size Δ of the scans: mean over pixels and channels; relative to the mean over degradations'
    return Figure(rows, lines, 'block', ['mean Δ', 'Δ / mean'], title)


def extractor(networks: dict[str, str], arguments: argparse.Namespace) -> Figure:
    rows = []
    for name, file in networks.items():
        net = load_network(file)
        if not isinstance(net, DegradationAutoencoder):
            raise InputError(f'{file}: contains a {type(net).__name__}; reconstruction needs a checkpoint of stage 1')
        net = net.to(choose_device(arguments.device)).eval()
        psnrs, embeddings = defaultdict(list), defaultdict(list)
        for kind, degraded, clean in read_pairs(arguments, name):
            psnr, embedding = reconstruct(net, degraded, clean)
            psnrs[kind].append(psnr)
            embeddings[kind].append(embedding)
        right = accuracies(embeddings)
        own = [(kind, len(values), np.mean(values), right[kind]) for kind, values in psnrs.items()]
        own.append((ALL, sum(count for _, count, _, _ in own), *np.mean([part[2:] for part in own], axis=0)))
        rows += [
            {'network': name, 'embedding': embedding.shape[1], 'degradation': kind, 'images': count}
            | {'reconstruction PSNR (dB)': psnr, 'classification accuracy': accuracy}
            for kind, count, psnr, accuracy in own
        ]
    lines = group((row['network'], row) for row in rows)
    title = 'Degradation extractor: reconstruction by stage 1, nearest-mean classification'
    return Figure(rows, lines, 'degradation', ['reconstruction PSNR (dB)', 'classification accuracy'], title)


def alpha(networks: dict[str, str], _: argparse.Namespace) -> Figure:
    rows = []
    for name, file in networks.items():
        state_dict = select_weights(file, read_checkpoint(file), 'params_ema', 'params', None)
        found = {key.removesuffix(ALPHA): value.item() for key, value in state_dict.items() if key.endswith(ALPHA)}
        if not found:
            raise InputError(f'{file}: contains no high-frequency enhancement block')
        rows += [{'network': name, 'block': block, 'alpha': value} for block, value in found.items()]
    lines = group((row['network'], row) for row in rows)
    return Figure(rows, lines, 'block', ['alpha'], 'HEB: F + alpha (F - mean of F)')


def group(pairs: Iterable[tuple]) -> dict:
    """{key: [values]}"""
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


FIGURES = {figure.__name__: figure for figure in (frequency, delta, extractor, alpha)}

if __name__ == '__main__':
    main()
