"""Datasets, and the degradations they synthesise (`dpmambair_basicsr.data.degradations`)."""

from dpmambair_basicsr.registry import lazy_attributes

MODULES = {
    'MixedDegradationDataset': 'mixed_degradation_dataset',
    'PairedDegradationDataset': 'paired_degradation_dataset',
    'SyntheticDegradationDataset': 'synthetic_degradation_dataset',
}  # name -> module; each is imported by itself, because not every BasicSR has what all of them need

__all__ = list(MODULES)
__getattr__ = lazy_attributes(__name__, MODULES)
