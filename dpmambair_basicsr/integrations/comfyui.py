"""A ComfyUI node that restores images. To install it, put this line into custom_nodes/dpmambair.py of ComfyUI:

from dpmambair_basicsr.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
"""

from functools import lru_cache
from pathlib import Path

from torch import Tensor

from dpmambair_basicsr import load


@lru_cache(maxsize=1)
def loaded(weights: str, changed: int):
    """The network of a checkpoint, cached until another one is requested or the file changes."""
    return load(weights)


class RestoreImage:
    """Implements ComfyUI's node interface, see "Custom node properties" in its documentation."""

    CATEGORY = 'image/restoration'
    FUNCTION = 'restore'
    RETURN_TYPES = ('IMAGE',)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            'required': {
                'image': ('IMAGE',),
                'weights': ('STRING', {'default': 'net_g_latest.pth', 'tooltip': 'checkpoint, .pth or .safetensors'}),
                'tile': ('INT', {'default': 0, 'min': 0, 'max': 8192, 'step': 8, 'tooltip': '0: by the image size'}),
                'self_ensemble': ('BOOLEAN', {'default': False, 'tooltip': 'average of eight flips, 8x the time'}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, weights: str) -> bool | str:
        return Path(weights).is_file() or f'{weights}: no such file'

    def restore(self, image: Tensor, weights: str, tile: int, self_ensemble: bool) -> tuple[Tensor]:
        """ComfyUI's IMAGE, (B, H, W, 3) RGB in [0, 1], to the same, enlarged by the scale of the network."""
        net = loaded(weights, Path(weights).stat().st_mtime_ns)
        restored = net.restore(image.movedim(-1, 1), tile=tile or None, self_ensemble=self_ensemble)
        assert isinstance(restored, Tensor), 'tensors give tensors'
        return (restored.movedim(1, -1).contiguous(),)


NODE_CLASS_MAPPINGS = {'DPMambaIRRestore': RestoreImage}
NODE_DISPLAY_NAME_MAPPINGS = {'DPMambaIRRestore': 'Restore image (DPMambaIR, VmambaIR)'}
