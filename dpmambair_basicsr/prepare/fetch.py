"""Downloads the weights that LPIPS, DISTS and the perceptual loss need: `dpmambair fetch alex`.

The files are stored in torch's hub cache, as by torchvision, where these losses look for them. The SHA-256 of
torchvision's files is checked against the digits in their names; that of DISTS's own weights is not published, and
DISTSLoss checks what it reads.
"""

import argparse
from pathlib import Path

from dpmambair_basicsr.files.atomic import sha256
from dpmambair_basicsr.files.errors import InputError, MissingLibraryError, exit_on_error
from dpmambair_basicsr.registry import did_you_mean


def main() -> None:
    parser = argparse.ArgumentParser(prog='dpmambair fetch', description=(__doc__ or '').partition('\n\n')[2])
    parser.add_argument(
        'names',
        nargs='+',
        metavar='NAME',
        help='for LPIPS (option net): alex, vgg, squeeze; for DISTS: vgg and dists; '
        'for VGGPerceptualLoss (option vgg_type): vgg11, ..., vgg19, each also with _bn',
    )
    names = parser.parse_args().names
    with exit_on_error('dpmambair fetch', OSError):
        known = urls()
        for name in names:
            if name not in known:
                raise InputError(f'{name}: unknown name{did_you_mean(name, known)}')
            print(fetch(known[name]))


def urls() -> dict[str, str]:
    """URL of each file, by its name here.

    Raises:
        MissingLibraryError: a library that needs these files, and knows their URLs, is not installed.
    """
    try:
        from torchvision import models

        from dpmambair_basicsr.losses.dists_loss import HEADS_URL
        from dpmambair_basicsr.losses.lpips_network import BACKBONES
    except ImportError as error:
        raise MissingLibraryError(
            f"needs the requirements of training ({error}): pip install 'dpmambair_basicsr[train]'"
        ) from error
    perceptual = {name: models.get_model_weights(name).IMAGENET1K_V1 for name in models.list_models(include='vgg*')}
    return {name: weights.url for name, weights in (BACKBONES | perceptual).items()} | {'dists': HEADS_URL}


def fetch(url: str) -> Path:
    """The file in torch's hub cache, downloaded atomically if missing.

    Args:
        url: of a file whose name ends in a dash and the first digits of its SHA-256, as in alexnet-owt-7be5be79.pth;
            otherwise nothing is checked.

    Raises:
        InputError: the existing or downloaded file has another SHA-256.
        OSError: it cannot be downloaded or written.
    """
    import torch

    file = Path(torch.hub.get_dir(), 'checkpoints', url.rpartition('/')[2])
    digits = file.stem.rpartition('-')[2] if '-' in file.stem else ''
    if file.exists():
        if not sha256(file).startswith(digits):
            raise InputError(f'{file}: not the file at {url}, its SHA-256 does not start with {digits}; delete it')
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), digits)
    except RuntimeError as error:
        raise InputError(f'{url}: {error}; nothing was kept, try again') from error
    except OSError as error:
        raise OSError(f'{url} cannot be downloaded to {file}: {error}') from error
    return file


if __name__ == '__main__':
    main()
