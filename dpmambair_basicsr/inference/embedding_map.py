"""Draw embeddings as a map, PNG."""

import importlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpmambair_basicsr.files.atomic import check_file, replacing
from dpmambair_basicsr.files.errors import InputError, MissingLibraryError
from dpmambair_basicsr.inference.degradation_classes import Classes, most_likely


def check_map(file: Path, method: str) -> None:
    """Check up front that the map can be drawn.

    Raises:
        InputError: the file is not named .png, or cannot be written.
        MissingLibraryError: matplotlib or scikit-learn is not installed.
    """
    if file.suffix.lower() != '.png':
        raise InputError(f'{file}: must end in .png')
    check_file(file)
    for library, module in [('matplotlib', 'matplotlib'), ('scikit-learn', 'sklearn')][: 1 + (method == 'tsne')]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            option = '--output' if module == 'matplotlib' else '--map tsne'
            needed = f'{option} needs {library} ({error}); pip install matplotlib scikit-learn'
            raise MissingLibraryError(needed) from None


def draw_map(file: Path, method: str, classes: Classes, embeddings: Tensor, kinds: list[str]) -> None:
    """Draw pictures as large markers and references as small ones, coloured by kind.

    A picture's kind is the given one if all have one, otherwise its most likely class.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    kinds = kinds if all(kinds) else most_likely(classes, embeddings)
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
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            figure.savefig(part, format='png', dpi=120)
    except OSError as error:
        raise InputError(f'{file}: cannot be written: {error.strerror}') from error


def positions(method: str, classes: Classes, embeddings: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Positions of embeddings (M, E) and of the references (N, E) on the map, (M, 2) and (N, 2).

    pca: the two directions in which the references vary most, in units of `Classes.deviation`.
    tsne: preserves neighbourhoods, not distances; depends on all pictures together.
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
