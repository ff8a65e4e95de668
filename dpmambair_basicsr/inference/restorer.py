"""Restore images with a checkpoint: `load` and `Restorer`. Whole images or tiles, uint8, uint16 or float."""

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dpmambair_basicsr.archs.blocks import MeansOverTiles
from dpmambair_basicsr.archs.recognition import network_options, own_names
from dpmambair_basicsr.files import hub
from dpmambair_basicsr.files.checkpoints import WRAPPINGS, differences, read_checkpoint, select_weights
from dpmambair_basicsr.files.images import to_float, to_tensor
from dpmambair_basicsr.inference.degradation_classifier import DegradationClassifier, Finding
from dpmambair_basicsr.inference.memory import PeakMemory, free_memory, is_out_of_memory, out_of_memory
from dpmambair_basicsr.inference.tiled_network import OVERLAP, TiledNetwork
from dpmambair_basicsr.ops import pad_to_multiple, use_backend
from dpmambair_basicsr.ops.selective_scan.backend import check_backend
from dpmambair_basicsr.registry import (
    TooManyPartsError,
    arguments_of,
    describe,
    is_ours,
    look_up,
    make_without_storage,
    registered,
    told_by_weights,
)

LOGGER = logging.getLogger('dpmambair_basicsr')
# The weights bundled with the package; the README.md beside them is the model card.
SHIPPED_WEIGHTS = Path(__file__).parents[1] / 'weights' / 'dpmambair_small_trial.safetensors'
SMALL = 256  # pixels: smaller images are tiled on request only
PROBE = 64  # pixels: size of the image whose memory is measured
REPEATED = 4  # limit of a file's tensors, in multiples of its bytes: tensors may share storage
PARTS_PER_TENSOR = 4  # modules and parameters; ours have 2
BUDGET = 2**32  # bytes of a network's tensors in one tile; up to 1.5 times as much with the kernels' allocations
STEP = 64  # pixels


def load(
    weights: str | Path | None = None,
    *,
    network: dict | None = None,
    device: str = 'auto',
    half: bool = False,
    scan_backend: str | None = None,
) -> 'Restorer':
    """A network with trained weights; see `Restorer.restore`.

    Args:
        weights: a checkpoint, net_g_*.pth or a .safetensors file, or `hf:user/name`, which is downloaded from the
            Hugging Face Hub, see `files.hub`. The averaged weights, `params_ema`, are used if there are any, otherwise
            `params`, otherwise the other programs' keys in `WRAPPINGS`, otherwise the file itself as a state dict.
            None: `SHIPPED_WEIGHTS`.
        network: `network_g` of the option file, which overrides the file's own. Without either, a VmambaIR or DPMambaIR
            is recognised by names and shapes, see `archs.recognition`, and the log says so.
        device: 'auto' (the first that PyTorch finds: CUDA, Apple's MPS, the CPU), 'cpu', 'mps', 'cuda' or 'cuda:<n>'.
        half: compute in half precision, float16 on a GPU, bfloat16 on a CPU: half the memory, about two digits.
        scan_backend: a name in `dpmambair_basicsr.ops.selective_scan.BACKENDS`; None: see `use_backend`, by default the
            best available.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming file and key: the file is not a checkpoint or holds no options, or its weights do not match
            them; the network does not map one RGB image to another; there is no such device; the checkpoint's own
            options name a network that is not ours, or describe one larger than the file. A BackendError if the backend
            is unknown or cannot run on the device.
    """
    weights = hub.local_file(str(SHIPPED_WEIGHTS if weights is None else weights))
    device = choose_device(device)
    check_backend(scan_backend, 'scan_backend', device)
    checkpoint = read_checkpoint(weights)
    net = network_of(weights, checkpoint, network)
    classifier = read_classifier(weights, checkpoint)
    try:
        return Restorer(net, device, half, scan_backend, classifier)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = ' '.join(str(error).split())
        raise ValueError(
            f'{weights}: network_g.type: {type(net).__name__} does not map one RGB image to another ({reason})'
        ) from error


def load_network(weights: str | Path, network: dict | None = None) -> nn.Module:
    """The network of a checkpoint, on the CPU; arguments and errors as in `load`."""
    return network_of(str(weights), read_checkpoint(str(weights)), network)


def network_of(weights: str, checkpoint: dict, network: dict | None) -> nn.Module:
    """`load_network` for a file that has been read."""
    state_dict = own_names(select_weights(weights, checkpoint, *WRAPPINGS))
    options = checkpoint.get('network_g') if network is None else network
    if options is None:
        options = recognised(weights, state_dict)
    if not isinstance(options, dict):
        raise ValueError(
            f"{weights}: has no key 'network_g', the options of its network, and is not recognised as a VmambaIR or "
            "DPMambaIR; give them, as --opt with its option file or as load(..., network={'type': ...})"
        )
    known = find_network(f'{weights}: network_g.type', options.get('type'))
    if network is None and not is_ours(known):
        raise ValueError(
            f'{weights}: network_g.type: {options["type"]} is not a network of dpmambair_basicsr, and a checkpoint may '
            'name only these; pass its options explicitly, as --opt or load(..., network=...)'
        )
    arguments = arguments_of(options) | told_by_weights(known, options, state_dict, weights)
    return build(known, arguments, state_dict, weights)


def recognised(weights: str, state_dict: dict[str, Tensor]) -> dict | None:
    """`network_options`, logged, since some of them are assumptions."""
    try:
        options = network_options(state_dict)
    except ValueError as error:
        raise ValueError(f'{weights}: {error}') from None
    if options is not None:
        seen = ', '.join(f'{name} {value}' for name, value in options.items() if name in ('dim', 'scale'))
        guess = f'; channel_fusion {options["channel_fusion"]!r} is assumed' if 'channel_fusion' in options else ''
        LOGGER.warning(f'{weights}: holds no network_g; by names and shapes it is a {options["type"]}, {seen}{guess}')
    return options


def find_network(path: str, name: str | None) -> type:
    """The class of a network: ours, or else BasicSR's, which is imported only for this.

    Raises:
        ValueError: naming the key at `path`: there is no such network, or BasicSR, which may have it, is not installed.
    """
    with_basicsr = name in registered('ARCH') or importlib.util.find_spec('basicsr') is not None
    if name not in registered('ARCH') and with_basicsr:
        importlib.import_module('basicsr')  # registers its networks, and ours there
    target, problems = look_up(registered('ARCH'), path, name)
    if problems:
        raise ValueError(problems[0] + ('' if with_basicsr else '; BasicSR, which may have it, is not installed'))
    return target


def build(target: type, arguments: dict, state_dict: dict[str, Tensor], weights: str) -> nn.Module:
    """The network with its weights, float32. Ours are built on the meta device, since options can demand any memory.

    Raises:
        ValueError: naming the file: options that do not match its weights, or tensors larger than the file.
    """
    if sum(value.nbytes for value in state_dict.values()) > REPEATED * Path(weights).stat().st_size:
        raise ValueError(f'{weights}: its tensors would take more than {REPEATED} times the bytes of the file')
    ours = is_ours(target)
    try:
        net = (
            make_without_storage(target, arguments, most=PARTS_PER_TENSOR * len(state_dict) + 1000)
            if ours
            else target(**arguments)
        )
    except TooManyPartsError as error:
        raise ValueError(f'{weights}: network_g: {error}, too many for its {len(state_dict)} tensors') from error
    except Exception as error:  # any: constructors fail in many ways on foreign options
        raise ValueError(describe(f'{weights}: network_g', error)) from error
    if report := differences(net, state_dict):
        raise ValueError(f'{weights}: {report}')
    net.load_state_dict(state_dict, assign=ours)  # ours have no tensors outside the state dict
    return net.float()


def read_classifier(weights: str, checkpoint: dict) -> DegradationClassifier | None:
    values = checkpoint.get('degradation_classifier')
    try:
        return None if values is None else DegradationClassifier.from_plain(values)
    except ValueError as error:
        raise ValueError(f"{weights}: its key 'degradation_classifier' {error}") from None


def choose_device(name: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == 'auto':
        return accelerator or torch.device('cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'device: must be one of auto, cpu, cuda, mps, got {name!r}') from None
    if device.type != 'cpu' and (accelerator is None or accelerator.type != device.type):
        raise ValueError(f'device: {name}, but PyTorch finds no {device.type.upper()} device; choose auto or cpu')
    return device


class Restorer(TiledNetwork):
    """A network that maps an RGB image to another, for images of any size. Thread-safe.

    Args:
        net: see `TiledNetwork`; it is moved to the device, and its parameters are frozen.
        device: where it runs.
        half, scan_backend: see `load`.
        classifier: of degradations, None if the checkpoint has none.

    Attributes:
        scale: output pixels per input pixel.
    """

    def __init__(
        self,
        net: nn.Module,
        device: torch.device,
        half: bool = False,
        scan_backend: str | None = None,
        classifier: DegradationClassifier | None = None,
    ):
        super().__init__(net.to(device).eval().requires_grad_(False), device, scale=1, half=half)
        self.scan_backend = scan_backend
        self.classifier = classifier
        side = math.ceil(16 / self.stride) * self.stride
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
        strength: float = 1,
        embedding: Tensor | None = None,
        self_ensemble: bool = False,
        one_pass: bool = False,
        return_spread: bool = False,
        means: MeansOverTiles | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | Tensor | tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]:
        """The restored image, `scale` times as large.

        Tiles bound the memory: besides the image in float32 and the result, it needs one row of result tiles and the
        network's memory for one tile. For their effect on the result, see `TiledNetwork`.

        Args:
            image: (H, W, 3) RGB uint8 or uint16 array, or (3, H, W) or (B, 3, H, W) float tensor in [0, 1].
            tile: tile size in pixels of the image, rounded down to a multiple of the network's stride. 0: no tiles.
                None: by the size of the image, see `fitting_tile`.
            overlap: minimum overlap of neighbouring tiles in pixels, up to half a tile; they are blended across it.
            strength: 1: the network's result; 0: the image; in between, a blend. Only for networks of scale 1.
            embedding: (1, E) that tells the network what to undo: `embedding_of` another image, or
                `classifier.embedding_of` a kind. None: `embedding_for` the image.
            self_ensemble: average the results for the eight flips and rotations, in eight times the time.
            one_pass: tiles in half the time, each with its own means.
            return_spread: as self_ensemble, and return how far the eight disagree: a pair of the image and ([B,] H, W)
                float32, the standard deviation over the three colours, in [0, 1].
            means: of several images of one scene, see `TiledNetwork.bands`.
            progress: called with the number of finished tiles and the total, over both passes.

        Returns:
            Array or tensor like `image`, on the same device, clamped to the type's range or to [0, 1].

        Raises:
            ValueError: wrong shape or type, or an empty image; a tile smaller than the network's stride; a strength
                outside [0, 1], or a blend of different sizes; an output that is not finite.
            OutOfMemory: naming the image's size, the tile, and a smaller one.
        """
        check_image(image)
        if isinstance(image, Tensor) and image.dim() == 4:
            options = {'tile': tile, 'overlap': overlap, 'strength': strength, 'embedding': embedding}
            options |= {'self_ensemble': self_ensemble, 'one_pass': one_pass, 'means': means, 'progress': progress}
            parts = [self.restore(part, **options, return_spread=return_spread) for part in image]
            return tuple(map(torch.stack, zip(*parts, strict=True))) if return_spread else torch.stack(parts)
        if not 0 <= strength <= 1 or strength < 1 and self.scale > 1:
            limits = '0 to 1' if self.scale == 1 else f'1, since results are {self.scale} times as large as the images'
            raise ValueError(f'strength: {strength}; expected {limits}')
        if embedding is None:
            embedding = self.embedding_for(image)
        is_array = isinstance(image, np.ndarray)
        source = to_tensor(to_float(image)) if is_array else image.float().cpu()
        h, w = source.shape[1:]
        size = self.fitting_tile(h, w) if tile is None else tile
        if tile is None and self.needed(size**2 or h * w) > free_memory(self.device):
            raise out_of_memory(h, w, size, 'tile={0} (--tile {0})')
        try:
            bands = self.bands(
                source[None],
                tile=size,
                overlap=overlap,
                embedding=embedding,
                self_ensemble=self_ensemble,
                spread=return_spread,
                one_pass=one_pass,
                means=means,
                progress=progress,
            )
            spreads = []
            bands = self.finished(bands, source, strength, spreads)
            result = collect_array(bands, image, self.scale) if is_array else torch.cat(list(bands), dim=1).to(image)
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(h, w, size, 'tile={0} (--tile {0})') from None
            raise
        if not return_spread:
            return result
        spread = torch.cat(spreads)
        return result, spread.numpy() if is_array else spread.to(image.device)

    def finished(
        self, bands: Iterator[Tensor], source: Tensor, strength: float, spreads: list[Tensor]
    ) -> Iterator[Tensor]:
        """Bands (1, 3 or 4, rows, W) -> (3, rows, W) in [0, 1], blended with source; a fourth channel to `spreads`.

        Raises:
            ValueError: a band is not finite.
        """
        top = 0
        for (band,) in bands:
            if not band.isfinite().all():
                raise ValueError(f'the output of the network is not finite{" in half precision" if self.half else ""}')
            spreads.extend(strength * part for part in band[3:])
            colours = band[:3].clamp(0, 1)
            bottom = top + colours.shape[1]
            yield colours if strength == 1 else torch.lerp(source[:, top:bottom], colours, strength)
            top = bottom

    def embedding_of(self, image: np.ndarray | Tensor) -> Tensor | None:
        """The network's own embedding of an image's degradation, (B, E); None if the network has none.

        Args:
            image: as in `restore`.

        Raises:
            ValueError: wrong shape or type.
        """
        check_image(image)
        source = to_tensor(to_float(image)) if isinstance(image, np.ndarray) else image.float().cpu()
        embedding = self.embed(pad_to_multiple(source.reshape(-1, *source.shape[-3:]), self.stride))
        return None if embedding is None else embedding.cpu()

    def embedding_for(self, image: np.ndarray | Tensor, finding: Finding | None = None) -> Tensor | None:
        """The embedding that `restore` uses by default; None: the image's own.

        For the classes in the classifier's `steered`, the mean embedding of the class found: an image unlike all that
        the extractor has seen can get an embedding of something else, such as darkness. The paper has no classes: our
        inference.

        Args:
            image: as in `restore`, but a single one.
            finding: of the image, if known.
        """
        if self.classifier is None or not self.classifier.steered:
            return None
        finding = self.find(image) if finding is None else finding
        kind = None if finding is None else finding.kind
        return self.classifier.embedding_of(kind) if kind in self.classifier.steered else None

    def find(self, image: np.ndarray | Tensor) -> Finding | None:
        """What is wrong with an (H, W, 3) uint8 or uint16 array, or (3, H, W) floats; None without a classifier."""
        if self.classifier is None:
            return None
        is_array = isinstance(image, np.ndarray)
        return self.classifier.find(to_float(image) if is_array else image.float().cpu().permute(1, 2, 0).numpy())

    def call(self, image: Tensor, embedding: Tensor | None, means: MeansOverTiles | None = None) -> Tensor:
        with use_backend(self.scan_backend):
            return super().call(image, embedding, means)

    def fitting_tile(self, height: int, width: int) -> int:
        """The default tile; 0: the whole image. The same on every machine.

        The largest multiple of `STEP` for which the network's tensors fit into `BUDGET` bytes.
        """
        if height * width <= SMALL**2:
            return 0
        pixels = BUDGET / self.bytes_per_pixel
        return 0 if height * width <= pixels else max(int(pixels**0.5) // STEP * STEP, STEP)

    def needed(self, pixels: int) -> float:
        """Bytes for an image or tile of `pixels` pixels; 0 for those that fit on every machine."""
        return self.bytes_per_pixel * pixels if pixels > SMALL**2 else 0

    @cached_property
    def bytes_per_pixel(self) -> float:
        """Bytes per input pixel of the network, measured on a small image with a backend that every machine has."""
        side = math.ceil(PROBE / self.stride) * self.stride
        image = torch.zeros(1, 3, side, side)
        with use_backend('torch'):
            embedding = self.embed(image)
            with PeakMemory(self.net.state_dict().values()) as memory:
                super().call(image, embedding)
        return memory.peak / side**2


def check_image(image: np.ndarray | Tensor) -> None:
    """Raise ValueError unless `Restorer.restore` supports the image's type, shape and range."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype not in (np.uint8, np.uint16):
            raise ValueError(f'image: {image.dtype} {image.shape}; an array must be (H, W, 3) of uint8 or uint16')
    elif not isinstance(image, Tensor):
        raise ValueError(f'image: a {type(image).__name__}; it must be a NumPy array or a tensor')
    elif image.dim() not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(f'image: {image.dtype} {tuple(image.shape)}; a tensor must be ([B,] 3, H, W) of floats')
    elif image.amax() > 2:
        raise ValueError(f'image: values up to {image.amax():g}; the values of a tensor must be in [0, 1]')


def collect_array(bands: Iterator[Tensor], image: np.ndarray, scale: int) -> np.ndarray:
    """The bands as one (H, W, 3) array of image's type, each rounded on arrival."""
    result = np.empty((image.shape[0] * scale, image.shape[1] * scale, 3), image.dtype)
    top = 0
    for band in bands:
        bottom = top + band.shape[1]
        result[top:bottom] = (band * np.iinfo(image.dtype).max).round().permute(1, 2, 0).numpy()
        top = bottom
    return result
