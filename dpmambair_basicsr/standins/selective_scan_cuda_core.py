"""VMamba's extension module selective_scan_cuda_core; nrows, which splits the work of its kernel, has no effect."""

from dpmambair_basicsr.standins import extensions

__all__ = ['bwd', 'fwd']


def fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows):
    """See `extensions.forward`."""
    return extensions.forward(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows):
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    return extensions.backward(u, delta, A, B, C, D, None, delta_bias, dout, delta_softplus)[:7]
