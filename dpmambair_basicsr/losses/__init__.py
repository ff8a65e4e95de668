"""Losses: called as loss(pred, target), BasicSR's way."""

from dpmambair_basicsr.losses.fft_loss import FFTLoss
from dpmambair_basicsr.losses.lpips_loss import LPIPSLoss
from dpmambair_basicsr.losses.psnr_loss import PSNRLoss
from dpmambair_basicsr.losses.vgg_perceptual_loss import VGGPerceptualLoss

__all__ = ['FFTLoss', 'LPIPSLoss', 'PSNRLoss', 'VGGPerceptualLoss']
