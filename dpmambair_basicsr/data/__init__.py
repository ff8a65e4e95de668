"""Datasets, and the degradations they synthesise (`dpmambair_basicsr.data.degradations`)."""

from dpmambair_basicsr.registry import lazy_attributes

MODULES = {
    'MixedDegradationDataset': 'mixed_degradation_dataset',
    'PairedDegradationDataset': 'paired_degradation_dataset',
    'SyntheticDegradationDataset': 'synthetic_degradation_dataset',
}  # name -> module; imported separately, because some need more than every BasicSR has

__all__ = list(MODULES)
__getattr__ = lazy_attributes(__name__, MODULES)
