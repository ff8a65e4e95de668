"""Networks. They require only PyTorch."""

from dpmambair_basicsr.archs.degradation_extractor_arch import DegradationAutoencoder, DegradationExtractor
from dpmambair_basicsr.archs.dpmambair_arch import DPMambaIR, HighFrequencyEnhancementBlock
from dpmambair_basicsr.archs.peers_arch import PeerNAFNet, PeerRestormer
from dpmambair_basicsr.archs.vmambair_arch import VmambaIR

__all__ = [
    'DPMambaIR',
    'DegradationAutoencoder',
    'DegradationExtractor',
    'HighFrequencyEnhancementBlock',
    'PeerNAFNet',
    'PeerRestormer',
    'VmambaIR',
]
