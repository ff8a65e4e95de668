"""Tensor operations. They need torch only: importing this package imports neither basicsr nor a kernel compiler."""

from dpmambair_basicsr.ops.cross_scan import cross_merge, cross_scan
from dpmambair_basicsr.ops.omni_scan import omni_scan
from dpmambair_basicsr.ops.pad import pad_to_multiple
from dpmambair_basicsr.ops.selective_scan import selective_scan, use_backend

__all__ = ['cross_merge', 'cross_scan', 'omni_scan', 'pad_to_multiple', 'selective_scan', 'use_backend']
