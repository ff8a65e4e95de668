"""Building blocks shared by the networks. They depend only on torch and `dpmambair_basicsr.ops`."""

from dpmambair_basicsr.archs.blocks.checks import one_of
from dpmambair_basicsr.archs.blocks.effn import EFFN
from dpmambair_basicsr.archs.blocks.image_mean import ImageMean, MeansOverTiles
from dpmambair_basicsr.archs.blocks.layer_norm import LayerNorm, norm_and_gate
from dpmambair_basicsr.archs.blocks.planar_scan import PlanarScan, directional_scan, log_uniform_delta_bias
from dpmambair_basicsr.archs.blocks.split_conv import convolve_depthwise, convolve_halves, silu_depthwise
from dpmambair_basicsr.archs.blocks.unet import UNet

__all__ = [
    'EFFN',
    'ImageMean',
    'LayerNorm',
    'MeansOverTiles',
    'PlanarScan',
    'UNet',
    'convolve_depthwise',
    'convolve_halves',
    'directional_scan',
    'log_uniform_delta_bias',
    'norm_and_gate',
    'one_of',
    'silu_depthwise',
]
