"""Layer norm over channels and depthwise 3x3 convolutions of images in channels_last: which code computes it.

On a GPU on which scans are computed by the backend 'cuda', by kernels from the same place, `selective_scan/cuda`; where
another backend is asked for, or anywhere else, by PyTorch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmambair_basicsr.ops.selective_scan.backend import backend_in_force, get_backend

MAX_CHANNELS = 1024  # of a layer norm by a kernel, which keeps a pixel in registers


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Of the channels of each pixel: (b, c, h, w), (c,) parameters -> (b, c, h, w) in channels_last.

    Under autocast a kernel gives x's type, PyTorch fp32.
    """
    pixels = x.permute(0, 2, 3, 1)  # a view, not a copy
    if x.shape[1] > MAX_CHANNELS or not kernels_run(x):
        return norm(pixels).permute(0, 3, 1, 2)
    from dpmambair_basicsr.ops.selective_scan.cuda import pixels as kernels

    return kernels.layer_norm(pixels, norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, c, h, w) by (c, 1, 3, 3) and (c,), with zeros around the image -> (b, c, h, w); autocast applies."""
    if not kernels_run(x):
        return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    from dpmambair_basicsr.ops.selective_scan.cuda import pixels as kernels

    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return kernels.depthwise(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def kernels_run(x: Tensor) -> bool:
    """Whether our kernels compute this image. Not in a trace, in which FLOPs are counted."""
    is_traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return x.numel() > 0 and not is_traced and _kernels_run(x.device, x.dtype)


def _kernels_run(device, dtype):
    backend = backend_in_force() or get_backend('cuda')
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and backend.name == 'cuda' and backend.why_unavailable(device, torch.float32) is None


# torch.compile takes the result as it is and does not look inside.
_kernels_run._dynamo_marked_constant = True
