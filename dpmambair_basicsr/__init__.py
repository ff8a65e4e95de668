"""Mamba-based image restoration (VmambaIR, DPMambaIR) for BasicSR.

Importing this package is all it takes: as soon as BasicSR has been imported, before or after, `register` runs. (BasicSR
1.4.2 has to come after: without `patches.imports` it cannot be imported beside today's torchvision.)
Neither torch nor basicsr is imported from here, so `dpmambair_basicsr.ops` can be used without BasicSR.
"""

from dpmambair_basicsr.patches import imports

__version__ = '0.1.0'


def register():
    """Registers our networks, datasets, losses, metrics and models with BasicSR. Idempotent.

    Returns what of them is available there and what not, with reasons: `dpmambair_basicsr.registration.Registration`.
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
    """A trained network: `load('net_g_latest.pth').restore(image)`. Without a file, the one that comes with the
    package. See `dpmambair_basicsr.inference.restorer`."""
    from dpmambair_basicsr.inference import restorer

    return restorer.load(weights, network=network, device=device, half=half, scan_backend=scan_backend)


imports.prepare()
imports.when_basicsr_is_imported(register)
