"""Degradation extractor and the auto-encoder that pre-trains it (DPMambaIR, Sec. 3.4).

Shapes: B batch, H W height width, E = embed_dim.
From the paper: three central-difference convolutions of different scales and one vanilla convolution, six layers,
average pooling, re-parameterisation into one kernel per layer; an embedding of 512; reconstruction of the degraded
image from the clean one and the embedding. Our inference (the paper gives no widths): channels, strides, padding, head,
and the whole reconstruction unit; chosen so that extractor and network together have the paper's 29.35 M and 153.33 G,
and its 28.71, 29.03 and 30.62 M for other embedding sizes (v3, Table VII).
"""

import itertools
import math
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmambair_basicsr.registry import ARCH_REGISTRY

CDC_SIZES = (3, 5, 7)
KERNEL = max(CDC_SIZES)
CHANNELS = (64, 72, 64, 64, 64, 88)
HIDDEN = 1024
BLOCK = 1024  # pixels; without gradients, larger images are embedded in blocks to save memory


class CDCLayer(nn.Module):
    """Sum of three central-difference convolutions (3x3, 5x5, 7x7), a vanilla 7x7 convolution and one bias.

    A central-difference convolution of kernel w is conv(x; w) - sum(w) * x_centre (theta = 1). It is linear, so the
    four branches are exactly one 7x7 convolution, `kernel()`; training computes that one: 2.7 times less work.

    Args:
        in_channels, out_channels: widths.
        stride: of every branch; padding keeps the centres aligned.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.cdc = nn.ParameterList(torch.empty(out_channels, in_channels, size, size) for size in CDC_SIZES)
        self.vanilla = nn.Parameter(torch.empty(out_channels, in_channels, KERNEL, KERNEL))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        for weight in (*self.cdc, self.vanilla):
            nn.init.kaiming_uniform_(weight, a=5**0.5)  # as nn.Conv2d

    def kernel(self) -> Tensor:
        """The single kernel equivalent to all branches, (out, in, 7, 7)."""
        kernel = self.vanilla
        for weight in self.cdc:
            margin = (KERNEL - weight.shape[-1]) // 2
            centre = F.pad(weight.sum(dim=(2, 3), keepdim=True), [KERNEL // 2] * 4)
            kernel = kernel + F.pad(weight, [margin] * 4) - centre
        return kernel

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""
        return F.conv2d(extend(x), self.kernel(), self.bias, self.stride)

    def forward_branches(self, x: Tensor) -> Tensor:
        """The definition of `forward`, branch by branch as in the paper's Fig. 3."""
        y = F.conv2d(extend(x), self.vanilla, self.bias, self.stride)
        for weight in self.cdc:
            centre = F.conv2d(x, weight.sum(dim=(2, 3), keepdim=True), None, self.stride)
            y = y + F.conv2d(extend(x, weight.shape[-1] // 2), weight, None, self.stride) - centre
        return y

    def merge(self) -> nn.Conv2d:
        """The same layer as a plain convolution."""
        conv = plain_layer(self.vanilla.shape[1], self.vanilla.shape[0], self.stride).to(self.vanilla)
        with torch.no_grad():
            # Summed in fp64: the kernels of the branches cancel at the centre.
            conv.weight.copy_(deepcopy(self).double().kernel())
            conv.bias.copy_(self.bias)
        return conv


def extend(x: Tensor, margin: int = KERNEL // 2) -> Tensor:
    """Replicate the border. Zeros would be edges, the strongest signal for central differences: the embedding of a
    crop would then differ from that of its image (measured: by a factor of 1.7 in norm, 64 against 256 pixels)."""
    return F.pad(x, [margin] * 4, mode='replicate')


def plain_layer(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, KERNEL, stride, KERNEL // 2, padding_mode='replicate')


@ARCH_REGISTRY.register()
class DegradationExtractor(nn.Module):
    """Image -> embedding of its degradation.

    Args:
        embed_dim: E.
        channels: widths of the layers (six in the paper). The second and the third layer halve the resolution.
        hidden: width of the head, whose two linear layers follow the mean over the image.
        merged: build the re-parameterised form, one 7x7 convolution per layer, as deployed in DPMambaIR.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 512,
        channels: Sequence[int] = CHANNELS,
        hidden: int = HIDDEN,
        merged: bool = False,
    ):
        super().__init__()
        layer = plain_layer if merged else CDCLayer
        widths = [3, *channels]
        strides = [2 if i in (1, 2) else 1 for i in range(len(channels))]
        self.layers = nn.ModuleList(layer(widths[i], widths[i + 1], strides[i]) for i in range(len(channels)))
        self.stride = math.prod(strides)  # of the features
        reach = sum(KERNEL // 2 * math.prod(strides[:i]) for i in range(len(channels)))
        self.reach = -(-reach // self.stride) * self.stride  # receptive field beyond a feature's own pixels
        self.head = nn.Sequential(nn.Linear(widths[-1], hidden), nn.ReLU(), nn.Linear(hidden, embed_dim))

    @staticmethod
    def options_of_weights(state_dict: dict[str, Tensor]) -> dict:
        """Options inferred from weights, merged or not, where the first versions had other defaults."""
        if 'head.0.bias' not in state_dict:
            return {}
        biases = itertools.takewhile(state_dict.__contains__, (f'layers.{i}.bias' for i in itertools.count()))
        channels = [state_dict[name].numel() for name in biases]
        return {'channels': channels, 'hidden': state_dict['head.0.bias'].numel()}

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, E)."""
        in_blocks = max(image.shape[-2:]) > BLOCK and not torch.is_grad_enabled()
        return self.head(self.mean_in_blocks(image) if in_blocks else self.features(image).mean(dim=(2, 3)))

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)), C the width of the last layer."""
        image = image.contiguous(memory_format=torch.channels_last)  # faster convolutions
        for layer in self.layers:
            image = F.relu(layer(image))
        return image

    def mean_in_blocks(self, image: Tensor) -> Tensor:
        """Mean of `features`, (B, C), up to rounding: each block includes all pixels that its features depend on."""
        h, w = image.shape[-2:]
        total = 0
        for top in range(0, h, BLOCK):
            for left in range(0, w, BLOCK):
                y, x = max(top - self.reach, 0), max(left - self.reach, 0)
                seen = image[..., y : top + BLOCK + self.reach, x : left + BLOCK + self.reach]
                first_row, first_column = (top - y) // self.stride, (left - x) // self.stride
                own = self.features(seen)[..., first_row:, first_column:]
                total = total + own[..., : BLOCK // self.stride, : BLOCK // self.stride].sum(dim=(2, 3))
        return total / (-(-h // self.stride) * -(-w // self.stride))

    def merge(self) -> 'DegradationExtractor':
        """Re-parameterise in place: the same function with one 7x7 convolution per layer. Returns itself."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, CDCLayer):
                self.layers[i] = layer.merge()
        return self


def options_of_extractor(state_dict: dict[str, Tensor]) -> dict:
    """`DegradationExtractor.options_of_weights` for a network that contains one, as options extractor_<name>."""
    prefix = 'extractor.'
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    return {f'extractor_{key}': value for key, value in DegradationExtractor.options_of_weights(own).items()}


class FusionBlock(nn.Module):
    """x + conv(relu(modulated conv(x))), where the modulation x * (1 + gamma) + beta is computed from the embedding."""

    def __init__(self, channels: int, embed_dim: int, hidden: int = 128):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Sequential(nn.Linear(embed_dim, hidden), nn.ReLU(), nn.Linear(hidden, 2 * channels))
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        gamma, beta = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        return x + self.conv_out(F.relu(self.conv_in(x) * (1 + gamma) + beta))


class RefineBlock(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@ARCH_REGISTRY.register()
class DegradationAutoencoder(nn.Module):
    """Stage 1: the extractor embeds the degraded image; a reconstruction unit degrades the clean one accordingly.

    Args:
        embed_dim: E.
        extractor_channels, extractor_hidden: see `DegradationExtractor`.
        channels: width of the reconstruction unit.
        num_fusion_blocks, num_refine_blocks: its depth.
        unit_embedding: normalise the embedding to unit length, times a learned scale (our inference): DPMambaIR uses
            only its direction, which must then encode the severity too. False: as in the first versions.
    """

    stride = 1  # any size

    def __init__(
        self,
        *,
        embed_dim: int = 512,
        extractor_channels: Sequence[int] = CHANNELS,
        extractor_hidden: int = HIDDEN,
        channels: int = 64,
        num_fusion_blocks: int = 4,
        num_refine_blocks: int = 8,
        unit_embedding: bool = True,
    ):
        super().__init__()
        self.extractor = DegradationExtractor(embed_dim=embed_dim, channels=extractor_channels, hidden=extractor_hidden)
        self.embedding_scale = None
        if unit_embedding:
            self.embedding_scale = nn.Parameter(torch.tensor(embed_dim**0.5))  # entries are about 1
            self.embedding_scale.no_weight_decay = True
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.fusion = nn.ModuleList(FusionBlock(channels, embed_dim) for _ in range(num_fusion_blocks))
        self.refine = nn.Sequential(*(RefineBlock(channels) for _ in range(num_refine_blocks)))
        self.output = nn.Conv2d(channels, 3, 3, padding=1)

    @staticmethod
    def options_of_weights(state_dict: dict[str, Tensor]) -> dict:
        """Options inferred from weights, where the first versions had other defaults."""
        found = options_of_extractor(state_dict)
        if 'stem.weight' in state_dict:
            found['unit_embedding'] = 'embedding_scale' in state_dict
        return found

    def embed(self, clean: Tensor, degraded: Tensor) -> Tensor:
        """Embedding of the degradation, (B, E), as read by the reconstruction unit."""
        embedding = self.extractor(degraded)
        return embedding if self.embedding_scale is None else self.embedding_scale * F.normalize(embedding, dim=1)

    def forward(self, clean: Tensor, degraded: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """Reconstruct the degraded image.

        Args:
            clean, degraded: (B, 3, H, W) in [0, 1], same size.
            embedding: (B, E) from `embed`, instead of `degraded`, if `clean` is a part of an embedded image.

        Returns:
            (B, 3, H, W), not clamped.
        """
        if embedding is None:
            assert degraded is not None, 'without its embedding'
            embedding = self.embed(clean, degraded)
        x = self.stem(clean)
        for block in self.fusion:
            x = block(x, embedding)
        return self.output(self.refine(x)) + clean
