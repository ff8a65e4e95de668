"""Applies the network of a model to validation and test images."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpmambair_basicsr.files.option_row import Option
from dpmambair_basicsr.inference.memory import OutOfMemory, is_out_of_memory, out_of_memory
from dpmambair_basicsr.inference.tiled_network import OVERLAP, TiledNetwork


class Evaluation:
    """Processes whole images, or tiles as in `restore` if images are too large for the memory.

    Args:
        opt: of the model. In `val`:
            tile: size of the tiles in pixels of the input. Default: none, the whole image.
            overlap: minimum overlap of neighbouring tiles in pixels, up to half a tile. Default 64.
            one_pass: tiles in half the time, each with its own channel means. Default false.
    """

    option_keys = (
        Option('val', 'tile', int | None, 'tile size in pixels of the input; ~ or 0: whole images', low=0),
        Option('val', 'overlap', int, 'overlap of tiles in pixels, up to half a tile; default 64', low=0),
        Option('val', 'one_pass', bool, 'tiles in half the time, less accurate; default false'),
    )

    def __init__(self, opt: dict):
        val = opt.get('val') or {}
        self.tile, self.overlap = val.get('tile') or 0, val.get('overlap', OVERLAP)
        self.one_pass = bool(val.get('one_pass'))
        self.scale = opt.get('scale', 1)
        self.tiled: TiledNetwork | None = None

    def restore(self, net: nn.Module, inputs: tuple[Tensor, ...], file: str) -> Tensor:
        """(b, 3, scale * h, scale * w) from `inputs`, whose first is (b, 3, h, w), by the network in eval mode.

        Args:
            file: that of the image, for messages.

        Raises:
            OutOfMemory: naming the file, its size and `val.tile`.
            ValueError: a tile smaller than the network's stride.
        """
        was_training = net.training
        net.eval()
        try:
            with torch.no_grad():
                return self.in_tiles(net, *inputs) if self.tile else net(*inputs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        finally:
            net.train(was_training)
        # Outside the except clause: the frames of the error keep their tensors alive.
        height, width = inputs[0].shape[-2:]
        raise out_of_memory(height, width, self.tile, 'val.tile: {0} (--force_yml val:tile={0})', f'{file}: ')

    @contextmanager
    def explained(self, model) -> Iterator[None]:
        """While BasicSR validates a set: raises OutOfMemory where it happens outside `restore`, naming the image.

        In the end, gives back the memory of CUDA graphs.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
                raise
            after = getattr(model, 'lq_path', 'nothing')
            raise OutOfMemory(
                f'out of memory in a metric of {after}, or where the next image is read: {error}'
            ) from error
        finally:
            self.tiled = None

    def in_tiles(self, net: nn.Module, image: Tensor, *context: Tensor) -> Tensor:
        """Restore in tiles; the result is on the CPU, since it may not fit into a GPU either."""
        if self.tiled is None or self.tiled.net is not net:
            self.tiled = TiledNetwork(net, image.device, getattr(net, 'scale', self.scale))
        bands = self.tiled.bands(image, *context, tile=self.tile, overlap=self.overlap, one_pass=self.one_pass)
        return torch.cat([*bands], dim=2)
