"""Compile CUDA C++ with NVRTC on first use, cache it on the disk, and launch it: no toolkit, no C++ compiler.

Uses cuda.bindings, NVIDIA's own package for Python, which PyTorch's CUDA builds for Linux require. Launches go to
PyTorch's current stream of the tensors' device and allocate nothing, so CUDA graphs can record them once the kernels
are compiled.
"""

import ctypes
import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpmambair_basicsr.files.atomic import replacing

HERE = Path(__file__).parent
OPTIONS = ('--std=c++17', '-default-device')
# Name -> its source.
FILES = {
    'forward': ('types.cuh', 'scan_common.cuh', 'scan_forward.cu'),
    'backward': ('types.cuh', 'scan_common.cuh', 'scan_backward.cu'),
    'layer_norm': ('types.cuh', 'gates.cuh', 'layer_norm.cu'),
    'depthwise': ('types.cuh', 'gates.cuh', 'depthwise.cu'),
}
# (arguments, grid, stream) -> None
Kernel = Callable[[ctypes.Structure, int, int], None]
# (name of a kernel, threads of a block, bytes of dynamic shared memory) -> Kernel
Module = Callable[[str, int, int], Kernel]


class CudaError(RuntimeError):
    """A call of the driver or of NVRTC failed."""


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run on this device in this type, and what to install; None if it can."""
    if dtype != torch.float32:
        return f'it computes in float32, not {str(dtype).removeprefix("torch.")}'
    return _device_trouble(device)


@functools.cache
def _device_trouble(device):
    if device.type != 'cuda' or torch.version.hip or not torch.cuda.is_available():
        return 'it needs an NVIDIA GPU'
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f'it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less'
    return _trouble(architecture(device))


@functools.cache
def _trouble(architecture):
    try:
        from cuda.bindings import driver, nvrtc

        check(driver.cuInit(0))
        major, minor = check(nvrtc.nvrtcVersion())
        known = check(nvrtc.nvrtcGetSupportedArchs())
    except Exception as error:  # any: a package or library is missing, or does not match the driver
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())  # on one line
        reason = f'cuda.bindings or NVRTC does not work ({reason}); {_advice()}'
    else:
        if architecture in map(str, known):
            return None
        reason = f'NVRTC {major}.{minor} does not know this GPU, sm_{architecture}; {_advice()} of a newer CUDA'
    logging.getLogger('basicsr').warning('selective_scan: much faster on this GPU by CUDA kernels, but %s', reason)
    return reason


def _advice():
    major = (torch.version.cuda or '13').partition('.')[0]
    return f"pip install 'cuda-bindings=={major}.*' nvidia-cuda-nvrtc{'-cu12' if major == '12' else ''}"


def architecture(device: torch.device) -> str:
    """The architecture of a GPU, such as '90'."""
    return '{}{}'.format(*torch.cuda.get_device_capability(device))


def shared_limit(device: torch.device) -> int:
    """Maximum shared memory of a block, in bytes."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@contextmanager
def launching_on(device: torch.device) -> Iterator[int]:
    """A context in which kernels can be launched on this GPU; yields PyTorch's current stream there."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        if not int(check(driver.cuCtxGetCurrent())):  # a thread, such as autograd's, in which nothing has run yet
            check(driver.cuCtxSetCurrent(_primary_context(torch.cuda.current_device())))
        yield torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _primary_context(index):
    from cuda.bindings import driver

    return check(driver.cuDevicePrimaryCtxRetain(check(driver.cuDeviceGet(index))))


@functools.cache
def load(name: str, constants: tuple[tuple[str, int | str], ...], device: torch.device) -> Module:
    """The kernels of a name in `FILES` with these macros, loaded in the current context, which must be the device's.

    Raises:
        CudaError: they do not compile, or the driver rejects them.
    """
    from cuda.bindings import driver

    module = check(driver.cuModuleLoadData(machine_code(name, constants, architecture(device))))

    def kernel(name, threads, shared):
        function = check(driver.cuModuleGetFunction(module, name.encode()))
        if shared:
            attribute = driver.CUfunction_attribute
            limit, split = (
                attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
            )
            check(driver.cuFuncSetAttribute(function, limit, shared))
            check(driver.cuFuncSetAttribute(function, split, 100))
        launch = driver.cuLaunchKernel

        def run(arguments, grid, stream):
            pointer = ctypes.c_void_p(ctypes.addressof(arguments))
            result = launch(function, grid, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointer), 0)
            if result[0]:
                check(result)

        return run

    return kernel


def source(name: str, constants: tuple[tuple[str, int | str], ...]) -> str:
    """Its text with these macros; -D would define N, T, ... in NVRTC's own headers too."""
    macros = ''.join(f'#define {key} {value}\n' for key, value in constants)
    return macros + ''.join((HERE / file).read_text('utf-8') for file in FILES[name])


def machine_code(name: str, constants: tuple[tuple[str, int | str], ...], architecture: str) -> bytes:
    """The machine code, compiled now unless this or another process has done so before."""
    from cuda.bindings import nvrtc

    text = source(name, constants)
    version = '.'.join(map(str, check(nvrtc.nvrtcVersion())))
    key = hashlib.sha256('\n'.join([version, architecture, *OPTIONS, text]).encode()).hexdigest()
    file = cache_folder() / f'{name}_sm{architecture}_{key[:40]}.cubin'
    code = read_code(file)
    if code is None:
        _say_once('selective_scan: compiling CUDA kernels for this GPU, seconds for each width of a network, once')
        code, _ = compile_source(text, FILES[name][-1], architecture)
        try:
            write_code(file, code)
        except OSError as error:
            _say_once(f'selective_scan: compiled CUDA kernels cannot be cached; every process compiles them: {error}')
    return code


def compile_source(text: str, name: str, architecture: str, *options: str) -> tuple[bytes, str]:
    """Machine code for sm_<architecture>, and the compiler's log.

    Raises:
        CudaError: with the compiler's first error.
    """
    from cuda.bindings import nvrtc

    program = check(nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))
    try:
        words = [word.encode() for word in (f'--gpu-architecture=sm_{architecture}', *OPTIONS, *options)]
        result = nvrtc.nvrtcCompileProgram(program, len(words), words)
        log = bytearray(check(nvrtc.nvrtcGetProgramLogSize(program)))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        said = log.decode(errors='replace').strip('\0 \n')
        if result[0]:
            raise CudaError(f'selective_scan: NVRTC cannot compile {name} for sm_{architecture}: {said}')
        code = bytearray(check(nvrtc.nvrtcGetCUBINSize(program)))
        check(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(code), said


def cache_folder() -> Path:
    """Folder of compiled kernels in the user's cache: XDG_CACHE_HOME, on Windows LOCALAPPDATA, else ~/.cache."""
    variable = 'LOCALAPPDATA' if sys.platform == 'win32' else 'XDG_CACHE_HOME'
    root = os.environ.get(variable) or os.path.join(os.path.expanduser('~'), '.cache')
    return Path(root) / 'dpmambair_basicsr' / 'cuda'


def read_code(file: Path) -> bytes | None:
    """Read a file of `write_code`; None if it is missing or damaged."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    digest, code = stored[:32], stored[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def write_code(file: Path, code: bytes) -> None:
    """Write atomically, preceded by a checksum: after a power cut, a file may exist without its content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, durable=False, shared=True) as part:
        part.write_bytes(hashlib.sha256(code).digest() + code)


def check(result) -> Any:
    """The result of a call of cuda.bindings without its error code.

    Raises:
        CudaError: the code is an error.
    """
    error, *values = result
    if error:
        raise CudaError(f'selective_scan: {error.name}')
    return values[0] if len(values) == 1 else tuple(values) or None


@functools.cache
def _say_once(text):
    logging.getLogger('basicsr').info(text)
