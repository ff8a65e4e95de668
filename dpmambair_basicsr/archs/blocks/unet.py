"""The U-Net shared by VmambaIR and DPMambaIR. Shapes: C = dim; level i has width C * 2**i and resolution H / 2**i."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpmambair_basicsr.archs.blocks.checks import one_of
from dpmambair_basicsr.ops.selective_scan.backend import keep_backend


class UNet(nn.Module):
    """Restormer's U-Net with any block: stem, three encoder stages, latent, three decoder stages, refinement.

    Module names are those of the published VmambaIR checkpoints. The last decoder stage and the refinement work at
    width 2C: the level-1 skip is concatenated and not reduced. Subclasses turn the features into an image.

    Args:
        inp_channels: channels of the image.
        dim: C, even: the resampling halves it.
        num_blocks: blocks at levels 0..3; encoder and decoder have the same number.
        num_refinement_blocks: blocks after the decoder.
        bias: of the stem and the reducing convolutions; the resampling ones have none, as published.
        make_block: i -> a block for features of width C * 2**i.
        checkpoint_levels: resolutions, 0..3 for H / 2**level, whose blocks store only their input and are recomputed in
            the backward pass: less memory for a quarter to a third more time, with the same gradients. Most of the
            memory is at level 0, which includes the last decoder stage and the refinement.

    Raises:
        ValueError: naming the key, for an odd dim or another number of levels.
    """

    stride = 8  # height and width are padded to a multiple of it
    memory_format = torch.channels_last  # of the features; the layout of the image does not matter

    def __init__(
        self,
        inp_channels: int,
        dim: int,
        num_blocks: Sequence[int],
        num_refinement_blocks: int,
        bias: bool,
        make_block: Callable[[int], nn.Module],
        checkpoint_levels: Sequence[int] = (),
    ):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f'dim: expected a positive even int, got {dim}')
        if len(num_blocks) != 4:
            raise ValueError(f'num_blocks: {list(num_blocks)} has {len(num_blocks)} entries, expected 4, one per level')

        for level in checkpoint_levels:
            one_of('checkpoint_levels', level, (0, 1, 2, 3))
        self.checkpoint_levels = tuple(checkpoint_levels)

        def stage(width: int, depth: int) -> nn.Sequential:
            return nn.Sequential(*(make_block(width) for _ in range(depth)))

        self.patch_embed = PatchEmbed(inp_channels, dim, bias)
        self.encoder_level1 = stage(0, num_blocks[0])
        self.down1_2 = Downsample(dim)
        self.encoder_level2 = stage(1, num_blocks[1])
        self.down2_3 = Downsample(dim * 2)
        self.encoder_level3 = stage(2, num_blocks[2])
        self.down3_4 = Downsample(dim * 4)
        self.latent = stage(3, num_blocks[3])
        self.up4_3 = Upsample(dim * 8)
        self.reduce_chan_level3 = nn.Conv2d(dim * 8, dim * 4, 1, bias=bias)
        self.decoder_level3 = stage(2, num_blocks[2])
        self.up3_2 = Upsample(dim * 4)
        self.reduce_chan_level2 = nn.Conv2d(dim * 4, dim * 2, 1, bias=bias)
        self.decoder_level2 = stage(1, num_blocks[1])
        self.up2_1 = Upsample(dim * 2)
        self.decoder_level1 = stage(1, num_blocks[0])
        self.refinement = stage(1, num_refinement_blocks)

    @property
    def stages(self) -> list[nn.Sequential]:
        """All stages that consist of blocks."""
        encoder = [self.encoder_level1, self.encoder_level2, self.encoder_level3]
        return [*encoder, self.latent, self.decoder_level3, self.decoder_level2, self.decoder_level1, self.refinement]

    def forward_features(self, image: Tensor, *context: Tensor | None) -> Tensor:
        """(B, inp_channels, H, W) -> (B, 2C, H, W); `context` is passed to every block. H and W: multiples of 8."""
        # channels_last: layer norms need the channels of a pixel side by side; convolutions are faster and preserve it.
        x = self.patch_embed(image.contiguous(memory_format=self.memory_format))
        level1 = self.run(0, self.encoder_level1, x, *context)  # (B, C, H, W)
        level2 = self.run(1, self.encoder_level2, self.down1_2(level1), *context)  # (B, 2C, H/2, W/2)
        level3 = self.run(2, self.encoder_level3, self.down2_3(level2), *context)  # (B, 4C, H/4, W/4)
        x = self.run(3, self.latent, self.down3_4(level3), *context)  # (B, 8C, H/8, W/8)

        x = self.reduce_chan_level3(torch.cat([self.up4_3(x), level3], dim=1))
        x = self.run(2, self.decoder_level3, x, *context)  # (B, 4C, H/4, W/4)
        x = self.reduce_chan_level2(torch.cat([self.up3_2(x), level2], dim=1))
        x = self.run(1, self.decoder_level2, x, *context)  # (B, 2C, H/2, W/2)
        x = torch.cat([self.up2_1(x), level1], dim=1)
        x = self.run(0, self.decoder_level1, x, *context)  # (B, 2C, H, W)
        return self.run(0, self.refinement, x, *context)

    def run(self, level: int, stage: nn.Sequential, x: Tensor, *context: Tensor | None) -> Tensor:
        """Apply the blocks of a stage at resolution H / 2**level."""
        recompute = level in self.checkpoint_levels and torch.is_grad_enabled()
        for block in stage:
            if recompute:
                again = keep_backend(block)  # the backward pass may run in another thread, or outside `use_backend`
                x = checkpoint(again, x, *context, use_reentrant=False, preserve_rng_state=False)  # nothing is random
            else:
                x = block(x, *context)
        return x


class PatchEmbed(nn.Module):
    """3x3 convolution, (b, inp_channels, h, w) -> (b, dim, h, w)."""

    def __init__(self, inp_channels: int, dim: int, bias: bool):
        super().__init__()
        self.proj = nn.Conv2d(inp_channels, dim, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """(b, c, h, w) -> (b, 2c, h/2, w/2) by a 3x3 convolution and pixel unshuffle."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """(b, c, h, w) -> (b, c/2, 2h, 2w) by a 3x3 convolution and pixel shuffle."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels * 2, 3, padding=1, bias=False), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)
