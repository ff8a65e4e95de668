from torch import Tensor
from torch.nn import functional as F


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (b, c, h, w) at the bottom and right so that h and w become multiples of `multiple`.

    By reflection, as in the published test scripts; by replication where the image is too small to reflect.
    """
    h, w = x.shape[-2:]
    bottom, right = -h % multiple, -w % multiple
    if right:
        x = F.pad(x, (0, right, 0, 0), mode='reflect' if right < w else 'replicate')
    if bottom:
        x = F.pad(x, (0, 0, 0, bottom), mode='reflect' if bottom < h else 'replicate')
    return x
