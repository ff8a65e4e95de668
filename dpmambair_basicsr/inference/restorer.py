"""From a checkpoint to restored images: `load` and `Restorer`. Whole images or tiles, uint8, uint16 or float."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from itertools import count, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dpmambair_basicsr.archs.blocks import MeansOverTiles
from dpmambair_basicsr.files.checkpoints import differences, read_checkpoint, select_weights
from dpmambair_basicsr.files.images import to_float, to_tensor
from dpmambair_basicsr.inference.memory import PeakMemory, free_memory
from dpmambair_basicsr.ops import pad_to_multiple, tile_spans, tiled
from dpmambair_basicsr.registry import arguments_of, describe, look_up, registered

OVERLAP = 64
SMALL = 256  # pixels: smaller images are not cut into tiles unless asked for
PROBE = 64  # pixels: size of the image whose memory is measured
SHARE = 0.5  # of the free memory, for a network; measured need and kernels' own memory together stay below


def load(weights: str | Path, *, network: dict | None = None, device: str = 'auto', half: bool = False) -> 'Restorer':
    """A network with trained weights; see `Restorer.restore`.

    Args:
        weights: a checkpoint, net_g_*.pth or a .safetensors file. The average of the network, `params_ema`, is used if
            there is one, otherwise `params`, otherwise the file itself as a state dict.
        network: `network_g` of the option file, for a checkpoint that does not hold it; takes the place of its own.
        device: 'auto' (a GPU if PyTorch finds one), 'cpu', 'cuda' or 'cuda:<n>'.
        half: compute in half precision, float16 on a GPU, bfloat16 on a CPU: half the memory, about two digits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming file and key: the file is no checkpoint, holds no options, or its weights do not fit them;
            the network does not turn one RGB image into another; there is no such device.
    """
    weights = str(weights)
    device = choose_device(device)
    checkpoint = read_checkpoint(weights)
    options = checkpoint.get('network_g') if network is None else network
    state_dict = select_weights(weights, checkpoint, 'params_ema', 'params', None)
    if not isinstance(options, dict):
        raise ValueError(
            f"{weights}: holds no key 'network_g', the options of its network; give them, "
            "as --opt with its option file or as load(..., network={'type': ...})"
        )
    known, problems = look_up(registered('ARCH'), f'{weights}: network_g.type', options.get('type'))
    if problems:
        raise ValueError(problems[0])
    try:
        net = known(**arguments_of(options))
    except (TypeError, ValueError) as error:
        raise ValueError(describe(f'{weights}: network_g', error)) from error
    if report := differences(net, state_dict):
        raise ValueError(f'{weights}: {report}')
    net.load_state_dict(state_dict)
    try:
        return Restorer(net, device, half)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = ' '.join(str(error).split())
        raise ValueError(
            f'{weights}: network_g.type: {options["type"]} does not turn one RGB image into another ({reason})'
        ) from error


def choose_device(name: str) -> torch.device:
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'device: {name!r} is none of auto, cpu, cuda') from None
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'device: {name}, but PyTorch finds no CUDA device; choose auto or cpu')
    return device


class Restorer:
    """A network that turns an RGB image into another, ready for images of any size.

    Args:
        net: called with (1, 3, H, W) in [0, 1], H and W multiples of `net.stride`. If it has an `embed` (DPMambaIR),
            the whole image is embedded once, and the network is called with that `embedding` as well.
        device: where it runs.
        half: see `load`.

    Attributes:
        scale: output pixels per input pixel.
    """

    def __init__(self, net: nn.Module, device: torch.device, half: bool = False):
        self.net = net.to(device).eval().requires_grad_(False)
        self.device = device
        self.half = half
        side = math.ceil(16 / net.stride) * net.stride
        image = torch.zeros(1, 3, side, side)
        with torch.no_grad():
            output = self.call(image, self.embed(image))
        self.scale = output.shape[-1] // side
        if output.shape != (1, 3, side * self.scale, side * self.scale):
            raise ValueError(f'it returns {tuple(output.shape)} for {tuple(image.shape)}')

    @torch.no_grad()
    def restore(
        self,
        image: np.ndarray | Tensor,
        *,
        tile: int | None = None,
        overlap: int = OVERLAP,
        self_ensemble: bool = False,
        one_pass: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | Tensor:
        """The restored image, `scale` times as large.

        Tiles bound the memory: beside the image in float32 and the result, it takes that of one row of results and what
        the network needs for one tile. Tiles get the degradation embedding of the whole image, and its means wherever
        VmambaIR and DPMambaIR pool over an image, for which the network runs over all tiles twice. Their scans, too,
        reach across an image: there tiles do change the result, the larger the less.

        Args:
            image: (H, W, 3) RGB uint8 or uint16 array, or (3, H, W) or (B, 3, H, W) float tensor in [0, 1].
            tile: size of the tiles in pixels of the image, rounded down to a multiple of the network's stride. 0: the
                whole image at once. None: so too if half of the free memory is enough, otherwise as large as it allows.
            overlap: pixels that neighbouring tiles share at least, up to half a tile; they are blended across it.
            self_ensemble: average of the results for the eight flips and rotations, in eight times the time.
            one_pass: tiles in half the time, each with means of its own.
            progress: called with the number of tiles done and of all, those of both passes.

        Returns:
            Of the same kind and type, on the same device, clamped to the type's range or to [0, 1].

        Raises:
            ValueError: an image of another shape or type, or an empty one; a tile smaller than the network's stride;
                an output that is not finite.
        """
        check_image(image)
        if isinstance(image, Tensor) and image.dim() == 4:
            options = {'tile': tile, 'overlap': overlap, 'self_ensemble': self_ensemble, 'one_pass': one_pass}
            return torch.stack([self.restore(part, **options, progress=progress) for part in image])
        is_array = isinstance(image, np.ndarray)
        source = to_tensor(to_float(image)) if is_array else image.float().cpu()
        size = self.fitting_tile(*source.shape[1:]) if tile is None else tile
        while True:
            try:
                bands = self.bands(source, size, overlap, self_ensemble, one_pass, progress)
                return collect_array(bands, image, self.scale) if is_array else torch.cat(list(bands), dim=1).to(image)
            except torch.OutOfMemoryError:  # of a GPU: kernels' own memory is not foreseen by fitting_tile
                size = size or max(source.shape)
                if tile is not None or size <= PROBE:
                    raise
                size = max(size // 2, PROBE)
            torch.cuda.empty_cache()

    def bands(
        self,
        image: Tensor,
        tile: int,
        overlap: int,
        self_ensemble: bool,
        one_pass: bool,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[Tensor]:
        """The result for (3, H, W), both float32 on the CPU, from top to bottom: (3, rows, scale * W) in [0, 1]."""
        stride, scale = self.net.stride, self.scale
        h, w = image.shape[1:]
        padded = pad_to_multiple(image[None], stride)  # here, so that all tiles see the grid of the whole image
        rows, columns = (
            tile_spans(length, length if tile == 0 else tile, overlap, stride) for length in padded.shape[2:]
        )
        embedding = self.embed(padded)
        tiles = len(rows) * len(columns)
        means = MeansOverTiles(self.net)
        share_means = tiles > 1 and not one_pass and bool(means.modules)
        done = count(1)

        def restore_tile(x: Tensor) -> Tensor:
            output = self.call_eight_ways(x, embedding, means) if self_ensemble else self.call(x, embedding)
            if not output.isfinite().all():
                raise ValueError(f'the output of the network is not finite{" in half precision" if self.half else ""}')
            if progress is not None:
                progress(next(done), tiles * (1 + share_means))
            return output

        with means if share_means else nullcontext():
            if share_means:
                for (top, bottom), (left, right) in product(rows, columns):
                    restore_tile(padded[..., top:bottom, left:right])
                means.complete = True
            remaining = h * scale  # rows
            for band in tiled(restore_tile, padded, rows, columns, scale):
                yield band[0, :, :remaining, : w * scale].clamp(0, 1)
                remaining = max(remaining - band.shape[2], 0)

    def embed(self, image: Tensor) -> Tensor | None:
        """Embedding of the degradation, (1, E), if the network uses one."""
        return self.net.embed(image.to(self.device)) if hasattr(self.net, 'embed') else None

    def call(self, image: Tensor, embedding: Tensor | None) -> Tensor:
        """(1, 3, h, w) -> (1, 3, scale * h, scale * w), float32 on the CPU."""
        context = {} if embedding is None else {'embedding': embedding}
        dtype = torch.float16 if self.device.type == 'cuda' else torch.bfloat16
        # Not net.half(): under autocast the input that the network adds in the end stays float32.
        with torch.autocast(self.device.type, dtype, enabled=self.half):
            return self.net(image.to(self.device), **context).float().cpu()

    def call_eight_ways(self, image: Tensor, embedding: Tensor | None, means: MeansOverTiles) -> Tensor:
        """The mean of `call` for the eight flips and rotations, each turned back."""
        total = 0
        for turns in range(4):
            for flipped in (False, True):
                means.variant = turns, flipped
                turned = image.rot90(turns, (2, 3))
                output = self.call(turned.flip(3) if flipped else turned, embedding)
                total = total + (output.flip(3) if flipped else output).rot90(-turns, (2, 3))
        return total / 8

    def fitting_tile(self, height: int, width: int) -> int:
        """The tile for which `SHARE` of the free memory is enough, `PROBE` or more; 0 if the whole image fits."""
        if height * width <= SMALL**2:
            return 0
        pixels = free_memory(self.device) * SHARE / self.bytes_per_pixel
        return 0 if height * width <= pixels else max(math.isqrt(int(pixels)), PROBE)

    @cached_property
    def bytes_per_pixel(self) -> float:
        """What the network needs for each pixel of its input, measured on a small image."""
        side = math.ceil(PROBE / self.net.stride) * self.net.stride
        image = torch.zeros(1, 3, side, side)
        embedding = self.embed(image)
        with PeakMemory(self.net.state_dict().values()) as memory:
            self.call(image, embedding)
        return memory.peak / side**2


def check_image(image: np.ndarray | Tensor) -> None:
    """Raises ValueError unless it is one of the kinds that `Restorer.restore` takes."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype not in (np.uint8, np.uint16):
            raise ValueError(f'image: {image.dtype} {image.shape}; an array has to be (H, W, 3) of uint8 or uint16')
    elif not isinstance(image, Tensor):
        raise ValueError(f'image: a {type(image).__name__}; it has to be a NumPy array or a tensor')
    elif image.dim() not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(f'image: {image.dtype} {tuple(image.shape)}; a tensor has to be ([B,] 3, H, W) of floats')
    elif image.amax() > 2:
        raise ValueError(f'image: values up to {image.amax():g}; those of a tensor have to be in [0, 1]')


def collect_array(bands: Iterator[Tensor], image: np.ndarray, scale: int) -> np.ndarray:
    """The bands as one (H, W, 3) array of image's type, each rounded as it comes."""
    result = np.empty((image.shape[0] * scale, image.shape[1] * scale, 3), image.dtype)
    top = 0
    for band in bands:
        bottom = top + band.shape[1]
        result[top:bottom] = (band * np.iinfo(image.dtype).max).round().permute(1, 2, 0).numpy()
        top = bottom
    return result
