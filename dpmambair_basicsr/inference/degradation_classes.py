"""Which degradation an embedding belongs to: classes defined by reference pictures."""

from dataclasses import dataclass

import torch
from torch import Tensor

# For nearly identical reference pictures.
SMALLEST_DEVIATION = 1e-4  # of a coordinate of a unit vector


SMALLEST_SPREAD = 1e-2


@dataclass(frozen=True)
class Classes:
    """Degradations, each represented by the mean embedding of its reference pictures.

    The distance of an embedding to a class is Euclidean, to the class's mean, in units of each coordinate's standard
    deviation within the classes; divided by the class's spread, the root mean square distance of its members, it is
    about 1 for a member. The scores are the posterior probabilities of the classes, with equal priors, if members were
    distributed around the mean as a two-dimensional Gaussian of that spread: softmax of
    -(distance / spread)^2 - 2 log(spread). They sum to 1 even where no class matches; the distance shows this. (The
    paper has no scores: our inference. Of one, two and four dimensions, two gave the best calibrated scores for the
    demo's extractor on unseen pictures.)

    Attributes:
        names: of the K classes.
        embeddings: of all reference pictures, (N, E), of unit length, as DPMambaIR receives them.
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
        """Classes from {name: embeddings, each (1, E)}. Raises ValueError for fewer than two, of two each."""
        for name, members in references.items():
            if len(members) < 2:
                raise ValueError(f'class {name}: a class needs two or more readable pictures, got {len(members)}')
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
        """(M, E) -> (M, K), in units of each class's spread."""
        return torch.stack([((embeddings - x) / self.deviation).norm(dim=1) for x in self.means], dim=1) / self.spread

    def scores(self, distances: Tensor) -> Tensor:
        """(M, K) -> (M, K), each row of sum 1."""
        return torch.softmax(-distances.square() - 2 * self.spread.log(), dim=1)

    def accuracy(self) -> float:
        """Share of the reference pictures that are classified correctly."""
        return self.recognised().float().mean().item()

    def recognised(self) -> Tensor:
        """(N,) bool: whether a reference picture's class has the best score, its mean computed without the picture."""
        distances = self.distances(self.embeddings)
        members = self.labels.bincount()[self.labels]
        own = self.labels[:, None]
        # Without x, the mean of n is farther from x by n / (n - 1).
        distances.scatter_(1, own, distances.gather(1, own) * (members / (members - 1))[:, None])
        return self.scores(distances).argmax(dim=1) == self.labels

    def summary(self) -> str:
        classes, pictures = len(self.names), len(self.labels)
        return (
            f'{classes} classes, {pictures} reference pictures, {self.accuracy():.0%} of them recognised '
            f"when left out of their class's mean (chance: {1 / classes:.0%})"
        )


def most_likely(classes: Classes, embeddings: Tensor) -> list[str]:
    """The name of the class with the best score, for each row of (M, E)."""
    return [classes.names[k] for k in classes.scores(classes.distances(embeddings)).argmax(dim=1)]
