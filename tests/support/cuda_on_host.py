"""The CUDA kernels' own sources, built by g++ and run on the CPU: threads of a block are fibers, see host_shim.h."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dpmambair_basicsr.ops.selective_scan.backend import get_backend
from dpmambair_basicsr.ops.selective_scan.cuda import launch, pixels, runtime

HERE = Path(__file__).parent
needs_gxx = pytest.mark.skipif(
    shutil.which('g++') is None, reason='g++, which builds the kernels for the CPU, is missing'
)


def compiler_missing():
    try:
        from cuda.bindings import nvrtc

        return nvrtc.nvrtcVersion()[0]
    except Exception as error:  # any: the package or the library is missing
        return error


needs_nvrtc = pytest.mark.skipif(bool(compiler_missing()), reason='cuda-bindings or nvidia-cuda-nvrtc is not installed')


@functools.cache
def build_dir():
    return tempfile.TemporaryDirectory(prefix='cuda_on_host')


@functools.cache
def load(name, constants, device):
    """Replaces `runtime.load`."""
    text = runtime.source(name, constants)
    kernels = re.findall(r'void __launch_bounds__\(.*\) (\w+)\(const __grid_constant__ (\w+) ', text)
    lines = ['#include "host_shim.h"', text, *(f'HOST_KERNEL({kernel}, {kind})' for kernel, kind in kernels)]
    folder = Path(tempfile.mkdtemp(dir=build_dir().name))
    (folder / 'host.cpp').write_text('\n'.join(lines))
    # no-gnu-unique: libraries of other macros would share static variables, the kernels' shared memory
    command = ['g++', '-O1', '-std=c++20', '-shared', '-fPIC', '-fno-gnu-unique', '-w', f'-I{HERE}']
    subprocess.run([*command, 'host.cpp', '-o', 'host.so'], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / 'host.so'))

    def kernel(name, threads, shared):
        function = getattr(library, f'run_{name}')

        def run(arguments, grid, stream):
            function(ctypes.byref(arguments), ctypes.c_uint(grid), ctypes.c_uint(threads))

        return run

    return kernel


def resources(text: str, name: str, architecture: int) -> dict[str, tuple[int, int]]:
    """By kernel, from NVRTC's report for an architecture: bytes that a thread spills, and its registers."""
    code, said = runtime.compile_source(text, name, str(architecture), '--ptxas-options=-v')
    assert code[:4] == b'\x7fELF'
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return {kernel: (int(spilled), int(used)) for kernel, spilled, used in re.findall(pattern, said, re.S)}


@contextmanager
def launching_on(device):
    yield 0


def install(monkeypatch, shared_limit=227 << 10):
    """Makes the backend 'cuda' compute on the CPU, with the shared memory of a GPU."""
    launch._launches.cache_clear()
    pixels._kernel.cache_clear()
    for module in (launch, pixels):
        monkeypatch.setattr(module, 'load', load)
        monkeypatch.setattr(module, 'launching_on', launching_on)
    monkeypatch.setattr(launch, 'shared_limit', lambda device: shared_limit)
    backend, only_fp32 = get_backend('cuda'), 'it computes in float32'
    monkeypatch.setattr(backend, 'why_unavailable', lambda device, dtype: None if dtype == torch.float32 else only_fp32)
