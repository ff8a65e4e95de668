"""The names of `import mamba_ssm`."""

from dpmambair_basicsr.standins.mamba_simple import Mamba
from dpmambair_basicsr.standins.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__all__ = ['Mamba', 'mamba_inner_fn', 'selective_scan_fn']
