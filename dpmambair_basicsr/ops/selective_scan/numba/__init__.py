"""Scans on a CPU, compiled by numba: fp32."""

from dpmambair_basicsr.ops.selective_scan.numba.omni import omni_scan
from dpmambair_basicsr.ops.selective_scan.numba.runtime import why_unavailable
from dpmambair_basicsr.ops.selective_scan.numba.selective import scan

name, reads_half = 'numba', False

__all__ = ['name', 'omni_scan', 'reads_half', 'scan', 'why_unavailable']
