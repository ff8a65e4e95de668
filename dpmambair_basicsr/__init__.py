"""Mamba-based image restoration (VmambaIR, DPMambaIR) for BasicSR.

Importing this package is enough: `register` runs as soon as BasicSR is imported, whichever comes first. (BasicSR 1.4.2
has to come second: without `patches.imports` it cannot be imported with current torchvision.)
This module imports neither torch nor basicsr, so `dpmambair_basicsr.ops` can be used without BasicSR.
"""

from dpmambair_basicsr.patches import imports

__version__ = '0.1.0'


def register():
    """Registers our networks, datasets, losses, metrics and models with BasicSR. Idempotent.

    Returns what is available, and what is not and why: `dpmambair_basicsr.registration.Registration`.
    """
    from dpmambair_basicsr import registration

    return registration.register()


def load(
    weights=None,
    *,
    network: dict | None = None,
    device: str = 'auto',
    half: bool = False,
    scan_backend: str | None = None,
):
    """A trained network: `load('net_g_latest.pth').restore(image)`. Without a file, the one bundled with the
    package. See `dpmambair_basicsr.inference.restorer`."""
    from dpmambair_basicsr.inference import restorer

    return restorer.load(weights, network=network, device=device, half=half, scan_backend=scan_backend)


imports.prepare()
imports.when_basicsr_is_imported(register)
