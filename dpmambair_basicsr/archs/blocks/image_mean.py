from collections import defaultdict

from torch import Tensor, nn


class ImageMean(nn.Module):
    """(B, C, H, W) -> (B, C, 1, 1), the mean over the image. A module, so that tiles of one image can share it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3), keepdim=True)


class MeansOverTiles:
    """A context in which the `ImageMean`s of a network first collect the means of tiles, then give the mean of them.

    An approximation: pixels where tiles overlap count more than once, and the means of deep layers depend on those
    before, which differ between tiles while they are collected. With the demo's network what remains of that is a tenth
    of what the scans make at the borders of tiles.

    Attributes:
        modules: the network's ImageMeans; it needs no context if there are none.
        complete: False while means are collected; to be set to True when each tile has been seen.
        variant: which of several passes over the same tiles is running, each of which has means of its own.
    """

    def __init__(self, net: nn.Module):
        self.modules = [module for module in net.modules() if isinstance(module, ImageMean)]
        self.complete = False
        self.variant = None
        self.sums: dict[tuple, Tensor | float] = defaultdict(float)
        self.pixels: dict[tuple, int] = defaultdict(int)

    def __enter__(self) -> 'MeansOverTiles':
        self.handles = [module.register_forward_hook(self.share) for module in self.modules]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def share(self, module: ImageMean, inputs: tuple[Tensor], mean: Tensor) -> Tensor | None:
        key = module, self.variant
        if self.complete:
            return (self.sums[key] / self.pixels[key]).to(mean.dtype)
        pixels = inputs[0].shape[-2:].numel()
        self.sums[key] += mean.double() * pixels
        self.pixels[key] += pixels
        return None
