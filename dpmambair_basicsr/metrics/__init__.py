"""Metrics: called as metric(img, img2, **options) on 8-bit arrays, see BasicSR's `calculate_metric`.

PSNR and SSIM are BasicSR's; `patches/ssim` makes the latter faster.
"""

from dpmambair_basicsr.metrics.lpips import calculate_lpips

__all__ = ['calculate_lpips']
