"""VMamba's extension module selective_scan_cuda_oflex: selective_scan_cuda_core with optional fp32 outputs."""

from dpmambair_basicsr.standins import extensions
from dpmambair_basicsr.standins.selective_scan_cuda_core import bwd

__all__ = ['bwd', 'fwd']


def fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, out_float):
    """See `extensions.forward`."""
    return extensions.forward(u, delta, A, B, C, D, None, delta_bias, delta_softplus, out_float)
