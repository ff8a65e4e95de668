import numpy as np
import torch
from torch import Tensor


def to_tensor(image: np.ndarray, crop_border: int) -> Tensor:
    """[0, 255] (H, W, 3) BGR or (H, W) to [0, 1] (1, 3, h, w) RGB, without `crop_border` pixels at each edge."""
    image = np.stack([image] * 3, axis=2) if image.ndim == 2 else image[..., ::-1]
    image = image[crop_border : image.shape[0] - crop_border, crop_border : image.shape[1] - crop_border]
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / 255)[None]
