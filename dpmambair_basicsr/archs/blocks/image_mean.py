from collections import defaultdict
from contextvars import ContextVar

from torch import Tensor, nn

# Not a hook of the modules, nor an attribute: other threads may use the same network at the same time.
_means_over_tiles: ContextVar['MeansOverTiles | None'] = ContextVar('means_over_tiles', default=None)


class ImageMean(nn.Module):
    """(B, C, H, W) -> (B, C, 1, 1), the mean over the image. A module, so that tiles of one image can share it."""

    def forward(self, x: Tensor) -> Tensor:
        mean, shared = x.mean(dim=(2, 3), keepdim=True), _means_over_tiles.get()
        return mean if shared is None else shared.share(self, x, mean)


class MeansOverTiles:
    """A context in which the `ImageMean`s of a network first collect the means of tiles, then give the mean of them.

    It holds for this thread (or asyncio task) alone, and is to be entered for each call of the network.

    An approximation: pixels where tiles overlap count more than once, and the means of deep layers depend on those
    before, which differ between tiles while they are collected. With the demo's network what remains of that is a tenth
    of what the scans make at the borders of tiles.

    Attributes:
        complete: False while means are collected; to be set to True when each tile has been seen.
        variant: which of several passes over the same tiles is running, each with its own means.
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

    def share(self, module: ImageMean, x: Tensor, mean: Tensor) -> Tensor:
        key = module, self.variant
        if self.complete:
            return (self.sums[key] / self.pixels[key]).to(mean)
        pixels = x.shape[-2:].numel()
        exact = mean.cpu() if mean.device.type == 'mps' else mean  # MPS has no float64
        self.sums[key] += exact.double() * pixels
        self.pixels[key] += pixels
        return mean
