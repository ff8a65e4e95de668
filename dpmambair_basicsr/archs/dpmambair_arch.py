"""DPMambaIR (arXiv 2504.17732): all-in-one restoration with a degradation-aware prompt state space model.

Shapes: B batch, C width of a stage, D = d_inner of that stage, H W height width, R = ceil(C / 16) rank of delta,
N states, E = embed_dim. The paper has no public code. Each docstring separates the paper's statements from our
inferences; the default configuration reproduces its 29.35 M parameters and 153.33 G (fvcore, 1x3x256x256).
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
    norm_and_gate,
    one_of,
    silu_depthwise,
)
from dpmambair_basicsr.archs.degradation_extractor_arch import (
    CHANNELS,
    HIDDEN,
    DegradationExtractor,
    options_of_extractor,
)
from dpmambair_basicsr.ops import pad_to_multiple
from dpmambair_basicsr.registry import ARCH_REGISTRY

PROMPTS = ('delta', 'B', 'C')
DELTA_PROMPTS = ('scale', 'low_rank')
INSERTIONS = ('modulate', 'concat', 'attention', 'none')
SCANS = {1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}  # number of directions -> scan orders of `cross_scan`


class Modulation(nn.Module):
    """Degradation-aware prompts P_delta, P_B, P_C (Eq. 8, 9): one linear layer of the embedding for each.

    Each multiplies delta, B or C equally at all positions. From the paper: alpha_delta multiplies delta itself, after
    softplus (Eq. 8). Our inference: one layer per prompt and block, alpha_delta one number, alpha_B and alpha_C N
    each, which with a head of width 1024 has the slope of Table VII (v3), 2477 parameters per embedding dimension.
    Initially all factors are exactly 1. A negative alpha_delta is set to 0 (our inference): the state, which shrinks by
    exp(alpha_delta delta A), would grow without bound; at 0 the scan is switched off, and y = D u.

    P_B and P_C are equivalent: A is diagonal and prompts do not depend on the position, so only alpha_B alpha_C matters
    in each state, and equal layers, as at initialisation, get equal gradients and stay equal.

    Args:
        prompts: subset of ('delta', 'B', 'C'); the others stay 1.
        delta_prompt: 'scale', as above; 'low_rank', as in the first versions: R factors, of any sign, on the low-rank
            delta, before dt_proj, bias and softplus, which change the contrast of delta but hardly its level.
        embed_dim, dt_rank, d_state: E, R, N.
    """

    def __init__(self, prompts: Sequence[str], delta_prompt: str, embed_dim: int, dt_rank: int, d_state: int):
        super().__init__()
        self.sizes = {'delta': dt_rank, 'B': d_state, 'C': d_state}
        sizes = self.sizes if delta_prompt == 'low_rank' else self.sizes | {'delta_scale': 1}
        names = ['delta_scale' if name == 'delta' and delta_prompt == 'scale' else name for name in prompts]
        layers = {name: nn.Linear(embed_dim, sizes[name]) for name in names}
        for layer in layers.values():
            nn.init.zeros_(layer.weight)
            nn.init.ones_(layer.bias)
        self.layers = nn.ModuleDict(layers)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, E) -> (B, R + 2N), factors of the low-rank delta, B and C; and (B,), the factor of delta, or None."""
        factors = [
            self.layers[name](embedding) if name in self.layers else embedding.new_ones(embedding.shape[0], size)
            for name, size in self.sizes.items()
        ]
        scale = self.layers['delta_scale'](embedding).squeeze(1).clamp(min=0) if 'delta_scale' in self.layers else None
        return torch.cat(factors, dim=1), scale


class ConcatInsertion(nn.Module):
    """Ablation "Concat" (Table 4): the embedding is concatenated to the features and reduced by 1x1 convolutions.

    Initially the identity. The paper gives no details: our inference, narrow enough to match its network size roughly.
    """

    def __init__(self, channels: int, embed_dim: int, width: int = 64):
        super().__init__()
        self.embed = nn.Linear(embed_dim, width)
        self.reduce = nn.Conv2d(channels + width, width, 1, bias=False)
        self.expand = nn.Conv2d(width, channels, 1, bias=False)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, D, H, W), (B, E) -> (B, D, H, W)."""
        embedding = self.embed(embedding)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return x + self.expand(self.reduce(torch.cat([x, embedding], dim=1)))


class AttentionInsertion(nn.Module):
    """Ablation "Attention" (Table 4): pixels attend to the embedding, split into eight tokens, as in OneRestore.

    Initially the identity. The paper gives no details: our inference, narrow enough to match its network size roughly.

    Raises:
        ValueError: the embedding cannot be split evenly.
    """

    def __init__(self, channels: int, embed_dim: int, num_tokens: int = 8):
        super().__init__()
        if embed_dim % num_tokens:
            raise ValueError(f'embed_dim: {embed_dim}, attention needs a multiple of {num_tokens}')
        self.num_tokens, width = num_tokens, embed_dim // num_tokens
        self.query = nn.Conv2d(channels, width, 1, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.project = nn.Conv2d(width, channels, 1, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, D, H, W), (B, E) -> (B, D, H, W)."""
        query = self.query(x)  # (B, E / tokens, H, W)
        tokens = embedding.unflatten(1, (self.num_tokens, -1))  # (B, tokens, E / tokens)
        attended = F.scaled_dot_product_attention(query.flatten(2).mT, self.key(tokens), self.value(tokens))
        return x + self.project(attended.mT.reshape(query.shape))


class ClassEmbedding(nn.Module):
    """Label (B,) int64 -> learned embedding (B, E), of unit length like the extractor's."""

    def __init__(self, num_classes: int, embed_dim: int):
        super().__init__()
        self.directions = nn.Parameter(torch.randn(num_classes, embed_dim))

    def forward(self, label: Tensor) -> Tensor:
        return F.normalize(self.directions[label], dim=1)


@ARCH_REGISTRY.register()
class HighFrequencyEnhancementBlock(nn.Module):
    """HEB (Eq. 10, Fig. 4b): F + alpha * (F - GAP(F)), for features F of any network.

    GAP is the mean over height and width, alpha one learnable scalar (v3), initially 0, the identity (our inference).
    It is unbounded: 1 + alpha is the gain of everything but the mean, and at -1 only the mean passes. Trained alphas
    can be negative: in a network of 5.2 M parameters, all 14 after 2300 iterations at a rate of 1e-3, -0.34 to -0.01.
    """

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))
        self.mean = ImageMean()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), any size and range -> same."""
        return torch.lerp(self.mean(x), x, 1 + self.alpha)  # in one pass over x


class DPSSModule(PlanarScan):
    """Depthwise convolution, degradation-aware prompt selective scan (Sec. 3.5, Fig. 4a), HEB (Fig. 4b).

    Args:
        channels: C.
        d_inner: D.
        d_state: N.
        embed_dim: E.
        prompt, delta_prompt, insertion, high_frequency, directions: see `DPMambaIR`.
    """

    def __init__(
        self,
        channels: int,
        d_inner: int,
        d_state: int,
        embed_dim: int,
        prompt: Sequence[str],
        delta_prompt: str,
        insertion: str,
        high_frequency: bool,
        directions: int,
    ):
        dt_rank = math.ceil(channels / 16)
        super().__init__(d_inner, d_state, dt_rank, SCANS[directions])
        # As in Mamba; VmambaIR's released training does decay them.
        self.A_logs.no_weight_decay = True
        self.Ds.no_weight_decay = True
        self.in_conv = nn.Conv2d(channels, 2 * d_inner, 1, bias=False)
        self.conv2d = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner)
        self.modulation = None
        if insertion == 'modulate':
            self.modulation = Modulation(prompt, delta_prompt, embed_dim, dt_rank, d_state)
        insertions = {'concat': ConcatInsertion, 'attention': AttentionInsertion}
        self.insertion = insertions[insertion](d_inner, embed_dim) if insertion in insertions else None
        self.out_norm = LayerNorm(d_inner)
        self.high_frequency = HighFrequencyEnhancementBlock() if high_frequency else nn.Identity()
        self.out_conv = nn.Conv2d(d_inner, channels, 1, bias=False)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C, H, W)."""
        features, gate = self.scanned_and_gate(x, embedding)
        prompts = () if self.modulation is None else self.modulation(embedding)
        y = norm_and_gate(self.out_norm, self.scan(features, *prompts), gate)
        return self.out_conv(self.high_frequency(y))

    def scanned_and_gate(self, x: Tensor, embedding: Tensor | None) -> tuple[Tensor, Tensor]:
        """The features that are scanned, and their gate: (B, C, H, W), (B, E) -> (B, D, H, W) each."""
        features, gate = convolve_halves(self.in_conv, x)  # F1, F2 of Fig. 4
        features = silu_depthwise(self.conv2d, features)
        return features if self.insertion is None else self.insertion(features, embedding), gate


class DPSSBlock(nn.Module):
    """x + DPSS module(norm(x)); x + EFFN(norm(x)) (Fig. 2)."""

    def __init__(self, channels: int, ffn_expansion_factor: float, attn: DPSSModule):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn = attn
        self.norm2 = LayerNorm(channels)
        self.ffn = EFFN(channels, ffn_expansion_factor, bias=False)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), embedding)
        return x + self.ffn(self.norm2(x))


@ARCH_REGISTRY.register()
class DPMambaIR(UNet):
    """DPMambaIR: U-Net of DPSS blocks, conditioned on the embedding of a frozen degradation extractor.

    Values are in [0, 1]; the output is not clamped. Images may have any size: height and width are padded inside to
    multiples of 8, see `pad_to_multiple`, as the published test scripts of VmambaIR and Restormer do.
    `extractor` is merged, frozen, and part of the state dict, so a checkpoint is complete.

    Args:
        inp_channels, out_channels: of the images; equal, because the input is added to the output.
        dim: C of the first stage.
        num_blocks: DPSS blocks at the four levels, decoder like encoder.
        num_refinement_blocks: DPSS blocks after the decoder.
        ffn_expansion_factor: hidden width of the EFFN over C.
        d_inner: D at widths C, 2C, 4C, 8C.
        d_state: N.
        embed_dim: E (Table VII of the paper's v3: 256, 384, 512, 1024).
        prompt: which of 'delta', 'B', 'C' are modulated (Table 3); only for insertion 'modulate'.
        delta_prompt: factor of P_delta: 'scale', on delta itself (Eq. 8), or 'low_rank', see `Modulation`.
        insertion: 'modulate' (the paper's), 'concat', 'attention' (Table 4) or 'none', a network without any embedding.
        high_frequency: HEB on or off (Table 3).
        directions: 1 (the paper's) scan by rows; 2 adds the reverse; 4 adds columns and their reverse (Table 5, where
            P_C is removed: prompt ['delta', 'B']).
        degradation: 'extractor', or 'class' for an embedding of the true label (Table 4, "Classes").
        num_degradations: labels for 'class'.
        unit_classes: whether their embeddings have unit length, like the extractor's; false: as in the first versions.
        extractor_channels, extractor_hidden: see `DegradationExtractor`.
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
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        ffn_expansion_factor: float = 2.66,
        d_inner: Sequence[int] = (64, 128, 256, 512),
        d_state: int = 16,
        embed_dim: int = 512,
        prompt: Sequence[str] = PROMPTS,
        delta_prompt: str = 'scale',
        insertion: str = 'modulate',
        high_frequency: bool = True,
        directions: int = 1,
        degradation: str = 'extractor',
        num_degradations: int = 7,
        unit_classes: bool = True,
        extractor_channels: Sequence[int] = CHANNELS,
        extractor_hidden: int = HIDDEN,
        checkpoint_levels: Sequence[int] = (),
    ):
        one_of('delta_prompt', delta_prompt, DELTA_PROMPTS)
        one_of('insertion', insertion, INSERTIONS)
        one_of('directions', directions, tuple(SCANS))
        one_of('degradation', degradation, ('extractor', 'class'))
        for name in prompt:
            one_of('prompt', name, PROMPTS)
        if len(d_inner) != 4:
            raise ValueError(f'd_inner: {list(d_inner)} has {len(d_inner)} entries, expected 4, one per level')
        one_of('out_channels', out_channels, (inp_channels,))
        if insertion == 'modulate' and not prompt:
            insertion = 'none'

        def make_block(level: int) -> DPSSBlock:
            width = dim * 2**level
            options = prompt, delta_prompt, insertion, high_frequency, directions
            attn = DPSSModule(width, d_inner[level], d_state, embed_dim, *options)
            return DPSSBlock(width, ffn_expansion_factor, attn)

        super().__init__(inp_channels, dim, num_blocks, num_refinement_blocks, False, make_block, checkpoint_levels)
        self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=False)
        # Our inference: training starts near the degraded image, not at noise added to it.
        with torch.no_grad():
            self.output.weight.mul_(0.01)
        self.extractor = None
        self.classes = None
        if insertion != 'none' and degradation == 'extractor':
            self.extractor = DegradationExtractor(
                embed_dim=embed_dim, channels=extractor_channels, hidden=extractor_hidden, merged=True
            )
            self.extractor.requires_grad_(False).eval()
        elif insertion != 'none':
            self.classes = (ClassEmbedding if unit_classes else nn.Embedding)(num_degradations, embed_dim)
        self.num_degradations = num_degradations

    @property
    def needs_label(self) -> bool:
        """Whether `forward` needs the true degradation."""
        return self.classes is not None

    @property
    def needs_extractor(self) -> bool:
        """Whether `load_extractor`, or a checkpoint of the whole network, must precede training."""
        return self.extractor is not None

    def values_to_log(self) -> dict[str, float]:
        """Smallest and largest alpha of the HEBs, for the training log; empty without HEB."""
        blocks = (block for block in self.modules() if isinstance(block, HighFrequencyEnhancementBlock))
        alphas = [block.alpha.item() for block in blocks]
        return {'heb_alpha_min': min(alphas), 'heb_alpha_max': max(alphas)} if alphas else {}

    @staticmethod
    def options_of_weights(state_dict: dict[str, Tensor]) -> dict:
        """Options inferred from weights, where the first versions had other defaults.

        Raises:
            ValueError: the weights use an insertion of the first versions.
        """
        layers = {key.partition('.attn.')[2] for key in state_dict}
        is_concat = 'insertion.reduce.weight' in layers and 'insertion.expand.weight' not in layers
        if is_concat or 'insertion.tokens.weight' in layers:
            raise ValueError(
                'weights with an insertion of version 0.1.0, which had 40 M (concat) or 117 M (attention) parameters '
                'and is no longer supported: use them with that version, or train again'
            )
        found = options_of_extractor(state_dict)
        for name, place in {'delta': 'low_rank', 'delta_scale': 'scale'}.items():
            if f'modulation.layers.{name}.bias' in layers:
                found['delta_prompt'] = place
        if any(key.startswith('classes.') for key in state_dict):
            found['unit_classes'] = 'classes.directions' in state_dict
        return found

    def load_extractor(self, state_dict: dict[str, Tensor]) -> None:
        """Load and merge the extractor trained in stage 1.

        Args:
            state_dict: of a DegradationAutoencoder.

        Raises:
            RuntimeError: if it has no extractor, or one of other widths.
        """
        own = self.extractor
        assert own is not None, 'only for networks with `needs_extractor`'
        trained = DegradationExtractor(
            embed_dim=own.head[-1].out_features,
            channels=[layer.out_channels for layer in own.layers],
            hidden=own.head[0].out_features,
        )
        prefix = 'extractor.'
        trained.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
        own.load_state_dict(trained.merge().state_dict())

    def embed(self, lq: Tensor, label: Tensor | None = None) -> Tensor | None:
        """Embedding of the degradation, (B, E), from the image or from `label` (B,) int64; None if there is none.

        It has unit length (our inference), as in stage 1 (see `DegradationAutoencoder`): its scale would multiply the
        training steps of the prompts.
        """
        if self.extractor is not None:
            with torch.no_grad():
                return F.normalize(self.extractor(lq), dim=1)
        if self.classes is not None:
            if label is None:
                raise ValueError("degradation: 'class' needs a label per image, which the dataset does not provide")
            return self.classes(label)
        return None

    def forward(self, lq: Tensor, label: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """Restore.

        Args:
            lq: (B, 3, H, W) RGB in [0, 1], any H and W.
            label: (B,) int64, only for degradation 'class'.
            embedding: (B, E) from `embed`, if lq is part of an embedded image; default: that of the padded lq.

        Returns:
            (B, 3, H, W), about [0, 1].
        """
        h, w = lq.shape[-2:]
        lq = pad_to_multiple(lq, self.stride)
        if embedding is None:
            embedding = self.embed(lq, label)
        features = self.forward_features(lq, embedding)  # (B, 2C, H, W)
        return (lq + self.output(features))[..., :h, :w]  # in the layout of lq

    def train(self, mode: bool = True) -> 'DPMambaIR':
        super().train(mode)
        if self.extractor is not None:
            self.extractor.eval()
        return self
