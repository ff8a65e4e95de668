"""What is wrong with an image, and whether a network knows such images: a linear classifier stored in a checkpoint.

It does not use the embedding that steers the network: after minutes of training, a linear classifier on the embedding
classifies 58% of unseen degraded photographs correctly, one on `image_statistics` 95%.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpmambair_basicsr.inference.image_statistics import image_statistics

CLEAN = 'clean'  # the class of images that are not restored
SMALLEST_DEVIATION = 1e-3  # of a coordinate within the classes
DIGITS = 6  # significant digits of the numbers in a file


@dataclass(frozen=True)
class Finding:
    """What was found in an image.

    Attributes:
        probabilities: of the classes, most probable first; they sum to 1.
        distance: of the statistics to the nearest class, about 1 for the images that the classes were fitted to.
        familiar: whether the distance is within the 99th percentile of those images; if not, trust neither the classes
            nor the result.
    """

    probabilities: dict[str, float]
    distance: float
    familiar: bool

    @property
    def kind(self) -> str:
        return next(iter(self.probabilities))

    @property
    def probability(self) -> float:
        return self.probabilities[self.kind]

    @property
    def is_clean(self) -> bool:
        return self.kind == CLEAN


@dataclass(frozen=True)
class DegradationClassifier:
    """Multinomial logistic regression on `image_statistics`, and the typical statistics and embedding of each class.

    The paper has no classes: all of this is our inference.

    Attributes:
        names: of the K classes.
        weight, bias: of the logistic regression, (K, S) and (K,).
        centres: the mean statistics of each class, (K, S).
        deviation: of the statistics within the classes, (S,).
        farthest: 99th percentile of the distances of the classes' images.
        embeddings: the mean embedding of each class, (K, E), by a network's extractor.
        steered: the classes whose images are restored with the mean embedding of the class instead of their own.
    """

    names: list[str]
    weight: Tensor
    bias: Tensor
    centres: Tensor
    deviation: Tensor
    farthest: float
    embeddings: Tensor
    steered: tuple[str, ...] = ()

    def find(self, image: np.ndarray) -> Finding:
        """What is wrong with an image, (H, W, 3) RGB float32 in [0, 1]."""
        statistics = torch.from_numpy(image_statistics(image))[None]
        scores = self.scores(statistics)[0]
        order = scores.argsort(descending=True).tolist()
        distance = self.distances(statistics).item()
        return Finding({self.names[k]: scores[k].item() for k in order}, distance, distance <= self.farthest)

    def scores(self, statistics: Tensor) -> Tensor:
        """(B, S) -> (B, K), the probabilities."""
        return torch.softmax(F.linear(statistics, self.weight, self.bias), dim=1)

    def distances(self, statistics: Tensor) -> Tensor:
        """(B, S) -> (B,): root mean square over the coordinates, to the nearest centre, in units of `deviation`."""
        away = ((statistics[:, None] - self.centres) / self.deviation).square().mean(dim=2).sqrt()
        return away.amin(dim=1)

    def embedding_of(self, kind: str) -> Tensor:
        """The typical embedding of a class, (1, E), of unit length. Raises ValueError if there is no such class."""
        if kind not in self.names:
            raise ValueError(f'kind: must be one of {", ".join(self.names)}, got {kind!r}')
        return F.normalize(self.embeddings[self.names.index(kind)][None], dim=1)

    @classmethod
    def fit(
        cls, statistics: dict[str, Tensor], embeddings: dict[str, Tensor], decay: float = 3e-4
    ) -> 'DegradationClassifier':
        """Fit to {class: statistics (N, S)} and {class: embeddings (M, E), of unit length}; classes have equal weight.

        Args:
            decay: weight decay, for standardised statistics.
        """
        means = torch.stack([part.mean(dim=0) for part in embeddings.values()])
        centres = torch.stack([part.mean(dim=0) for part in statistics.values()])
        away = torch.cat([part - centre for part, centre in zip(statistics.values(), centres, strict=True)])
        deviation = away.square().mean(dim=0).sqrt().clamp(min=SMALLEST_DEVIATION)
        weight, bias = fit_logistic_regression(list(statistics.values()), decay)
        classifier = cls(list(statistics), weight, bias, centres, deviation, math.inf, means)
        farthest = classifier.distances(torch.cat(list(statistics.values()))).quantile(0.99).item()
        return replace(classifier, farthest=farthest)

    def to_plain(self) -> dict:
        """Convert to lists and numbers, for a checkpoint or JSON."""
        plain = {
            name: rounded(part.tolist() if isinstance(part, Tensor) else part) for name, part in vars(self).items()
        }
        return plain | {'steered': list(self.steered)}

    @classmethod
    def from_plain(cls, values: dict) -> 'DegradationClassifier':
        """Invert `to_plain`. Raises ValueError for anything else."""
        try:
            names = [str(name) for name in values['names']]
            keys = ('weight', 'bias', 'centres', 'deviation', 'embeddings')
            parts = {key: torch.tensor(values[key], dtype=torch.float32) for key in keys}
            k, size = len(names), len(image_statistics(np.zeros((32, 32, 3), np.float32)))
            shapes = {'weight': (k, size), 'bias': (k,), 'centres': (k, size), 'deviation': (size,)}
            fits = all(parts[key].shape == shape for key, shape in shapes.items()) and k >= 2
            fits = fits and parts['embeddings'].dim() == 2 and len(parts['embeddings']) == k
            if not fits or not all(part.isfinite().all() for part in parts.values()):
                raise ValueError('shapes or values')
            steered = tuple(values.get('steered', ()))
            if unknown := {*steered} - {*names}:
                raise ValueError(f'steered: {unknown}')
            return cls(names, **parts, farthest=float(values['farthest']), steered=steered)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f'is not a classifier of degradations ({type(error).__name__}: {error})') from None


def rounded(value):
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f'{value:.{DIGITS}g}') if isinstance(value, float) else value


def fit_logistic_regression(classes: list[Tensor], decay: float) -> tuple[Tensor, Tensor]:
    """Weight (K, S) and bias (K,) that minimise the cross entropy, with equal class weights, plus weight decay."""
    x = torch.cat(classes).double()
    labels = torch.repeat_interleave(torch.tensor([len(part) for part in classes]))
    mean, deviation = x.mean(dim=0), x.std(dim=0).clamp(min=SMALLEST_DEVIATION)
    x = (x - mean) / deviation
    weight = torch.zeros(len(classes), x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=1000, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = F.cross_entropy(F.linear(x, weight, bias), labels, weight=1 / labels.bincount().double())
        value = entropy + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    scaled = weight.detach() / deviation
    return scaled.float(), (bias.detach() - scaled @ mean).float()
