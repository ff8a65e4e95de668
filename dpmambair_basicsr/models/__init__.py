"""Training logic. Importing this package registers the models in BasicSR's MODEL_REGISTRY."""

from dpmambair_basicsr.models.degradation_extractor_model import DegradationExtractorModel
from dpmambair_basicsr.models.real_world_sr_gan_model import RealWorldSRGANModel
from dpmambair_basicsr.models.real_world_sr_model import RealWorldSRModel
from dpmambair_basicsr.models.restoration_gan_model import RestorationGANModel
from dpmambair_basicsr.models.restoration_model import RestorationModel

__all__ = [
    'DegradationExtractorModel',
    'RealWorldSRGANModel',
    'RealWorldSRModel',
    'RestorationGANModel',
    'RestorationModel',
]
