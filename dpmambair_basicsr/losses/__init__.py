"""Losses, called as loss(pred, target), as in BasicSR."""

from dpmambair_basicsr.registry import lazy_attributes

MODULES = {
    'DISTSLoss': 'dists_loss',
    'FFTLoss': 'fft_loss',
    'FocalFrequencyLoss': 'focal_frequency_loss',
    'LPIPSLoss': 'lpips_loss',
    'MSSSIMLoss': 'ms_ssim_loss',
    'PSNRLoss': 'psnr_loss',
    'VGGPerceptualLoss': 'vgg_perceptual_loss',
}  # name -> module; imported separately, because some need more than every BasicSR has

__all__ = list(MODULES)
__getattr__ = lazy_attributes(__name__, MODULES)
