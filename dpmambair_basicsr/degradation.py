"""What the degradation extractor sees: `python -m dpmambair_basicsr.degradation -w net_g_5.pth x.png --clean photos/`.

Prints the likeliest classes of each picture with their scores; --output map.png draws a map of the embeddings.
The classes are no part of a checkpoint. With --reference, each sub-folder is a class: pictures of one degradation. With
--clean, they are the seven synthetic degradations, with their default parameters, of these clean pictures.
Unreadable pictures are reported and passed over, and the exit status is 1 in the end. See `Classes` for the scores.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import dpmambair_basicsr
from dpmambair_basicsr.archs import DegradationExtractor
from dpmambair_basicsr.data.degradations import DEGRADATIONS, degrade
from dpmambair_basicsr.data.image_files import to_float, to_tensor
from dpmambair_basicsr.files import replacing
from dpmambair_basicsr.models.checkpoints import differences, read_checkpoint, select_weights
from dpmambair_basicsr.pictures import read_picture
from dpmambair_basicsr.restore import list_pictures
from dpmambair_basicsr.restorer import choose_device

# For reference pictures that are nearly alike.
SMALLEST_DEVIATION = 1e-4  # of a coordinate of a unit vector
SMALLEST_SPREAD = 1e-2


def main() -> int:
    """Returns the exit status: 0, or 1 if a picture failed. Wrong arguments end with a message and 1 or 2."""
    arguments = parse_arguments()
    dpmambair_basicsr.register()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # its warnings name no file
    if arguments.output is not None:
        check_map(arguments.output, arguments.map)
    pictures = find_pictures([*arguments.inputs, *arguments.input])
    try:
        embedder = Embedder(load_extractor(arguments.weights), choose_device(arguments.device), arguments.crop)
        if arguments.reference is None:
            classes = embedder.classes_of_degradations(arguments.clean)
        else:
            classes = embedder.classes_of_folders(arguments.reference)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(classes.summary())

    found = embedder.embed(list(pictures), 'pictures')
    if found:
        embeddings = torch.cat(list(found.values()))
        kinds = [pictures[path] for path in found]
        print('\n'.join(['', *table(list(found), kinds, classes, embeddings)]))
        if arguments.output is not None:
            try:
                draw_map(arguments.output, arguments.map, classes, embeddings, kinds)
            except OSError as error:
                raise SystemExit(f'{arguments.output}: cannot be written: {error.strerror}') from None
            print(f'\nmap: {arguments.output}')
    if embedder.failed:
        print(f'\nfailed pictures: {embedder.failed}', file=sys.stderr)
    return 1 if embedder.failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m dpmambair_basicsr.degradation', description=__doc__.partition('\n\n')[2].partition(' See ')[0]
    )
    add = parser.add_argument
    inputs = 'picture, pattern, or folder: its pictures, and those of its sub-folders, whose names are their kinds'
    add('inputs', nargs='*', metavar='INPUT', help=inputs)
    add('-i', '--input', nargs='+', default=[], metavar='INPUT', help='the same')
    add('-w', '--weights', required=True, metavar='FILE', help='checkpoint of stage 1, or of a DPMambaIR')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--reference', type=Path, metavar='FOLDER', help='one sub-folder of pictures for each class')
    source.add_argument('--clean', type=Path, metavar='FOLDER', help='clean pictures, to be degraded in seven ways')
    add('-o', '--output', type=Path, metavar='FILE.png', help='a map of the embeddings; needs matplotlib')
    add('--map', choices=('pca', 'tsne'), default='pca', help='how the map is made; tsne needs scikit-learn')
    add('--crop', type=int, metavar='N', help='look at the middle N x N pixels of each picture only, which is faster')
    add('--device', default='auto', help='auto, cpu, cuda or cuda:<n>; default: %(default)s')
    arguments = parser.parse_args()
    if not arguments.inputs and not arguments.input:
        parser.error('no INPUT')
    if arguments.crop is not None and arguments.crop < 1:
        parser.error('--crop: 1 or more')
    return arguments


def find_pictures(inputs: list[str]) -> dict[Path, str]:
    """{picture: kind}, the kind being the name of its sub-folder or ''. Raises SystemExit where there is no picture."""
    kinds = {}
    for argument in inputs:
        found = dict.fromkeys(list_pictures(argument), '')
        if Path(argument).is_dir():
            found |= {path: name for name, paths in sub_folders(Path(argument)).items() for path in paths}
        if not found:
            raise SystemExit(f'{argument}: no picture there')
        kinds |= found
    return kinds


def sub_folders(folder: Path) -> dict[str, list[Path]]:
    """{name: pictures} of the folders in a folder that hold pictures, sorted; hidden ones are left out."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != '.')
    return {path.name: pictures for path in folders if (pictures := list_pictures(str(path)))}


def load_extractor(weights: str) -> DegradationExtractor:
    """The extractor of a DegradationAutoencoder, DegradationExtractor or DPMambaIR, merged.

    Its widths are those of its weights, so the checkpoint need not hold its options.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file: no checkpoint, or one without an extractor.
    """
    state_dict = select_weights(weights, read_checkpoint(weights), 'params_ema', 'params', None)
    prefix = 'extractor.' if any(name.startswith('extractor.') for name in state_dict) else ''
    own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if not {'layers.0.bias', 'head.2.bias'} <= own.keys():
        raise ValueError(f'{weights}: holds no degradation extractor; checkpoints of stage 1 and of most DPMambaIRs do')
    channels = []
    while (bias := own.get(f'layers.{len(channels)}.bias')) is not None:
        channels.append(len(bias))
    extractor = DegradationExtractor(
        embed_dim=len(own['head.2.bias']), channels=channels, merged='layers.0.weight' in own
    )
    if report := differences(extractor, own):
        raise ValueError(f'{weights}: {report}')
    extractor.load_state_dict(own)
    return extractor.merge().eval().requires_grad_(False)


@dataclass(frozen=True)
class Classes:
    """Degradations, each known by the mean embedding of its reference pictures.

    The distance of an embedding to a class is Euclidean, from the class's mean, in units of the standard deviation that
    each coordinate has within the classes; divided by the class's spread, the root mean square distance of its members,
    it is about 1 for a member. The scores are the probabilities of the classes, all as likely at first, if members lay
    around the mean as in a two-dimensional Gaussian of that spread: softmax of -(distance / spread)^2 - 2 log(spread).
    They sum to 1 even where no class fits; the distance tells. (The paper has no scores: our inference. Of one, two and
    four dimensions, two gave the best calibrated scores for the demo's extractor on pictures it never saw.)

    Attributes:
        names: of the K classes.
        embeddings: of all reference pictures, (N, E), of unit length, as DPMambaIR gets them.
        labels: the class of each, (N,).
        means: (K, E).
        deviation: of the coordinates within the classes, (E,).
        spread: (K,).
    """

    names: list[str]
    embeddings: Tensor
    labels: Tensor
    means: Tensor
    deviation: Tensor
    spread: Tensor

    @classmethod
    def of(cls, references: dict[str, list[Tensor]]) -> 'Classes':
        """Classes from {name: embeddings, each (1, E)}. Raises ValueError for fewer than two, of two pictures each."""
        for name, members in references.items():
            if len(members) < 2:
                raise ValueError(f'class {name}: a class needs two or more readable pictures, it has {len(members)}')
        if len(references) < 2:
            raise ValueError(f'two or more classes are needed, found {", ".join(references) or "none"}')
        means = torch.cat([torch.cat(members).mean(dim=0, keepdim=True) for members in references.values()])
        labels = torch.repeat_interleave(torch.tensor([len(members) for members in references.values()]))
        embeddings = torch.cat([part for members in references.values() for part in members])
        difference = embeddings - means[labels]
        deviation = difference.square().mean(dim=0).sqrt().clamp(min=SMALLEST_DEVIATION)
        squares = (difference / deviation).square().sum(dim=1)
        spread = torch.stack([squares[labels == k].mean().sqrt() for k in range(len(means))]).clamp(min=SMALLEST_SPREAD)
        return cls(list(references), embeddings, labels, means, deviation, spread)

    def distances(self, embeddings: Tensor) -> Tensor:
        """(M, E) -> (M, K), in units of the spread of each class."""
        return torch.stack([((embeddings - x) / self.deviation).norm(dim=1) for x in self.means], dim=1) / self.spread

    def scores(self, distances: Tensor) -> Tensor:
        """(M, K) -> (M, K), each row of sum 1."""
        return torch.softmax(-distances.square() - 2 * self.spread.log(), dim=1)

    def accuracy(self) -> float:
        """Share of the reference pictures whose own class has the best score, its mean being taken without them."""
        distances = self.distances(self.embeddings)
        members = self.labels.bincount()[self.labels]
        own = self.labels[:, None]
        # Without x, the mean of n is farther from x by n / (n - 1).
        distances.scatter_(1, own, distances.gather(1, own) * (members / (members - 1))[:, None])
        return (self.scores(distances).argmax(dim=1) == self.labels).float().mean().item()

    def summary(self) -> str:
        classes, pictures = len(self.names), len(self.labels)
        return (
            f'{classes} classes, {pictures} reference pictures, {self.accuracy():.0%} of them recognised '
            f"when left out of their class's mean (chance: {1 / classes:.0%})"
        )


class Embedder:
    """Embeds picture files; reports what it cannot read and counts it in `failed`.

    Args:
        extractor: merged or not.
        device: where it runs.
        crop: side of the part that is looked at, in the middle; None: all.
    """

    def __init__(self, extractor: DegradationExtractor, device: torch.device, crop: int | None):
        self.extractor = extractor.to(device)
        self.device = device
        self.crop = crop
        self.failed = 0

    def classes_of_folders(self, folder: Path) -> Classes:
        """Raises OSError if there is no such folder, ValueError without enough pictures in its sub-folders."""
        folders = sub_folders(folder)
        if not folders:
            raise ValueError(f'{folder}: no sub-folder with pictures in it; there has to be one for each class')
        return Classes.of({name: list(self.embed(paths, name).values()) for name, paths in folders.items()})

    def classes_of_degradations(self, folder: Path) -> Classes:
        """Of the pictures in the folder, each degraded in all ways. Raises ValueError if there are fewer than two."""
        paths = list_pictures(str(folder))
        if not paths:
            raise ValueError(f'{folder}: no picture there')
        found = self.embed(paths, 'clean', degraded_versions)
        return Classes.of({kind: [part[i : i + 1] for part in found.values()] for i, kind in enumerate(DEGRADATIONS)})

    def embed(
        self,
        paths: list[Path],
        description: str,
        versions: Callable[[np.ndarray, int], list[np.ndarray]] = lambda image, seed: [image],
    ) -> dict[Path, Tensor]:
        """{picture: embeddings (V, E) of unit length of its V versions}, without those that fail."""
        embeddings = {}
        bar = tqdm(paths, desc=description, unit='picture', disable=None)
        for seed, path in enumerate(bar):
            try:
                image = middle(to_float(read_picture(path).image), self.crop)
                embeddings[path] = torch.cat([self.embed_image(version) for version in versions(image, seed)])
            except (OSError, ValueError, MemoryError, RuntimeError) as error:  # RuntimeError: out of memory, in PyTorch
                self.failed += 1
                bar.write(f'{path}: {" ".join(str(error).split()) or type(error).__name__}', file=sys.stderr)
        return embeddings

    def embed_image(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) RGB float32 in [0, 1] -> (1, E)."""
        with torch.no_grad():
            return F.normalize(self.extractor(to_tensor(image)[None].to(self.device)), dim=1).cpu()


def middle(image: np.ndarray, size: int | None) -> np.ndarray:
    if size is None:
        return image
    top, left = (max(length - size, 0) // 2 for length in image.shape[:2])
    return image[top : top + size, left : left + size]


def degraded_versions(image: np.ndarray, seed: int) -> list[np.ndarray]:
    """One for each of DEGRADATIONS."""
    rng = np.random.default_rng(seed)
    return [degrade(image, kind, rng) for kind in DEGRADATIONS]


def table(paths: list[Path], kinds: list[str], classes: Classes, embeddings: Tensor) -> list[str]:
    """A line for each picture: the three likeliest classes, each with its score, and the distance to the first."""
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
    pairs = zip(kinds, likeliest(classes, embeddings), strict=True)
    right = [kind == found for kind, found in pairs if kind in classes.names]
    if right:
        lines += ['', f'{sum(right)} of {len(right)} are of the class that their folder is named after']
    return lines


def likeliest(classes: Classes, embeddings: Tensor) -> list[str]:
    """The name of the class with the best score of each of (M, E)."""
    return [classes.names[k] for k in classes.scores(classes.distances(embeddings)).argmax(dim=1)]


def check_map(file: Path, method: str) -> None:
    """Raises SystemExit unless the map can be made; before the work."""
    if file.suffix.lower() != '.png':
        raise SystemExit(f'{file}: a map is a .png')
    for library, module in [('matplotlib', 'matplotlib'), ('scikit-learn', 'sklearn')][: 1 + (method == 'tsne')]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            option = '--output' if module == 'matplotlib' else '--map tsne'
            raise SystemExit(f'{option} needs {library} ({error}); pip install matplotlib scikit-learn') from None


def draw_map(file: Path, method: str, classes: Classes, embeddings: Tensor, kinds: list[str]) -> None:
    """Pictures as large marks, the references as small ones, coloured by kind: PNG.

    A picture's kind is the one given, where all have one, otherwise its likeliest class.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    kinds = kinds if all(kinds) else likeliest(classes, embeddings)
    points, references = positions(method, classes, embeddings)
    names = [*classes.names, *sorted({*kinds} - {*classes.names})]
    colours = colormaps['tab10' if len(names) <= 10 else 'gist_rainbow'].resampled(max(len(names), 10))

    figure = Figure(figsize=(9, 7), layout='constrained')
    axes = figure.subplots()
    for index, name in enumerate(names):
        part = points[[kind == name for kind in kinds]]
        colour = [colours(index)]
        if name in classes.names:
            axes.scatter(*references[classes.labels.numpy() == classes.names.index(name)].T, s=9, c=colour)
        axes.scatter(*part.T, s=90, c=colour, edgecolors='black', label=f'{name} ({len(part)})')
    axes.set_title(f'Degradation embeddings, {method}; small: references', fontsize='medium')
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        figure.savefig(part, format='png', dpi=120)


def positions(method: str, classes: Classes, embeddings: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Places of embeddings (M, E) and of the references (N, E) on the map, (M, 2) and (N, 2).

    pca: the two directions in which the references vary most, in units of `Classes.deviation`.
    tsne: neighbours stay neighbours, distances mean nothing; depends on all pictures together.
    """
    centre = classes.embeddings.mean(dim=0)
    points, references = ((x - centre) / classes.deviation for x in (embeddings, classes.embeddings))
    if method == 'tsne':
        from sklearn.manifold import TSNE

        together = torch.cat([points, references]).numpy()
        placed = TSNE(perplexity=min(30, (len(together) - 1) / 3), init='pca', random_state=0).fit_transform(together)
        return placed[: len(points)], placed[len(points) :]
    axes = torch.linalg.svd(references, full_matrices=False).Vh[:2].T
    return (points @ axes).numpy(), (references @ axes).numpy()


if __name__ == '__main__':
    sys.exit(main())
