"""How the CUDA kernels are planned, compiled and cached. No GPU is needed: the compiler is a library."""

import io
import logging
import re
import sys

import pytest
import torch
from support.cuda_on_host import needs_nvrtc, resources

from dpmambair_basicsr.ops.selective_scan.backend import get_backend
from dpmambair_basicsr.ops.selective_scan.cuda import launch, plan, runtime

ALL = (0, 1, 2, 3)
KERNELS = {
    'forward': {'scan_ends', 'scan_chain', 'scan_outputs'},
    'backward': {'scan_adjoint_ends', 'scan_adjoint_chain', 'scan_gradients'},
}


def macros(b=1, d=96, length=65536, n=16, rank=6, directions=ALL, dtype=torch.float32, limit=227 << 10):
    """The macros that `runtime.load` gets for each specialization that a scan of this shape launches."""
    made = plan.make_plan(b, d, length, n, rank, directions, limit)
    kind = launch._TYPES[dtype]
    constants = made.constants | {'SOFTPLUS': 1, 'TX': kind, 'TD': kind, 'TP': kind}
    return [plan.specialize(constants, together) for together in {max(1, len(pair)) for pair in made.pairs}]


# --- partition of the work

SHAPES = [
    (b, d, length, n, rank, directions, limit)
    for b in (1, 8)
    for d in (1, 20, 48, 96, 100, 384, 1000)
    for length in (1, 35, 4096, 2**20)
    for n, rank in ((1, 1), (16, 0), (16, 6), (17, 24), (32, 64))
    for directions in ((0,), ALL, (0, 0, 2, 1))
    for limit in (227 << 10, 99 << 10)
]


def test_every_position_and_channel_is_in_one_tile_and_every_order_in_one_launch():
    for b, d, length, n, rank, directions, limit in SHAPES:
        made, k = plan.make_plan(b, d, length, n, rank, directions, limit), len(directions)
        c = made.constants
        assert made.chunks * c['T'] >= length > (made.chunks - 1) * c['T']
        assert made.blocks * 8 * c['CC'] * c['W'] >= d > (made.blocks - 1) * 8 * c['CC'] * c['W']
        assert plan.states_shape(b, d, length, k, n) == (b, k, made.chunks * (c['T'] // c['CHECK']), n, d)
        if rank:
            assert sorted(sum(made.pairs, ())) == list(range(k))
            assert all(abs(directions[pair[0]] - directions[pair[-1]]) == 2 for pair in made.pairs if len(pair) == 2)
        for steps in (plan.forward_steps(made, b, d, k), plan.backward_steps(made, b, d, k)):
            assert len(steps) == len(made.pairs) + (2 if made.chunks > 1 else 0)
            assert all(0 < step.threads <= 1024 and 0 < step.grid < 2**31 for step in steps)
            assert all(step.shared <= limit for step in steps)


def test_long_sequences_have_long_chunks_and_short_ones_enough_warps():
    assert [plan.chunk_length(1, 96, length, 4) for length in (256, 2**15, 2**16, 2**20)] == [16, 64, 128, 128]


@pytest.mark.parametrize(('rank', 'limit'), [(512, 48 << 10), (5000, 227 << 10)])
def test_scans_that_exceed_shared_memory_are_refused(rank, limit):
    with pytest.raises(
        ValueError, match=f'^selective_scan: backend cuda has too little shared .* n = 32 .* rank {rank}$'
    ):
        plan.make_plan(1, 96, 4096, 32, rank, ALL, limit)


# --- machine code

# Bytes that a thread of a kernel may spill, from measurements with NVRTC 13.0: 76 in scan_gradients (compute
# capability 8.0), 236 in the plain scan's, 280 with 32 states.
CASES = [pytest.param(architecture, {}, 96, id=f'sm_{architecture}') for architecture in (80, 86, 89, 90, 100, 120)]
CASES += [
    pytest.param(90, {'d': 384, 'length': 1024, 'rank': 24}, 96, id='many channels'),
    pytest.param(90, {'rank': 0, 'directions': (0,)}, 288, id='plain'),
    pytest.param(90, {'d': 70, 'n': 5, 'rank': 3, 'directions': (0, 1), 'dtype': torch.bfloat16}, 96, id='bf16, odd'),
    pytest.param(90, {'n': 32, 'dtype': torch.float16}, 320, id='fp16, 32 states'),
]


@needs_nvrtc
@pytest.mark.parametrize(('architecture', 'shape', 'spilled'), CASES)
def test_kernels_compile_with_few_register_spills(architecture, shape, spilled):
    limit = 99 << 10 if architecture in (86, 89, 120) else 163 << 10
    for constants in macros(**shape, limit=limit):
        for name, kernels in KERNELS.items():
            text = runtime.source(name, constants)
            found = resources(text, name, architecture)
            assert found.keys() == kernels
            for kernel, (bytes, registers) in found.items():
                assert bytes <= spilled and registers <= (168 if kernel == 'scan_gradients' else 128), kernel


@needs_nvrtc
def test_the_compiler_does_not_write_into_shared_bytes_objects():
    """Python shares one object per single byte; a log of one byte must not overwrite that of a blank."""
    code, said = runtime.compile_source('extern "C" __global__ void f(float* x) { x[0] = 1; }', 'x.cu', '90')
    assert said == '' and code.startswith(b'\x7fELF') and isinstance(code, bytes)
    assert [io.BytesIO(bytes([0, value])[1:]).read(1)[0] for value in range(256)] == [*range(256)]


@needs_nvrtc
def test_a_compiler_error_includes_the_compiler_log():
    with pytest.raises(runtime.CudaError, match=r'NVRTC cannot compile x\.cu for sm_90: .*nonsense'):
        runtime.compile_source('nonsense here;', 'x.cu', '90')


# --- the cache


@pytest.fixture
def small(monkeypatch, tmp_path, caplog):
    """Macros that compile quickly, an empty cache folder, and a cleared log."""
    monkeypatch.setenv('LOCALAPPDATA' if sys.platform == 'win32' else 'XDG_CACHE_HOME', str(tmp_path / 'cache'))
    runtime._say_once.cache_clear()
    logger = logging.getLogger('basicsr')
    monkeypatch.setattr(logger, 'propagate', False)  # as BasicSR does; pytest's own handler would count twice
    monkeypatch.setattr(logger, 'handlers', [caplog.handler])
    caplog.set_level(logging.INFO, 'basicsr')
    (constants,) = macros(d=1, length=1, n=1, rank=1, directions=(0,))
    return constants


@needs_nvrtc
def test_compiles_and_logs_once_and_then_reads_the_cache(small, caplog, monkeypatch):
    code = runtime.machine_code('forward', small, '90')
    (file,) = runtime.cache_folder().iterdir()  # and no partial file
    assert len(caplog.records) == 1 and 'compiling CUDA kernels' in caplog.text
    compiled = []
    real = runtime.compile_source
    monkeypatch.setattr(runtime, 'compile_source', lambda *a: compiled.append(a) or real(*a))
    assert runtime.machine_code('forward', small, '90') == code and not compiled
    other = dict(small) | {'TX': 'bf16'}
    for change in ((tuple(sorted(other.items())), '90'), (small, '80')):
        assert runtime.machine_code('forward', *change) != code
    assert len(compiled) == 2 and len(list(runtime.cache_folder().iterdir())) == 3
    assert len(caplog.records) == 1


@needs_nvrtc
@pytest.mark.parametrize('damage', [b'', b'x' * 32, b'x' * 5000])
def test_corrupted_cache_files_are_recompiled(small, damage):
    code = runtime.machine_code('forward', small, '90')
    (file,) = runtime.cache_folder().iterdir()
    file.write_bytes(damage)
    assert runtime.machine_code('forward', small, '90') == code
    assert runtime.read_code(file) == code


@needs_nvrtc
def test_without_a_writable_cache_it_compiles_and_says_so(small, tmp_path, caplog):
    (tmp_path / 'cache').write_text('a file where the folder would be')
    assert runtime.machine_code('forward', small, '90')[:4] == b'\x7fELF'
    assert 'cannot be cached' in caplog.text and len(caplog.records) == 2


# --- availability


def test_unsupported_devices_and_dtypes_are_explained():
    backend = get_backend('cuda')
    assert 'NVIDIA GPU' in backend.why_unavailable(torch.device('cpu'), torch.float32)
    assert 'float32, not float64' in backend.why_unavailable(torch.device('cuda'), torch.float64)


@pytest.mark.parametrize('missing', ['cuda', 'driver', 'architecture'])
def test_one_line_says_what_to_install(missing, small, caplog, monkeypatch):
    if missing == 'cuda':
        monkeypatch.setitem(sys.modules, 'cuda', None)
        monkeypatch.setitem(sys.modules, 'cuda.bindings', None)
    elif torch.cuda.is_available() != (missing == 'architecture'):
        pytest.skip('needs a GPU' if missing == 'architecture' else 'there is a driver')
    runtime._trouble.cache_clear()
    reasons = {runtime._trouble('10') for _ in range(2)}
    runtime._trouble.cache_clear()
    assert len(reasons) == len(caplog.records) == 1
    (reason,) = reasons
    assert re.search(r"pip install 'cuda-bindings==\d+\.\*' nvidia-cuda-nvrtc", reason) and '\n' not in reason
