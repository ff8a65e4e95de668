from functools import lru_cache

import numpy as np
import torch

from dpmambair_basicsr.files.errors import MissingLibraryError, OptionError
from dpmambair_basicsr.metrics.tensors import to_tensor
from dpmambair_basicsr.registry import METRIC_REGISTRY, did_you_mean

OF_SETS = ('fid', 'inception_score')  # pyiqa's metrics of folders of images


def configurations() -> dict[str, dict]:
    """pyiqa's metrics by name; `metric_mode` is FR for full-reference metrics, NR for the others.

    Raises:
        MissingLibraryError: with the install command.
    """
    try:
        from pyiqa.default_model_configs import DEFAULT_CONFIGS
    except ImportError as error:
        raise MissingLibraryError(f'calculate_iqa needs pyiqa ({error}): pip install pyiqa') from error
    return DEFAULT_CONFIGS


def compares(metric: str) -> bool:
    """Whether a metric of pyiqa needs the clean image."""
    return configurations()[metric].get('metric_mode') == 'FR'


def check_iqa(metric: str, better: str = 'higher') -> None:
    """Raises OptionError naming the key that is wrong; MissingLibraryError without pyiqa."""
    known = {name: of for name, of in configurations().items() if not any(part in name for part in OF_SETS)}
    if metric not in known:
        raise OptionError(f'metric: {metric} must be a pyiqa metric of single images{did_you_mean(metric, known)}')
    right = 'lower' if known[metric].get('lower_better') else 'higher'
    if better != right:
        raise OptionError(
            f'better: must be {right} for {metric}, BasicSR selects the best network by it; default: higher'
        )


@lru_cache
def network(metric: str, device: torch.device) -> torch.nn.Module:
    """pyiqa's network, whose weights it may download."""
    configurations()
    import pyiqa

    return pyiqa.create_metric(metric, device=device)


def device() -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


@METRIC_REGISTRY.register()
def calculate_iqa(
    img: np.ndarray,
    img2: np.ndarray | None = None,
    *,
    metric: str,
    crop_border: int = 0,
    better: str = 'higher',
) -> float:
    """Any metric of the package pyiqa, for an image or for an image and its ground truth, as defined there.

    Its psnry is 1.32 dB lower than BasicSR's PSNR on the Y channel, whose range is 219 steps instead of pyiqa's 255.

    Args:
        img, img2: (H, W, 3) BGR or (H, W) grey in [0, 255], as BasicSR passes them.
        metric: pyiqa's name: niqe, musiq, topiq_fr, ... For many, pyiqa downloads weights on first use, during the
            validation of the option file.
        crop_border: pixels cropped at each edge.
        better: higher or lower. BasicSR also reads this option, and selects the best network by it.

    Raises:
        MissingLibraryError: pyiqa is not installed.
        OptionError: pyiqa has no such metric, or `better` is wrong for it.
        ValueError: images of different sizes, or no clean image for a full-reference metric.
    """
    check_iqa(metric, better)
    pair = [img] if not compares(metric) else [img, img2]
    if pair[-1] is None:
        raise ValueError(f'calculate_iqa: {metric} needs a clean image, and there is none')
    if pair[-1].shape != img.shape:
        raise ValueError(f'{metric} needs images of the same size, got {img.shape} and {pair[-1].shape}')
    with torch.no_grad():
        return float(network(metric, device())(*(to_tensor(image, crop_border).to(device()) for image in pair)))
