"""Metrics: called as metric(img, img2, **options) on 8-bit arrays, see BasicSR's `calculate_metric`.

PSNR and SSIM are BasicSR's; `patches/ssim` makes the latter faster.
"""

from dpmambair_basicsr.registry import lazy_attributes

MODULES = {
    'calculate_iqa': 'iqa',
    'calculate_lpips': 'lpips',
}  # name -> module; imported separately, because some need more than every BasicSR has

__all__ = list(MODULES)
__getattr__ = lazy_attributes(__name__, MODULES)
