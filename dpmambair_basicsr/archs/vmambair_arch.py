"""VmambaIR (arXiv 2403.11423): a U-Net of omni selective scan blocks for deraining and super-resolution.

Shapes: B batch, C width of a stage, H W height width, S lifted channels of the channel scan, R rank of delta, N states.
Parameter names and shapes are those of the released checkpoints. Where paper and released code differ, we follow the
code, and the docstring says so.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmambair_basicsr.archs.blocks import (
    EFFN,
    ImageMean,
    LayerNorm,
    PlanarScan,
    UNet,
    convolve_halves,
    directional_scan,
    log_uniform_delta_bias,
    norm_and_gate,
    one_of,
    silu_depthwise,
)
from dpmambair_basicsr.ops import pad_to_multiple
from dpmambair_basicsr.registry import ARCH_REGISTRY

FORWARD_AND_BACK = (0, 2)  # scan orders of the channel scan, see `cross_scan`
LIFTED_CHANNELS, LIFTED_RANK = 4, 6


class PixelLinear(nn.Linear):
    """Ablation V4 (Table 4): a linear layer with reshapes instead of a 1x1 convolution, (b, c, h, w) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OSSModule(PlanarScan):
    """Omni selective scan (Sec. 4.2.1, 4.3, Fig. 3): four scans over the plane, two over the channels.

    In the code but not in the paper's text: the lifting to four channels, the two layer norms, and the type of fusion.

    Args:
        channels: C.
        d_state: N.
        channel_scan, channel_fusion, planar_directions, linear_projection: see `VmambaIR`.
    """

    def __init__(
        self,
        channels: int,
        d_state: int,
        channel_scan: str,
        channel_fusion: str,
        planar_directions: int,
        linear_projection: bool,
    ):
        dt_rank = math.ceil(channels / 16)
        super().__init__(channels, d_state, dt_rank, range(planar_directions))
        self.channel_scan = channel_scan
        self.channel_fusion = channel_fusion

        def projection(inputs: int, outputs: int) -> PixelLinear | nn.Conv2d:
            return PixelLinear(inputs, outputs) if linear_projection else nn.Conv2d(inputs, outputs, 1)

        self.in_conv = projection(channels, 2 * channels)
        self.conv2d = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.out_norm = LayerNorm(channels)
        if channel_scan == 'lifted':
            self.conv_cin = nn.Conv2d(1, LIFTED_CHANNELS, 1)
            self.conv_cout = nn.Conv2d(LIFTED_CHANNELS, 1, 1)
            self.add_channel_parameters(LIFTED_CHANNELS, LIFTED_RANK, d_state)
            # Initialised as in the released code: from a normal distribution, not by Mamba's rules.
            for parameter in (self.dtc_projs_weight, self.dtc_projs_bias, self.Ac_logs):
                nn.init.normal_(parameter)
        elif channel_scan == 'scalar':
            self.add_channel_parameters(1, dt_rank, d_state)
        if channel_scan != 'none':
            self.pool = ImageMean()
            self.channel_norm = LayerNorm(channels)
        self.out_conv = projection(channels, channels)

    def add_channel_parameters(self, lifted: int, rank: int, d_state: int) -> None:
        """Two scans over sequences of length C with `lifted` channels; Mamba's initialisation."""
        k = len(FORWARD_AND_BACK)
        bound = lifted**-0.5
        self.xc_proj_weight = nn.Parameter(torch.empty(k, rank + 2 * d_state, lifted).uniform_(-bound, bound))
        self.dtc_projs_weight = nn.Parameter(torch.empty(k, lifted, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.dtc_projs_bias = nn.Parameter(log_uniform_delta_bias(k, lifted))
        self.Ac_logs = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(k * lifted, 1))
        self.Dsc = nn.Parameter(torch.ones(k * lifted))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        features, gate = convolve_halves(self.in_conv, x)  # (B, C, H, W) each
        features = silu_depthwise(self.conv2d, features)
        y = norm_and_gate(self.out_norm, self.scan(features), gate)
        if self.channel_scan != 'none':
            c = self.scan_channels(y)  # (B, C, 1, 1)
            y = y + c if self.channel_fusion == 'add' else y * c + y
        return self.out_conv(y)

    def scan_channels(self, y: Tensor) -> Tensor:
        """Pool (B, C, H, W), scan the C values forwards and backwards -> (B, C, 1, 1)."""
        sequence = self.pool(y).unsqueeze(1).squeeze(4)  # (B, 1, C, 1): an image of one column
        if self.channel_scan == 'lifted':
            sequence = self.conv_cin(sequence)  # (B, S, C, 1)
        sequence = directional_scan(
            sequence,
            FORWARD_AND_BACK,
            self.xc_proj_weight,
            self.dtc_projs_weight,
            self.dtc_projs_bias,
            self.Ac_logs,
            self.Dsc,
        )
        if self.channel_scan == 'lifted':
            sequence = self.conv_cout(sequence)
        return self.channel_norm(sequence.transpose(1, 2))


class OSSBlock(nn.Module):
    """x + OSS module(norm(x)); x + EFFN(norm(x)) (Fig. 2)."""

    def __init__(self, channels: int, attn: OSSModule, ffn: EFFN | None):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn = attn
        self.norm2 = None if ffn is None else LayerNorm(channels)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x if self.ffn is None or self.norm2 is None else x + self.ffn(self.norm2(x))


@ARCH_REGISTRY.register()
class VmambaIR(UNet):
    """VmambaIR for deraining (scale 1) and for single-image and real-world super-resolution.

    Values are in [0, 1]; the output is not clamped. Images may have any size: height and width are padded inside to
    multiples of 8, see `pad_to_multiple`, as the published test scripts do.
    Released configurations, num_blocks + num_refinement_blocks, channel_scan, channel_fusion:
    deraining [3, 5, 7, 9] + 2, lifted, add; single-image SR x4 [15, 1, 1, 1] + 15, lifted, modulate;
    real-world SR x4 [6, 2, 2, 1] + 6, scalar, modulate. (The paper's text has [4, 4, 6, 8] + 2 and [14, 1, 1, 1] + 14.)

    Args:
        inp_channels, out_channels: of the images; equal, because the (upsampled) input is added to the output.
        dim: C of the first stage, even.
        num_blocks: OSS blocks at the four levels, decoder like encoder.
        num_refinement_blocks: OSS blocks after the decoder.
        ffn_expansion_factor: hidden width of the EFFN over C.
        bias: of the stem, the reducing convolutions, the EFFN and the last convolution at scale 1. As released, the
            resampling convolutions never have one, those of the OSS module and of the SR tail always do.
        scale: 1, 2, 3, 4 or 8. The released code has only 1 and 4.
        d_state: N.
        channel_scan: 'lifted' to four channels, 'scalar', or 'none' (Table 4, V2).
        channel_fusion: of y and the channel scan c; 'add': y + c, 'modulate': y * c + y.
        planar_directions: 4, or 1 for the one-way scan (Table 4, V1, which also has channel_scan 'none').
        ffn: whether blocks have an EFFN (Table 4, V3).
        linear_projection: linear layers instead of 1x1 convolutions in the OSS module (Table 4, V4).
        checkpoint_levels: resolutions whose blocks are recomputed in the backward pass, see `UNet`; e.g. [0].

    Raises:
        ValueError: naming the key, for a value that is not one of the choices.
    """

    def __init__(
        self,
        *,
        inp_channels: int = 3,
        out_channels: int = 3,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 4, 6, 8),
        num_refinement_blocks: int = 2,
        ffn_expansion_factor: float = 2.66,
        bias: bool = False,
        scale: int = 1,
        d_state: int = 16,
        channel_scan: str = 'lifted',
        channel_fusion: str = 'add',
        planar_directions: int = 4,
        ffn: bool = True,
        linear_projection: bool = False,
        checkpoint_levels: Sequence[int] = (),
    ):
        one_of('scale', scale, (1, 2, 3, 4, 8))
        one_of('channel_scan', channel_scan, ('lifted', 'scalar', 'none'))
        one_of('channel_fusion', channel_fusion, ('add', 'modulate'))
        one_of('planar_directions', planar_directions, (1, 4))
        one_of('out_channels', out_channels, (inp_channels,))

        def make_block(level: int) -> OSSBlock:
            width = dim * 2**level
            attn = OSSModule(width, d_state, channel_scan, channel_fusion, planar_directions, linear_projection)
            return OSSBlock(width, attn, EFFN(width, ffn_expansion_factor, bias) if ffn else None)

        super().__init__(inp_channels, dim, num_blocks, num_refinement_blocks, bias, make_block, checkpoint_levels)
        self.scale = scale
        if scale == 1:
            self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=bias)
        else:
            factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
            upsample = [
                layer
                for factor in factors
                for layer in (nn.Conv2d(dim * 2, dim * 2 * factor**2, 3, padding=1), nn.PixelShuffle(factor))
            ]
            self.tail = nn.Sequential(nn.Sequential(*upsample), nn.Conv2d(dim * 2, out_channels, 3, padding=1))

    def forward(self, lq: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in [0, 1], any H and W -> (B, 3, scale * H, scale * W), about [0, 1]."""
        h, w = lq.shape[-2:]
        lq = pad_to_multiple(lq, self.stride)
        features = self.forward_features(lq)  # (B, 2C, H, W)
        if self.scale == 1:
            output = lq + self.output(features)  # in the layout of lq
        else:
            output = F.interpolate(lq, scale_factor=self.scale, mode='nearest') + self.tail(features)
        return output[..., : h * self.scale, : w * self.scale]
