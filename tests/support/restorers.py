"""Small networks of both kinds, ready to restore, and an image for them."""

import cv2
import numpy as np
import torch

import dpmambair_basicsr
from dpmambair_basicsr.archs import DPMambaIR
from dpmambair_basicsr.inference.restorer import Restorer

SMALL = {'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
VMAMBAIR = {'type': 'VmambaIR', 'dim': 4, **SMALL}
DPMAMBAIR = {
    'type': 'DPMambaIR',
    'dim': 8,
    **SMALL,
    'd_inner': [8, 8, 8, 8],
    'embed_dim': 8,
    'extractor_channels': [4, 4, 4],
}
CPU = torch.device('cpu')


def restorer_of(network, seed=0, **changes):
    torch.manual_seed(seed)
    options = {**network, **changes}
    net = {'VmambaIR': dpmambair_basicsr.archs.VmambaIR, 'DPMambaIR': DPMambaIR}[options.pop('type')](**options)
    return Restorer(net, CPU)


def photo(height, width, seed=0):
    """Smooth in places, with edges and noise; (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.random((5, 6, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    image[height // 3 : height // 2, width // 4 : width // 2] *= 0.5
    return (255 * (image + rng.normal(0, 0.02, image.shape)).clip(0, 1)).astype(np.uint8)
