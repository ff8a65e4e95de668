from collections import defaultdict
from contextvars import ContextVar

from torch import Tensor, nn

# A context variable, not a hook or attribute of the modules: other threads may use the network at the same time.
_means_over_tiles: ContextVar['MeansOverTiles | None'] = ContextVar('means_over_tiles', default=None)


class ImageMean(nn.Module):
    """(B, C, H, W) -> (B, C, 1, 1), the mean over the image. A module, so that tiles of one image can share it."""

    def forward(self, x: Tensor) -> Tensor:
        mean, shared = x.mean(dim=(2, 3), keepdim=True), _means_over_tiles.get()
        return mean if shared is None else shared.share(self, x, mean)


class MeansOverTiles:
    """Context manager in which the `ImageMean`s of a network first collect the means of tiles, then return their mean.

    It applies only to the current thread (or asyncio task), and must be entered for each call of the network.

    An approximation: pixels in overlaps count more than once, and the means of deep layers depend on earlier ones,
    which still differ between tiles while being collected. With the demo's network, the resulting error is a tenth of
    that of the scans at tile borders.

    Attributes:
        complete: False while means are collected; set it to True once every tile has been processed.
        variant: identifies one of several passes over the same tiles, each with its own means.
    """

    def __init__(self):
        self.complete = False
        self.variant = None
        self.sums: dict[tuple, Tensor | float] = defaultdict(float)
        self.pixels: dict[tuple, int] = defaultdict(int)

    def __enter__(self) -> 'MeansOverTiles':
        self.token = _means_over_tiles.set(self)
        return self

    def __exit__(self, *_) -> None:
        _means_over_tiles.reset(self.token)

    @classmethod
    def of(cls, given: dict[ImageMean, Tensor]) -> 'MeansOverTiles':
        """Complete ones with these means, (B, C, 1, 1) float64."""
        means = cls()
        means.complete = True
        means.sums.update({(module, None): mean for module, mean in given.items()})
        means.pixels.update(dict.fromkeys(means.sums, 1))
        return means

    def of_variant(self) -> dict[ImageMean, Tensor]:
        """What `of` takes, of the current variant."""
        sums = {key: total for key, total in self.sums.items() if key[1] == self.variant and isinstance(total, Tensor)}
        return {key[0]: total / self.pixels[key] for key, total in sums.items()}

    def add(self, sums: dict[tuple, Tensor], pixels: dict[tuple, int]) -> None:
        """Adds what others collected, without variants, to the current variant."""
        for (module, _), total in sums.items():
            self.sums[module, self.variant] += total
            self.pixels[module, self.variant] += pixels[module, None]

    def share(self, module: ImageMean, x: Tensor, mean: Tensor) -> Tensor:
        key = module, self.variant
        if self.complete:
            return (self.sums[key] / self.pixels[key]).to(mean)
        pixels = x.shape[-2:].numel()
        exact = mean.cpu() if mean.device.type == 'mps' else mean  # MPS has no float64
        self.sums[key] += exact.double() * pixels
        self.pixels[key] += pixels
        return mean
