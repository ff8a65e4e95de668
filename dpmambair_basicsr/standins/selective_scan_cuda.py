"""mamba_ssm's extension module selective_scan_cuda."""

from dpmambair_basicsr.standins import extensions

__all__ = ['bwd', 'fwd']


def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """See `extensions.forward`."""
    return extensions.forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], with z also dz (into `dz` if given) and, if asked for, y * silu(z)."""
    *gradients, dz_new = extensions.backward(u, delta, A, B, C, D, z, delta_bias, dout, delta_softplus)
    if z is None:
        return gradients
    gradients.append(dz_new if dz is None else dz.copy_(dz_new))
    if recompute_out_z:
        gradients.append(extensions.forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[2])
    return gradients
