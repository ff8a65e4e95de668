"""Quality of a degradation extractor: "Rec. PSNR" and "Cls. Acc." of v3's Table VII."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpmambair_basicsr.archs import DegradationAutoencoder
from dpmambair_basicsr.files.images import to_float, to_tensor
from dpmambair_basicsr.inference.degradation_classes import Classes

Pairs = dict[str, list[tuple[Path, Path]]]  # degradation -> (degraded, clean)


@torch.no_grad()
def reconstruct(net: DegradationAutoencoder, degraded: np.ndarray, clean: np.ndarray) -> tuple[float, Tensor]:
    """PSNR of the degraded image that stage 1 reconstructs from the clean one, and the embedding used for it.

    Args:
        degraded, clean: (H, W, 3) RGB, uint8 or uint16.

    Returns:
        dB, for 8-bit RGB images; (1, E), of unit length.
    """
    wanted, source = (to_tensor(to_float(image))[None].to(next(net.parameters()).device) for image in (degraded, clean))
    embedding = net.embed(source, wanted)
    made = net(source, embedding=embedding)
    wanted, made = ((image.clamp(0, 1) * 255).round() for image in (wanted, made))
    error = F.mse_loss(made.double(), wanted.double()).item()
    psnr = 20 * math.log10(255) - 10 * math.log10(error) if error else math.inf
    return psnr, F.normalize(embedding, dim=1).cpu()


def accuracies(embeddings: dict[str, list[Tensor]]) -> dict[str, float]:
    """Degradation -> share of its images that `Classes` assigns to it when left out of their class's mean.

    The paper does not say how it classifies: this is our choice.
    """
    classes = Classes.of(embeddings)
    right = classes.recognised()
    return {name: right[classes.labels == k].float().mean().item() for k, name in enumerate(classes.names)}
