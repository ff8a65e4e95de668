"""Fit a degradation classifier, as used by `dpmambair restore`, to photographs, and add it to trained weights.

    python scripts/fit_classifier.py net_g_latest.pth PHOTOS -o net_g.safetensors [--check OTHER_PHOTOS]

Each photograph is degraded in every way of `versions`. OTHER_PHOTOS, which must be unseen, are degraded in the same way
and classified, and the accuracies are printed. Then some photographs are restored with the mean embedding of their
class and with their own: classes that lose nothing by the former are steered by it.
"""

import argparse
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpmambair_basicsr import load
from dpmambair_basicsr.archs.recognition import network_options, own_names
from dpmambair_basicsr.data.degradations import degrade, to_uint8
from dpmambair_basicsr.files.checkpoints import WRAPPINGS, read_checkpoint, select_weights, write_safetensors
from dpmambair_basicsr.files.images import to_float
from dpmambair_basicsr.files.picture_jobs import list_pictures
from dpmambair_basicsr.files.pictures import read_picture
from dpmambair_basicsr.inference.degradation_classifier import DegradationClassifier
from dpmambair_basicsr.inference.image_statistics import image_statistics
from dpmambair_basicsr.inference.restorer import Restorer

LARGEST, EMBEDDED = 320, 192  # pixels: center crops for statistics and for the embedding
EVERY = 4  # every fourth photograph is embedded
RESTORED = 8  # photographs
LOSS = 0.25  # dB of PSNR that are negligible
KINDS = {
    'haze': {'beta': (0.4, 1.8), 'airlight': (0.7, 1.0)},
    'rain': {'strength': (0.2, 0.8)},
    'snow': {'strength': (0.4, 1.0)},
    'lowlight': {'illumination': (0.08, 0.4), 'sigma': (0, 4)},
    'blur': {'length': (4, 19)},
    'noise': {'sigma': (8, 55)},
    'jpeg': {'quality': (8, 45)},
}
SLIGHT_NOISE = {'shot': (0, 0.0008), 'read': (0, 0.002), 'grain': (0, 1.2), 'quality': (88, 98)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    parser.add_argument('weights', help='checkpoint of a DPMambaIR')
    parser.add_argument('photos', help='folder of clean photographs')
    parser.add_argument('-o', '--output', required=True, help='.safetensors: the weights with the classifier')
    parser.add_argument('--check', metavar='FOLDER', help='other clean photographs')
    arguments = parser.parse_args()
    restorer = load(arguments.weights)
    restorer.classifier = DegradationClassifier.fit(*measure(restorer, arguments.photos))
    if arguments.check:
        print(report(restorer.classifier, measure(restorer, arguments.check)[0]))
    steered = choose_steered(restorer, arguments.check or arguments.photos)
    restorer.classifier = replace(restorer.classifier, steered=tuple(steered))
    checkpoint = read_checkpoint(arguments.weights)
    weights = own_names(select_weights(arguments.weights, checkpoint, *WRAPPINGS))
    options = checkpoint.get('network_g') or network_options(weights)
    write_safetensors(arguments.output, weights, options, restorer.classifier.to_plain())
    print(f'{arguments.output}: {", ".join(restorer.classifier.names)}; steered: {", ".join(steered)}')


def measure(restorer: Restorer, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """{class: statistics (N, S)} and {class: embeddings (M, E)} of the degraded photographs of a folder."""
    statistics, embeddings = {}, {}
    for index, path in enumerate(tqdm(list_pictures(folder), desc=folder, unit='photograph', disable=None)):
        for kind, image, _ in degraded(path):
            statistics.setdefault(kind, []).append(torch.from_numpy(image_statistics(to_float(crop(image, LARGEST)))))
            if index % EVERY == 0:
                embeddings.setdefault(kind, []).append(restorer.embedding_of(crop(image, EMBEDDED)))
    stacked = {kind: torch.stack(parts) for kind, parts in statistics.items()}
    return stacked, {kind: torch.cat(parts) for kind, parts in embeddings.items()}


def choose_steered(restorer: Restorer, folder: str) -> list[str]:
    """The classes that lose at most `LOSS` on average if their mean embedding steers the network."""
    losses = {}
    for path in tqdm(list_pictures(folder)[:RESTORED], desc='steering', unit='photograph', disable=None):
        for kind, image, clean in degraded(path):
            image, clean = crop(image, EMBEDDED), crop(clean, EMBEDDED)
            own, by_kind = (
                mean_squared_error(restorer.restore(image, embedding=embedding), clean)
                for embedding in (restorer.embedding_of(image), restorer.classifier.embedding_of(kind))
            )
            losses.setdefault(kind, []).append(10 * np.log10(by_kind / own))
    print(', '.join(f'{kind} {-np.mean(loss):+.2f} dB' for kind, loss in losses.items()), 'by the mean embedding')
    return [kind for kind, loss in losses.items() if np.mean(loss) <= LOSS]


def mean_squared_error(a: np.ndarray, b: np.ndarray) -> float:
    return max(np.square(a.astype(np.float32) - b).mean(), 1)  # at most 48 dB: differences beyond are irrelevant


def degraded(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(class, image, target), uint8."""
    rng = np.random.default_rng([zlib.crc32(path.name.encode()), 0])
    for kind, image, clean in versions(some_size(to_float(read_picture(path).image), rng), rng):
        yield kind, to_uint8(image), to_uint8(clean)


def versions(photo: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(class, image, target): clean or nearly clean, darker and lighter, and degraded by each of `KINDS`."""
    yield 'clean', photo, photo
    for low, high in ((0.7, 2.2), (1.8, 3.2)):
        exposed = photo ** gamma(rng, low, high)
        yield 'clean', exposed, exposed
        exposed = photo ** gamma(rng, low, high)
        yield 'clean', degrade(exposed, 'camera_noise', rng, **SLIGHT_NOISE), exposed
    yield 'clean', degrade(photo, 'jpeg', rng, quality=(85, 98)), photo
    for kind, parameters in KINDS.items():
        exposed = photo ** (1 if kind in ('haze', 'lowlight') else gamma(rng, 0.8, 1.6))
        yield kind, degrade(exposed, kind, rng, **parameters), exposed
    exposed = photo ** gamma(rng, 0.8, 2.5)
    yield 'noise', degrade(exposed, 'camera_noise', rng), exposed


def gamma(rng: np.random.Generator, low: float, high: float) -> np.float32:
    return np.float32(np.exp(rng.uniform(np.log(low), np.log(high))))


def some_size(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The photograph, or five eighths of its size: sharper, with finer detail."""
    if rng.random() < 0.5:
        photo = cv2.resize(photo, None, fx=0.625, fy=0.625, interpolation=cv2.INTER_AREA)
    return np.clip(photo, 0, 1)


def crop(image: np.ndarray, size: int) -> np.ndarray:
    """Center crop, aligned to JPEG's blocks."""
    top, left = (max(length - size, 0) // 2 // 8 * 8 for length in image.shape[:2])
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def report(classifier: DegradationClassifier, statistics: dict[str, Tensor]) -> str:
    """Accuracy per class, and the mean probability of the first class, which should be equal to it."""
    right, sure, lines = [], [], []
    for kind, part in statistics.items():
        scores = classifier.scores(part)
        hits = scores.argmax(dim=1) == classifier.names.index(kind)
        lines.append(f'{kind}: {hits.float().mean():.0%} of {len(part)}')
        right.append(hits)
        sure.append(scores.amax(dim=1))
    far = torch.cat([classifier.distances(part) > classifier.farthest for part in statistics.values()])
    total = f'all: {torch.cat(right).float().mean():.1%}, with probability {torch.cat(sure).mean():.1%} on average'
    return '\n'.join([*lines, f'{total}; {far.float().mean():.1%} considered unlike the training images'])


if __name__ == '__main__':
    main()
