from basicsr.models.realesrnet_model import RealESRNetModel

from dpmambair_basicsr.models.restoration_model import RestorationModel
from dpmambair_basicsr.models.two_order_degradation import TwoOrderDegradation
from dpmambair_basicsr.registry import MODEL_REGISTRY


@MODEL_REGISTRY.register()
class RealWorldSRModel(RestorationModel, TwoOrderDegradation, RealESRNetModel):
    """VmambaIR's real-world SR, first stage: RestorationModel on the LQ images of Real-ESRGAN's two-order degradation.

    Options: RestorationModel's and TwoOrderDegradation's.
    """

    @classmethod
    def check_training(cls, opt: dict) -> None:
        super().check_training(opt)
        cls.check_degradation(opt)
