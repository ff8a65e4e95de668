"""Datasets, and the degradations they synthesise (`dpmambair_basicsr.data.degradations`)."""

from dpmambair_basicsr.data.mixed_degradation_dataset import MixedDegradationDataset
from dpmambair_basicsr.data.paired_degradation_dataset import PairedDegradationDataset
from dpmambair_basicsr.data.synthetic_degradation_dataset import SyntheticDegradationDataset

__all__ = ['MixedDegradationDataset', 'PairedDegradationDataset', 'SyntheticDegradationDataset']
