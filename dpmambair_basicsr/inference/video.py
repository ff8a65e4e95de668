"""Restore a video: each shot with one degradation embedding and one set of image means, from a few of its frames.

A network's estimates differ from frame to frame, which makes the brightness flicker. Papers and published code restore
single images; sharing the statistics over a shot is our inference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpmambair_basicsr.archs.blocks import MeansOverTiles
from dpmambair_basicsr.files.videos import Frame, read_frames, rewrite
from dpmambair_basicsr.inference.degradation_classifier import Finding
from dpmambair_basicsr.inference.restorer import Restorer

SAMPLES = 5  # frames per shot, evenly spaced
CUT = 0.35  # share of the pixels whose colour class changes from one frame to the next; our inference
BINS = 8  # of brightness, for each colour


@dataclass
class Shot:
    """
    Attributes:
        first, end: its first frame, and the one after its last.
        findings: of its samples.
        embedding: see `Restorer.restore`.
        means: collected over its samples, None for a network without means.
    """

    first: int
    end: int
    findings: list[Finding | None] = field(default_factory=list)
    embedding: Tensor | None = None
    means: MeansOverTiles | None = None

    @property
    def samples(self) -> list[int]:
        """Indices of the central frames of `SAMPLES` equal parts."""
        length = self.end - self.first
        return sorted({self.first + (2 * k + 1) * length // (2 * SAMPLES) for k in range(SAMPLES)})


def find_shots(video: Path) -> list[Shot]:
    """The shots of a video, from cut to cut. Raises as `read_frames` does; ValueError if it has no frames."""
    starts, before, count = [0], None, 0
    for frame in read_frames(video):
        here = histogram(frame.image)
        if before is not None and np.abs(here - before).sum() / 2 > CUT:
            starts.append(count)
        before, count = here, count + 1
    if not count:
        raise ValueError('has no frames')
    return [Shot(first, end) for first, end in zip(starts, [*starts[1:], count], strict=True)]


def histogram(image: np.ndarray) -> np.ndarray:
    """(3, BINS), shares of the pixels divided by 3, so that the total is 1."""
    small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA).reshape(-1, 3)
    classes = (small.astype(np.int64) * BINS) // (np.iinfo(image.dtype).max + 1)
    return np.stack([np.bincount(part, minlength=BINS) for part in classes.T]) / classes.size


def find_in(restorer: Restorer, video: Path, shots: list[Shot]) -> None:
    """Fill in the shots' findings."""
    for shot, images in samples_of(video, shots):
        shot.findings = [restorer.find(image) for image in images]


def measure(restorer: Restorer, video: Path, shots: list[Shot], embedding: Tensor | None, **options) -> None:
    """Fill in the embeddings and means of shots that have their findings.

    Args:
        embedding: (1, E) for all shots, instead of their own.
        options: of `Restorer.restore`.
    """
    for shot, images in samples_of(video, shots):
        shot.embedding = mean_embedding(restorer, images, shot.findings) if embedding is None else embedding
        if restorer.has_means:
            means = MeansOverTiles()
            for image in images:
                restorer.restore(image, embedding=shot.embedding, means=means, **options)
            means.complete = True
            shot.means = means


def samples_of(video: Path, shots: list[Shot]) -> Iterator[tuple[Shot, list[np.ndarray]]]:
    remaining = iter(shots)
    shot, images = next(remaining), []
    for number, frame in enumerate(read_frames(video)):
        if number == shot.end:
            yield shot, images
            shot, images = next(remaining), []
        if number in shot.samples:
            images.append(frame.image)
    yield shot, images


def mean_embedding(restorer: Restorer, images: list[np.ndarray], findings: list[Finding | None]) -> Tensor | None:
    """(1, E) of unit length, None for a network without an embedding."""
    parts = []
    for image, finding in zip(images, findings, strict=True):
        by_kind = restorer.embedding_for(image, finding)
        parts.append(restorer.embedding_of(image) if by_kind is None else by_kind)
    return None if parts[0] is None else F.normalize(torch.cat(parts).mean(dim=0, keepdim=True), dim=1)


def restore_video(
    restorer: Restorer, source: Path, target: Path, shots: list[Shot], progress: Callable[[int], None], **options
) -> list[str]:
    """Write the restored video. Returns what it does not keep from the source, as text for users.

    Args:
        shots: with embeddings and means from `measure`.
        progress: called with the number of finished frames.
        options: of `Restorer.restore`.

    Raises:
        OSError, ValueError, MemoryError, RuntimeError: no result was written.
    """
    numbered = iter([shot for shot in shots for _ in range(shot.first, shot.end)])
    done = 0

    def restore(frame: Frame) -> np.ndarray:
        nonlocal done
        shot = next(numbered)
        image = restorer.restore(frame.image, embedding=shot.embedding, means=shot.means, **options)
        assert isinstance(image, np.ndarray), 'like the frame'
        done += 1
        progress(done)
        return image

    return rewrite(source, target, restore)
