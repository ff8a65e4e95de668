"""Scans on NVIDIA GPUs by CUDA kernels compiled at run time: fp32, bf16 and fp16, in any mixture."""

from dpmambair_basicsr.ops.selective_scan.cuda.omni import omni_scan
from dpmambair_basicsr.ops.selective_scan.cuda.runtime import why_unavailable
from dpmambair_basicsr.ops.selective_scan.cuda.selective import scan

name, reads_half = 'cuda', True

__all__ = ['name', 'omni_scan', 'reads_half', 'scan', 'why_unavailable']
