from functools import lru_cache

import numpy as np
import torch

from dpmambair_basicsr.losses.lpips_network import build_lpips
from dpmambair_basicsr.metrics.tensors import to_tensor
from dpmambair_basicsr.registry import METRIC_REGISTRY


@lru_cache
def _network(net: str, weights: str | None, device: torch.device):
    return build_lpips(net, weights).to(device)


@METRIC_REGISTRY.register()
def calculate_lpips(
    img: np.ndarray,
    img2: np.ndarray,
    crop_border: int = 0,
    net: str = 'alex',
    weights: str | None = None,
    better: str = 'lower',
) -> float:
    """LPIPS (Zhang et al. 2018) between two images, 0 for equal ones; lower is better.

    Args:
        img, img2: (H, W, 3) BGR or (H, W) grey in [0, 255], as BasicSR passes them.
        crop_border: pixels left out at each edge.
        net, weights: the backbone and its file, see `build_lpips`. 'alex' is the usual choice for reporting.
        better: must be 'lower'. BasicSR reads this option too, and without it considers the highest value the best.

    Raises:
        ValueError: images of different sizes, `better` other than 'lower', or an unknown or wrong backbone.
        FileNotFoundError: no backbone file.
    """
    if img.shape != img2.shape:
        raise ValueError(f'LPIPS needs images of the same size, got {img.shape} and {img2.shape}')
    if better != 'lower':
        raise ValueError(f"calculate_lpips: better must be 'lower', got {better!r}")
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    with torch.no_grad():
        pair = (to_tensor(image, crop_border).to(device) for image in (img, img2))
        return _network(net, weights, device)(*pair, normalize=True).item()
