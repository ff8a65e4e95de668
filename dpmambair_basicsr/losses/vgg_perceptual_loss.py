import warnings
from os import path as osp
from pickle import UnpicklingError

import torch
import torchvision
from basicsr.archs import vgg_arch
from basicsr.losses.basic_loss import PerceptualLoss

from dpmambair_basicsr.registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class VGGPerceptualLoss(PerceptualLoss):
    """BasicSR's PerceptualLoss with VGG's ImageNet weights from a file; nothing is ever downloaded.

    Images are (b, 3, h, w) RGB in [0, 1], with range_norm in [-1, 1]. Returns (perceptual, style), numbers or None.

    Args:
        layer_weights, vgg_type, use_input_norm, range_norm, perceptual_weight, style_weight, criterion: BasicSR's.
        weights: torchvision's checkpoint of `vgg_type`; None looks in ./experiments/pretrained_models, as BasicSR does,
            and in torch's hub cache.

    Raises:
        ValueError: unknown vgg_type, or the file holds another network.
        FileNotFoundError: no such file; says how to get it.
    """

    def __init__(
        self,
        layer_weights: dict[str, float],
        vgg_type: str = 'vgg19',
        use_input_norm: bool = True,
        range_norm: bool = False,
        perceptual_weight: float = 1.0,
        style_weight: float = 0.0,
        criterion: str = 'l1',
        weights: str | None = None,
    ):
        usual_path = vgg_arch.VGG_PRETRAIN_PATH
        vgg_arch.VGG_PRETRAIN_PATH = find_vgg_weights(vgg_type, weights)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', module='torchvision')  # BasicSR passes the old argument `pretrained`
                super().__init__(
                    layer_weights, vgg_type, use_input_norm, range_norm, perceptual_weight, style_weight, criterion
                )
        except (RuntimeError, UnpicklingError) as error:
            raise ValueError(f'{vgg_arch.VGG_PRETRAIN_PATH} does not contain {vgg_type}: {error}') from error
        finally:
            vgg_arch.VGG_PRETRAIN_PATH = usual_path


def find_vgg_weights(vgg_type: str, weights: str | None) -> str:
    """The file of VGG weights to use; see VGGPerceptualLoss."""
    if vgg_type.removesuffix('_bn') not in vgg_arch.NAMES:
        raise ValueError(f'vgg_type: must be one of {", ".join(vgg_arch.NAMES)}, with or without _bn, got {vgg_type!r}')
    url = torchvision.models.get_model_weights(vgg_type).IMAGENET1K_V1.url
    if weights is not None:
        candidates = [osp.expanduser(weights)]
    else:
        folders = osp.dirname(vgg_arch.VGG_PRETRAIN_PATH), osp.join(torch.hub.get_dir(), 'checkpoints')
        candidates = [osp.join(folder, osp.basename(url)) for folder in folders]
    for path in candidates:
        if osp.isfile(path):
            return path
    raise FileNotFoundError(
        f'The perceptual loss needs the ImageNet weights of {vgg_type}; there is no {" and no ".join(candidates)}. '
        f"`dpmambair fetch {vgg_type}` downloads {url} to torch's cache; or set the option weights"
    )
