"""Metrics: called as metric(img, img2, **options) on 8-bit arrays, see BasicSR's `calculate_metric`."""

from dpmambair_basicsr.metrics.lpips import calculate_lpips

__all__ = ['calculate_lpips']
