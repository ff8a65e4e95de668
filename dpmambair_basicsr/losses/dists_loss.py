from os import path as osp
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torchvision.models import vgg

from dpmambair_basicsr.losses.lpips_network import backbone_path
from dpmambair_basicsr.losses.piq_library import import_piq
from dpmambair_basicsr.registry import LOSS_REGISTRY

HEADS_URL = 'https://github.com/photosynthesis-team/piq/releases/download/v0.4.1/dists_weights.pt'
LAYERS = ('relu1_2', 'relu2_2', 'relu3_3', 'relu4_3', 'relu5_3')  # of VGG16
CHANNELS = (3, 64, 128, 256, 512, 512)  # of the image, and of these


@LOSS_REGISTRY.register()
class DISTSLoss(nn.Module):
    """`loss_weight` x DISTS (Ding et al. 2020, arXiv 2004.07728), from the package piq; mean over the batch.

    Images are (b, 3, h, w) RGB in [0, 1]; those larger than 256 pixels are downscaled, as in the paper. fp16 and bf16
    are computed in fp32.

    Args:
        loss_weight: weight of the loss.
        weights, heads: torchvision's VGG16 and DISTS's own weights, see `build_dists`.
    """

    def __init__(self, loss_weight: float = 1.0, weights: str | None = None, heads: str | None = None):
        super().__init__()
        self.loss_weight = loss_weight
        self.network = build_dists(weights, heads)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.loss_weight * self.network(pred.float(), target.float())


def find_files(weights: str | None, heads: str | None) -> tuple[str, str]:
    """The files of VGG16's and DISTS's weights. Raises FileNotFoundError with the command that downloads them."""
    wanted = {
        'vgg': backbone_path('vgg') if weights is None else osp.expanduser(weights),
        'dists': osp.join(osp.dirname(backbone_path('vgg')), osp.basename(HEADS_URL))
        if heads is None
        else osp.expanduser(heads),
    }
    missing = [name for name, file in wanted.items() if not osp.isfile(file)]
    if missing:
        files = ' and no '.join(wanted[name] for name in missing)
        raise FileNotFoundError(
            f'DISTS needs the weights of VGG16 and its own; there is no {files}: '
            f"`dpmambair fetch {' '.join(missing)}` downloads them to torch's cache; "
            'or set the options weights and heads'
        )
    return wanted['vgg'], wanted['dists']


def build_dists(weights: str | None = None, heads: str | None = None) -> nn.Module:
    """piq's DISTS with frozen parameters, from files: nothing is downloaded, and no pickled code runs.

    Args:
        weights: torchvision's checkpoint of VGG16; None looks in torch's hub cache.
        heads: {'alpha', 'beta'}, (1, 1475, 1, 1) each, the authors' or piq's; None looks for piq's in torch's hub
            cache. They are divided by their sum, as in the authors' code.

    Raises:
        MissingLibraryError: piq is not installed.
        FileNotFoundError: no such file; says how to get it.
        ValueError: a file contains something else.
    """
    perceptual = import_piq('DISTSLoss').perceptual
    files = find_files(weights, heads)
    with torch.random.fork_rng(devices=[]):  # overwritten below: they must not advance a training's generator
        features = vgg.make_layers(vgg.cfgs['D'])
    try:
        state, own = (torch.load(file, map_location='cpu', weights_only=True) for file in files)
        features.load_state_dict(
            {name.removeprefix('features.'): value for name, value in state.items() if name.startswith('features.')}
        )
        alpha, beta = (own[name].float().split([*CHANNELS], dim=1) for name in ('alpha', 'beta'))
    except (AttributeError, KeyError, RuntimeError, UnpicklingError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'{" and ".join(files)} do not contain VGG16 and the weights of DISTS: {reason}') from error
    total = sum(part.sum() for part in (*alpha, *beta))
    network = perceptual.DISTS.__new__(perceptual.DISTS)  # without its constructor, which downloads and unpickles
    perceptual.ContentLoss.__init__(
        network,
        features,
        layers=[perceptual.VGG16_LAYERS[layer] for layer in LAYERS],
        weights=[part / total for part in (*alpha, *beta)],
        replace_pooling=True,
        allow_layers_weights_mismatch=True,
    )
    return network
