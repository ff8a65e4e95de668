"""Embed picture files with the extractor of a checkpoint."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dpmambair_basicsr.archs import DegradationExtractor
from dpmambair_basicsr.data.degradations import degrade, synthetic
from dpmambair_basicsr.files.checkpoints import WRAPPINGS, differences, read_checkpoint, select_weights
from dpmambair_basicsr.files.images import to_float, to_tensor
from dpmambair_basicsr.files.picture_jobs import list_pictures, nothing_found
from dpmambair_basicsr.files.pictures import read_picture
from dpmambair_basicsr.inference.degradation_classes import Classes


def sub_folders(folder: Path) -> dict[str, list[Path]]:
    """{name: pictures} for the sub-folders with pictures, sorted; hidden ones are left out."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != '.')
    return {path.name: pictures for path in folders if (pictures := list_pictures(str(path)))}


def load_extractor(weights: str) -> DegradationExtractor:
    """The extractor of a DegradationAutoencoder, DegradationExtractor or DPMambaIR, merged.

    Its widths are inferred from its weights, so the checkpoint need not hold its options.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file: not a checkpoint, or one without an extractor.
    """
    state_dict = select_weights(weights, read_checkpoint(weights), *WRAPPINGS)
    prefix = 'extractor.' if any(name.startswith('extractor.') for name in state_dict) else ''
    own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if not {'layers.0.bias', 'head.0.bias', 'head.2.bias'} <= own.keys():
        raise ValueError(f'{weights}: contains no degradation extractor; use one of stage 1 or of a DPMambaIR')
    widths = DegradationExtractor.options_of_weights(own)
    extractor = DegradationExtractor(embed_dim=len(own['head.2.bias']), merged='layers.0.weight' in own, **widths)
    if report := differences(extractor, own):
        raise ValueError(f'{weights}: {report}')
    extractor.load_state_dict(own)
    return extractor.merge().eval().requires_grad_(False)


class Embedder:
    """Embeds picture files; reports unreadable ones and counts them in `failed`.

    Args:
        extractor: merged or not.
        device: where it runs.
        crop: side of the center crop that is embedded; None: the whole picture.
    """

    def __init__(self, extractor: DegradationExtractor, device: torch.device, crop: int | None):
        self.extractor = extractor.to(device)
        self.device = device
        self.crop = crop
        self.failed = 0

    def classes_of_folders(self, folder: Path) -> Classes:
        """Classes from one sub-folder each. Raises OSError for a missing folder, ValueError for too few pictures."""
        folders = sub_folders(folder)
        if not folders:
            raise ValueError(f'{folder}: no sub-folder contains pictures; expected one sub-folder per class')
        return Classes.of({name: list(self.embed(paths, name).values()) for name, paths in folders.items()})

    def classes_of_degradations(self, folder: Path) -> Classes:
        """Classes from the folder's pictures, each degraded in every way. Raises ValueError for fewer than two."""
        paths = list_pictures(str(folder))
        if not paths:
            raise ValueError(nothing_found(str(folder)))
        found = self.embed(paths, 'clean', degraded_versions)
        return Classes.of({kind: [part[i : i + 1] for part in found.values()] for i, kind in enumerate(single_kinds())})

    def embed(
        self,
        paths: list[Path],
        description: str,
        versions: Callable[[np.ndarray, int], list[np.ndarray]] = lambda image, seed: [image],
    ) -> dict[Path, Tensor]:
        """{picture: embeddings of its V versions, (V, E), of unit length}, without the pictures that fail."""
        embeddings = {}
        bar = tqdm(paths, desc=description, unit='picture', disable=None)
        for seed, path in enumerate(bar):
            try:
                image = center_crop(to_float(read_picture(path).image), self.crop)
                embeddings[path] = torch.cat([self.embed_image(version) for version in versions(image, seed)])
            except (OSError, ValueError, MemoryError, RuntimeError) as error:  # RuntimeError: out of memory, in PyTorch
                self.failed += 1
                bar.write(f'{path}: {" ".join(str(error).split()) or type(error).__name__}', file=sys.stderr)
        return embeddings

    def embed_image(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) RGB float32 in [0, 1] -> (1, E)."""
        with torch.no_grad():
            return F.normalize(self.extractor(to_tensor(image)[None].to(self.device)), dim=1).cpu()


def center_crop(image: np.ndarray, size: int | None) -> np.ndarray:
    if size is None:
        return image
    top, left = (max(length - size, 0) // 2 for length in image.shape[:2])
    return image[top : top + size, left : left + size]


def single_kinds() -> list[str]:
    """The degradations that have a function, without the composite."""
    return [kind for kind in synthetic() if kind != 'composed']


def degraded_versions(image: np.ndarray, seed: int) -> list[np.ndarray]:
    """One version for each of `single_kinds`."""
    rng = np.random.default_rng(seed)
    return [degrade(image, kind, rng) for kind in single_kinds()]
