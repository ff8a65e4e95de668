"""The LPIPS network (Zhang et al. 2018, package `lpips`) from weights on disk: nothing is ever downloaded."""

import warnings
from os import path as osp

import lpips
import torch
import torchvision

BACKBONES = {
    'alex': torchvision.models.AlexNet_Weights.IMAGENET1K_V1,
    'vgg': torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    'squeeze': torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}


def backbone_path(net: str) -> str:
    """Path of the ImageNet weights of `net` in torch's hub cache, as used by torchvision."""
    return osp.join(torch.hub.get_dir(), 'checkpoints', osp.basename(BACKBONES[net].url))


def build_lpips(net: str = 'alex', weights: str | None = None) -> lpips.LPIPS:
    """LPIPS in eval mode with frozen parameters. The linear heads come with the package, the backbone from a file.

    Call it with `normalize=True` on (b, 3, h, w) RGB in [0, 1]; it returns (b, 1, 1, 1).

    Args:
        net: 'alex', 'vgg' or 'squeeze'.
        weights: torchvision's checkpoint of AlexNet, VGG16 or SqueezeNet 1.1; None looks in torch's hub cache.

    Raises:
        ValueError: unknown `net`, or the file holds another network.
        FileNotFoundError: no such file; says how to get it.
    """
    if net not in BACKBONES:
        raise ValueError(f'net must be one of {", ".join(BACKBONES)}, got {net!r}')
    path = backbone_path(net) if weights is None else osp.expanduser(weights)
    if not osp.isfile(path):
        raise FileNotFoundError(
            f'LPIPS needs the ImageNet weights of its backbone {net!r} in {path}: '
            f"`dpmambair fetch {net}` downloads {BACKBONES[net].url} to torch's cache; "
            'or set the option weights'
        )
    state = torch.load(path, map_location='cpu', weights_only=True)

    # The backbone's initial weights are overwritten below: they must not advance the generator of a training.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            'ignore', module='torchvision'
        )  # lpips 0.1.4 passes torchvision's old argument `pretrained`
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)

    # torchvision's features.3.squeeze.weight is slice2.3.squeeze.weight in lpips.
    names = {f'features.{name.split(".", 1)[1]}': name for name in network.net.state_dict()}
    own = network.net.state_dict()
    found = {key: value for key, value in state.items() if key.startswith('features.')}
    wrong = sorted(found.keys() ^ names.keys())
    wrong += [key for key in names if key in found and found[key].shape != own[names[key]].shape]
    if wrong:
        raise ValueError(
            f'{path} does not contain the LPIPS backbone {net!r} ({osp.basename(BACKBONES[net].url)}): '
            f'{len(wrong)} of its parameters are missing, unknown or of another shape, first {wrong[0]}'
        )
    network.net.load_state_dict({names[key]: value.float() for key, value in found.items()})
    return network.requires_grad_(False).eval()
