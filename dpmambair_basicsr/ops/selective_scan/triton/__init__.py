"""Scans on NVIDIA GPUs, compiled by Triton: fp32, bf16 and fp16, mixed as they come."""

from dpmambair_basicsr.ops.selective_scan.triton.omni import omni_scan
from dpmambair_basicsr.ops.selective_scan.triton.selective import scan, why_unavailable

name, reads_half = 'triton', True

__all__ = ['name', 'omni_scan', 'reads_half', 'scan', 'why_unavailable']
