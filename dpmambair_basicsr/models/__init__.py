"""Models: what is trained, and how, as in BasicSR."""

from dpmambair_basicsr.registry import lazy_attributes

MODULES = {
    'DegradationExtractorModel': 'degradation_extractor_model',
    'RealWorldSRGANModel': 'real_world_sr_gan_model',
    'RealWorldSRModel': 'real_world_sr_model',
    'RestorationGANModel': 'restoration_gan_model',
    'RestorationModel': 'restoration_model',
}  # name -> module; imported separately, because some need more than every BasicSR has

__all__ = list(MODULES)
__getattr__ = lazy_attributes(__name__, MODULES)

import basicsr  # noqa: E402, F401  (registers us, which imports our models, before one of them is half imported)
