from basicsr.models.realesrgan_model import RealESRGANModel

from dpmambair_basicsr.models.restoration_gan_model import RestorationGANModel
from dpmambair_basicsr.models.two_order_degradation import TwoOrderDegradation
from dpmambair_basicsr.registry import MODEL_REGISTRY


@MODEL_REGISTRY.register()
class RealWorldSRGANModel(RestorationGANModel, TwoOrderDegradation, RealESRGANModel):
    """VmambaIR's real-world SR, second stage: RestorationGANModel on Real-ESRGAN's two-order degradation.

    Options: RestorationGANModel's and TwoOrderDegradation's, and
        train.ldl_opt: loss on artefacts (LDL, Liang et al. 2022), as RealESRGANModel has it; VmambaIR has none.

    Raises:
        ValueError: `ldl_opt` without the average of the network that it compares with.
    """

    batch_names = (*RestorationGANModel.batch_names, 'gt_usm')
    loss_keys = (*RestorationGANModel.loss_keys, 'ldl_opt')

    @classmethod
    def check_training(cls, opt: dict) -> None:
        super().check_training(opt)
        cls.check_degradation(opt)
        if opt['train'].get('ldl_opt') and not opt['train'].get('ema_decay'):
            raise ValueError('train.ema_decay: missing, train.ldl_opt needs it')
