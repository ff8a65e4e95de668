from basicsr.models.realesrgan_model import RealESRGANModel

from dpmambair_basicsr.models.restoration_gan_model import RestorationGANModel
from dpmambair_basicsr.models.two_order_degradation import TwoOrderDegradation
from dpmambair_basicsr.registry import MODEL_REGISTRY


@MODEL_REGISTRY.register()
class RealWorldSRGANModel(RestorationGANModel, TwoOrderDegradation, RealESRGANModel):
    """VmambaIR's real-world SR, second stage: RestorationGANModel on Real-ESRGAN's two-order degradation.

    Options: RestorationGANModel's and TwoOrderDegradation's.
    """

    batch_names = (*RestorationGANModel.batch_names, 'gt_usm')

    @classmethod
    def check_training(cls, opt: dict) -> None:
        super().check_training(opt)
        cls.check_degradation(opt)
