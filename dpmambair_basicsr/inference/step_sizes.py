"""Step sizes of the scans of DPMambaIR, image by image: what P_delta changes (v3, Fig. 5)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmambair_basicsr.archs.dpmambair_arch import DPSSModule


def step_size(module: DPSSModule, features: Tensor, embedding: Tensor | None) -> Tensor:
    """Delta_dp of Eq. 8 for the scan of `features` by `DPSSModule.scan`, mean over pixels, channels and directions.

    Args:
        features: (B, D, H, W), the input of the scan.
        embedding: (B, E), or None for a network without one.

    Returns:
        (B,)
    """
    rank = module.dt_projs_weight.shape[2]
    low = torch.einsum('krd,bdhw->bkrhw', module.x_proj_weight[:, :rank], features)
    scale = None
    if module.modulation is not None:
        factors, scale = module.modulation(embedding)
        low = low * factors[:, None, :rank, None, None]
    delta = torch.einsum('kdr,bkrhw->bkdhw', module.dt_projs_weight, low)
    mean = F.softplus(delta + module.dt_projs_bias[..., None, None]).mean(dim=(1, 2, 3, 4))
    return mean if scale is None else mean * scale


@contextmanager
def recorded_step_sizes(net: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """{name of a DPSS module: `step_size` of each call}, filled in while the network runs, on whole images only."""
    found, hooks = {}, []
    for name, module in net.named_modules():
        if isinstance(module, DPSSModule):
            found[name] = []
            hooks.append(record(module, found[name]))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def record(module: DPSSModule, sizes: list[Tensor]):
    """A hook that appends to `sizes`; what was scanned is computed again, because it exists inside the module only."""

    def after(_, arguments, __) -> None:
        x, *rest = arguments
        embedding = rest[0] if rest else None
        sizes.append(step_size(module, module.scanned_and_gate(x, embedding)[0], embedding))

    return module.register_forward_hook(after)
