"""VmambaIR and DPMambaIR for spandrel, the model loader of chaiNNer, ComfyUI and others (`pip install spandrel`).

After `install()`, spandrel's ModelLoader recognises their checkpoints, ours and the published ones of VmambaIR, by
names and shapes of parameters, and builds the network from these. VmambaIR's channel_fusion cannot be inferred:
it is assumed to be 'add' at scale 1 and 'modulate' otherwise, as published.
"""

from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchRegistry,
    ArchSupport,
    ImageModelDescriptor,
    ModelTiling,
    StateDict,
)
from torch import nn

from dpmambair_basicsr.archs import DPMambaIR, VmambaIR
from dpmambair_basicsr.archs.recognition import (
    dpmambair_options,
    is_dpmambair,
    is_vmambair,
    own_names,
    vmambair_options,
)


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Adds both architectures to spandrel's registry. Idempotent."""
    supports = [ArchSupport.from_architecture(architecture) for architecture in (VmambaIRArch(), DPMambaIRArch())]
    registry.add(*supports, ignore_duplicates=True)


class VmambaIRArch(Architecture[VmambaIR]):
    def __init__(self):
        super().__init__(id='VmambaIR', detect=lambda state: is_vmambair(own_names(state)))

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[VmambaIR]:
        state_dict = own_names(state_dict)
        return describe(self, VmambaIR(**vmambair_options(state_dict)), state_dict)


class DPMambaIRArch(Architecture[DPMambaIR]):
    """Not for degradation 'class', which needs a label per image."""

    def __init__(self):
        super().__init__(id='DPMambaIR', detect=lambda state: is_dpmambair(own_names(state)))

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[DPMambaIR]:
        state_dict = own_names(state_dict)
        return describe(self, DPMambaIR(**dpmambair_options(state_dict)), state_dict)


def describe(architecture: Architecture, net: nn.Module, state_dict: StateDict) -> ImageModelDescriptor:
    channels, scale = state_dict['patch_embed.proj.weight'].shape[1], getattr(net, 'scale', 1)
    return ImageModelDescriptor(
        net,
        state_dict,
        architecture=architecture,
        purpose='Restoration' if scale == 1 else 'SR',
        tags=[f'{net.patch_embed.proj.out_channels}dim'],
        supports_half=True,
        supports_bfloat16=True,
        scale=scale,
        input_channels=channels,
        output_channels=channels,
        tiling=ModelTiling.DISCOURAGED,  # the scans reach across the whole image
    )
