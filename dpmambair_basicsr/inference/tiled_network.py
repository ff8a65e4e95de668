"""Apply a network to an image, whole or in tiles, for `restore`, tests and validations."""

from collections.abc import Callable, Iterator
from itertools import count, product

import torch
from torch import Tensor, nn

from dpmambair_basicsr.archs.blocks import ImageMean, MeansOverTiles
from dpmambair_basicsr.inference.tile_graphs import TileGraphs, call
from dpmambair_basicsr.inference.tiles import tile_spans, tiled
from dpmambair_basicsr.ops import pad_to_multiple

OVERLAP = 64


class TiledNetwork:
    """Applies a network to an image, whole or in overlapping tiles. Thread-safe.

    Tiles bound the memory. They share the degradation embedding of the whole image, and its means wherever VmambaIR and
    DPMambaIR pool over an image, for which the network runs over all tiles twice. Scans, too, reach across an image:
    there, tiles do change the result, the less the larger they are.

    Args:
        net: on `device`, in evaluation mode; called with (b, 3, h, w) in [0, 1]. Tiles begin and, except the last, end
            at multiples of its `stride`, if it has one. If it has an `embed` (DPMambaIR), the whole image is embedded
            once, and the network is called with that `embedding` as well.
        device: where it runs.
        scale: output pixels per input pixel.
        half: compute in half precision, float16 on a GPU, bfloat16 on a CPU.
    """

    def __init__(self, net: nn.Module, device: torch.device, scale: int, half: bool = False):
        self.net, self.device, self.scale, self.half = net, device, scale, half
        self.stride = getattr(net, 'stride', 1)
        self.graphs = TileGraphs.on(device, self.run)
        self.has_means = any(isinstance(module, ImageMean) for module in net.modules())

    @torch.no_grad()
    def bands(
        self,
        image: Tensor,
        *context: Tensor,
        tile: int = 0,
        overlap: int = OVERLAP,
        embedding: Tensor | None = None,
        self_ensemble: bool = False,
        spread: bool = False,
        one_pass: bool = False,
        means: MeansOverTiles | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """The result for (b, 3, h, w) float32, in bands from top to bottom.

        Args:
            context: arguments of the network's `embed` besides the image.
            tile: tile size in pixels of the image, rounded down to a multiple of the stride. 0: no tiles.
            overlap: minimum overlap of neighbouring tiles in pixels, up to half a tile; they are blended across it.
            embedding: (b, E) instead of the image's own.
            self_ensemble: average the results for the eight flips and rotations.
            spread: as self_ensemble, and a fourth channel: the standard deviation of the eight, over the three colours.
            one_pass: each tile has its own means.
            means: of several images of one scene: collected or, once complete, used; tiles then take a single pass.
            progress: called with the number of finished tiles and the total, over both passes.

        Yields:
            (b, 3 or 4, any number of rows, scale * w), float32 on the CPU, not clamped.

        Raises:
            ValueError: a tile smaller than the stride, a negative overlap, context for a network without `embed`.
        """
        if self.graphs is not None:
            self.graphs.look_at(self.net)
        scale, (h, w) = self.scale, image.shape[2:]
        padded = pad_to_multiple(image, self.stride)  # here, so that all tiles share the grid of the whole image
        rows, columns = (
            tile_spans(length, length if tile == 0 else tile, overlap, self.stride) for length in padded.shape[2:]
        )
        embedding = self.embed(padded, *context) if embedding is None else embedding.to(self.device)
        tiles = len(rows) * len(columns)
        two_passes = means is None and tiles > 1 and not one_pass and self.has_means
        means = MeansOverTiles() if two_passes else means
        done = count(1)

        def restore_tile(x: Tensor) -> Tensor:
            output = (
                self.call_eight_ways(x, embedding, means, spread)
                if self_ensemble or spread
                else self.call(x, embedding, means)
            )
            if progress is not None:
                progress(next(done), tiles * (2 if two_passes else 1))
            return output

        if two_passes and means is not None:
            for (top, bottom), (left, right) in product(rows, columns):
                restore_tile(padded[..., top:bottom, left:right])
            means.complete = True
        remaining = h * scale  # rows
        for band in tiled(restore_tile, padded, rows, columns, scale):
            yield band[..., :remaining, : w * scale]
            remaining = max(remaining - band.shape[2], 0)

    def embed(self, image: Tensor, *context: Tensor) -> Tensor | None:
        """The embedding of the degradation, (b, E), if the network uses one."""
        if not hasattr(self.net, 'embed'):
            if context:
                raise ValueError(f'{type(self.net).__name__} takes more than an image and has no `embed`: no tiles')
            return None
        return self.net.embed(image.to(self.device), *context)

    def call(self, image: Tensor, embedding: Tensor | None, means: MeansOverTiles | None = None) -> Tensor:
        """(b, 3, h, w) -> (b, 3, scale * h, scale * w), float32 on the CPU."""
        image = image.to(self.device)
        if self.graphs is not None:
            return self.graphs(image, embedding, means)
        return call(self.run, image, embedding, means).cpu()

    def run(self, image: Tensor, embedding: Tensor | None) -> Tensor:
        """`call` on the device."""
        context = {} if embedding is None else {'embedding': embedding}
        dtype = torch.float16 if self.device.type == 'cuda' else torch.bfloat16
        # Not net.half(): under autocast, the input that the network adds to its output stays float32.
        with torch.autocast(self.device.type, dtype, enabled=self.half):
            return self.net(image, **context).float()

    def call_eight_ways(
        self, image: Tensor, embedding: Tensor | None, means: MeansOverTiles | None, spread: bool = False
    ) -> Tensor:
        """The mean of `call` over the eight flips and rotations, each inverted; see `bands` for the spread."""
        total, squares = 0, 0
        for turns in range(4):
            for flipped in (False, True):
                if means is not None:
                    means.variant = turns, flipped
                turned = image.rot90(turns, (2, 3))
                output = self.call(turned.flip(3) if flipped else turned, embedding, means)
                output = (output.flip(3) if flipped else output).rot90(-turns, (2, 3))
                total = total + output
                squares = squares + output.square() if spread else 0
        mean = total / 8
        if not spread:
            return mean
        variance = (squares / 8 - mean.square()).clamp(min=0).mean(dim=1, keepdim=True)
        return torch.cat([mean, variance.sqrt()], dim=1)
