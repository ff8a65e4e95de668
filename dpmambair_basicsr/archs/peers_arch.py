"""Peers of DPMambaIR for studies: the blocks of Restormer and NAFNet in the U-Net of VmambaIR and DPMambaIR.

Our own definitions, after the papers, for comparisons at equal size and training; incompatible with published weights.
Shapes: B batch, C width of a stage, H W height width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmambair_basicsr.archs.blocks import EFFN, ImageMean, LayerNorm, UNet, convolve_depthwise, one_of
from dpmambair_basicsr.ops import pad_to_multiple
from dpmambair_basicsr.registry import ARCH_REGISTRY


class PeerUNet(UNet):
    """The U-Net from image to image: the output is added to the input and initially close to it, as in DPMambaIR."""

    def __init__(
        self,
        channels: tuple[int, int],
        dim: int,
        num_blocks: Sequence[int],
        num_refinement_blocks: int,
        make_block: Callable[[int], nn.Module],
    ):
        inp_channels, out_channels = channels
        one_of('out_channels', out_channels, (inp_channels,))
        super().__init__(inp_channels, dim, num_blocks, num_refinement_blocks, False, make_block)
        self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=False)
        with torch.no_grad():
            self.output.weight.mul_(0.01)

    def forward(self, lq: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in [0, 1], any H and W -> (B, 3, H, W), about [0, 1]."""
        h, w = lq.shape[-2:]
        lq = pad_to_multiple(lq, self.stride)
        return (lq + self.output(self.forward_features(lq)))[..., :h, :w]


class ChannelAttention(nn.Module):
    """Multi-Dconv head transposed attention of Restormer (Zamir et al. 2022, Sec. 3.1): attention between channels.

    Args:
        channels: C, a multiple of `heads`.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        heads = self.temperature.shape[0]
        query, key, value = (
            part.flatten(2).unflatten(1, (heads, -1))
            for part in convolve_depthwise(self.dwconv, self.qkv(x)).chunk(3, dim=1)
        )  # (B, heads, C / heads, H W) each
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT * self.temperature
        return self.project_out((scores.softmax(dim=-1) @ value).reshape(x.shape))


class AttentionBlock(nn.Module):
    """x + attention(norm(x)); x + GDFN(norm(x)), which is `EFFN` (Restormer, Fig. 2)."""

    def __init__(self, channels: int, heads: int, ffn_expansion_factor: float):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn = ChannelAttention(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.ffn = EFFN(channels, ffn_expansion_factor, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class NonlinearActivationFreeBlock(nn.Module):
    """The block of NAFNet (Chen et al. 2022, Fig. 3c): products of channel halves instead of activations."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.dwconv = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.mean = ImageMean()
        self.attend = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        self.norm2 = LayerNorm(channels)
        self.ffn_expand = nn.Conv2d(channels, 2 * channels, 1)
        self.ffn_project = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        y = gated(convolve_depthwise(self.dwconv, self.expand(self.norm1(x))))
        x = x + self.beta * self.project(y * self.attend(self.mean(y)))
        return x + self.gamma * self.ffn_project(gated(self.ffn_expand(self.norm2(x))))


def gated(x: Tensor) -> Tensor:
    """NAFNet's SimpleGate: (B, 2C, H, W) -> (B, C, H, W)."""
    first, second = x.chunk(2, dim=1)
    return first * second


@ARCH_REGISTRY.register()
class PeerRestormer(PeerUNet):
    """Restormer's blocks in the U-Net of VmambaIR and DPMambaIR, which is Restormer's. Any size of image.

    Args:
        dim: C of the first stage; a multiple of the heads at each level.
        num_blocks: at the four levels; `num_refinement_blocks`: after the decoder.
        heads: attention heads at the four levels.
        ffn_expansion_factor: hidden width of the GDFN over C.
    """

    def __init__(
        self,
        *,
        inp_channels: int = 3,
        out_channels: int = 3,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
    ):
        super().__init__(
            (inp_channels, out_channels),
            dim,
            num_blocks,
            num_refinement_blocks,
            lambda level: AttentionBlock(dim * 2**level, heads[level], ffn_expansion_factor),
        )


@ARCH_REGISTRY.register()
class PeerNAFNet(PeerUNet):
    """NAFNet's blocks in the U-Net of VmambaIR and DPMambaIR; NAFNet's own U-Net adds its skips. Any size of image.

    Args:
        dim: C of the first stage.
        num_blocks: at the four levels; `num_refinement_blocks`: after the decoder.
    """

    def __init__(
        self,
        *,
        inp_channels: int = 3,
        out_channels: int = 3,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
    ):
        super().__init__(
            (inp_channels, out_channels),
            dim,
            num_blocks,
            num_refinement_blocks,
            lambda level: NonlinearActivationFreeBlock(dim * 2**level),
        )
