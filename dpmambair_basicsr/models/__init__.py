"""Training logic. Importing this package registers the models in BasicSR's MODEL_REGISTRY."""

from dpmambair_basicsr.models.degradation_extractor_model import DegradationExtractorModel
from dpmambair_basicsr.models.restoration_model import RestorationModel

__all__ = ['DegradationExtractorModel', 'RestorationModel']
