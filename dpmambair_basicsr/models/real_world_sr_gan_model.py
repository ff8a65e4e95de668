from basicsr.models.realesrgan_model import RealESRGANModel
from basicsr.utils.registry import MODEL_REGISTRY

from dpmambair_basicsr.models.restoration_gan_model import RestorationGANModel
from dpmambair_basicsr.models.two_order_degradation import TwoOrderDegradation


@MODEL_REGISTRY.register()
class RealWorldSRGANModel(RestorationGANModel, TwoOrderDegradation, RealESRGANModel):
    """VmambaIR's real-world SR, second stage: RestorationGANModel on Real-ESRGAN's two-order degradation.

    Options: RestorationGANModel's and TwoOrderDegradation's.
    """
