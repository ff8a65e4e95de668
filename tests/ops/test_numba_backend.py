"""What test_selective_scan.py, which covers the numba backend too, does not test: its work units, threads, compiler.

All tests run in PyTorch's deterministic mode, which fills new memory, including scratch memory, with NaN.
"""

import hashlib
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from operator_checks import (
    add_parameters,
    added_parameters,
    assert_compiles_without_a_graph_break,
    assert_exports_as_one_node,
    assert_passes_opcheck,
    skip_where_forks_have_no_gradients,
)
from test_selective_scan import assert_agrees, run_with_grads, scan_inputs
from torch.utils.data import DataLoader, Dataset

from dpmambair_basicsr.ops import selective_scan
from dpmambair_basicsr.ops.selective_scan.numba import runtime as numba_runtime
from dpmambair_basicsr.ops.selective_scan.numba import selective as numba_backend

pytest.importorskip('numba', reason='the extra [cpu] is not installed')
pytestmark = pytest.mark.usefixtures('nan_in_new_memory')


def small_inputs(**options):
    return scan_inputs(dtype=torch.float32, **options)


def scan_with_grads(inputs):
    return run_with_grads(inputs, delta_softplus=True, backend='numba')


def assert_same(results, others):
    assert results.keys() == others.keys()
    assert all(torch.equal(results[name], others[name]) for name in results)


# --- results


@pytest.mark.parametrize('length', [1, 63, 64, 65, 1000])
@pytest.mark.parametrize('n', [1, 8, 16])
def test_agrees_with_the_definition_at_any_length(n, length):
    assert_agrees('numba', small_inputs(b=1, d=16, n=n, length=length))


@pytest.mark.parametrize(('d', 'g'), [(1, 1), (4, 1), (4, 4), (16, 1), (16, 2), (40, 1), (40, 2), (40, 4)])
@pytest.mark.parametrize('n', [1, 8, 16])
def test_agrees_with_the_definition_at_any_width(n, d, g):
    assert_agrees('numba', small_inputs(d=d, n=n, length=100, g=g))


@pytest.mark.parametrize('units', [1, 4, 100])
@pytest.mark.parametrize('positions', [64, 128, 8192])
def test_agrees_with_the_definition_for_any_partition_of_the_backward_pass(monkeypatch, units, positions):
    """The blocks of a group in one part, two, or each by itself; dB and dC summed after 1, 2 or all 5 chunks."""
    monkeypatch.setattr(numba_backend, '_BACKWARD_UNITS', units)
    monkeypatch.setattr(numba_backend, '_BACKWARD_POSITIONS', positions)
    assert_agrees('numba', small_inputs(b=1, d=104, length=300, g=2))


@pytest.mark.parametrize('layout', ['channels last', 'every other'])
def test_results_are_bit_exact_for_any_strides(layout):
    inputs = small_inputs(d=40, n=16, length=150, g=1)
    if layout == 'channels last':
        strided = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in inputs.items()}
    else:
        strided = {name: x.repeat_interleave(2, dim=-1)[..., ::2] for name, x in inputs.items()}
    results = scan_with_grads(strided)
    assert_same(results, scan_with_grads(inputs))
    if layout == 'channels last':
        assert results['y'].stride() == results['du'].stride() == strided['u'].stride()


@pytest.mark.parametrize('dims', [(0, 1, 2), (1,), (2,)])
def test_the_incoming_gradient_may_be_expanded(dims):
    inputs = small_inputs(d=20, length=100)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y = selective_scan(**leaves, delta_softplus=True, backend='numba')
    dy = torch.randn([1 if dim in dims else size for dim, size in enumerate(y.shape)]).expand(y.shape)
    expanded = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    dense = torch.autograd.grad(y, list(leaves.values()), dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_softplus_sigmoid_and_decay_keep_full_precision():
    """A scan of one position is softplus(delta); of an impulse and a zero, the decay over the second step.

    Besides the results, the exponent log2(e) * x is rounded twice: a relative error of up to |x| / 2^23.
    """

    def assert_exact(result, exact):
        allowed = (2**-22 + x.detach().abs() * 2**-23) * exact
        assert ((result.double() - exact).abs() <= allowed).all()

    def scan(u, delta, delta_softplus):
        one = torch.ones(1, 1, 1, u.shape[-1])
        A = -torch.ones(u.shape[1], 1)
        return numba_backend.scan(u, delta, A, one, one, None, None, delta_softplus)[..., -1:]

    x = torch.linspace(-80, 80, 3201)[None, :, None].requires_grad_()
    one = torch.ones_like(x)
    y = scan(one, x, True)
    assert_exact(y, torch.nn.functional.softplus(x.double(), threshold=math.inf))
    assert_exact(torch.autograd.grad(y.sum(), x)[0], x.double().sigmoid())
    decay = scan(torch.cat([one, 0 * one], dim=-1), torch.cat([one, x.abs()], dim=-1), False)
    assert_exact(decay, torch.exp(-x.double().abs()))


@pytest.mark.parametrize('name', ['u', 'delta'])
def test_nan_propagates_to_later_positions_only(name):
    inputs = small_inputs(b=2, d=20, length=100)
    inputs[name][1, 3, 70] = math.nan
    y = selective_scan(**inputs, delta_softplus=True, backend='numba')
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, 3, 70:] = True
    assert torch.equal(y.isnan(), expected)


# --- threads and processes


@pytest.mark.parametrize('shape', [{'b': 2, 'd': 96}, {'b': 1, 'd': 40, 'g': 2}, {'b': 1, 'd': 8}])
def test_results_are_bit_exact_for_any_number_of_threads(threads, shape):
    inputs = small_inputs(n=16, length=300, **shape)
    threads(1)
    alone = scan_with_grads(inputs)
    for number in (2, 5):
        threads(number)
        assert_same(scan_with_grads(inputs), alone)


def test_python_threads_may_scan_concurrently(threads):
    threads(1)
    inputs = [small_inputs(d=48, length=200, seed=seed) for seed in range(4)]
    alone = [scan_with_grads(x) for x in inputs]

    def scan_repeatedly(x):
        torch.set_num_threads(2)  # OpenMP's setting is per thread
        return [scan_with_grads(x) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for results, expected in zip(pool.map(scan_repeatedly, inputs), alone, strict=True):
            for result in results:
                assert_same(result, expected)


class Scans(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        inputs = small_inputs(d=48, length=200, seed=index)
        torch.set_num_threads(2)  # a worker starts with one: OpenMP, which torch.exp uses, hangs in a fork with more
        results = scan_with_grads(inputs)
        torch.set_num_threads(1)
        return results


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no fork')
def test_forked_data_loader_workers_may_scan(threads):
    skip_where_forks_have_no_gradients()
    threads(2)
    expected = [Scans()[index] for index in range(4)]  # this process now has threads that its forks do not have
    loader = DataLoader(Scans(), batch_size=None, num_workers=2, multiprocessing_context='fork', timeout=30)
    for result, x in zip(loader, expected, strict=True):
        assert_same(result, x)


# --- as a PyTorch operator


@pytest.mark.parametrize('without', [(), ('D', 'delta_bias')])
def test_operator_passes_opcheck(without):
    inputs = small_inputs(d=20, n=3, length=70, g=2)
    inputs = [None if name in without else x.requires_grad_() for name, x in inputs.items()]
    inputs[0] = inputs[0].detach().mT.contiguous().mT.requires_grad_()
    assert_passes_opcheck(numba_backend._forward, (*inputs, True, True), rtol=1e-4, atol=1e-5)
    inputs = [None if x is None else x.detach() for x in inputs]
    y, states = numba_backend._forward(*inputs, True, True)
    assert_passes_opcheck(numba_backend._backward, (*inputs, states, y, True))


class Projected(torch.nn.Module):
    """A scan between other operations, with parameters on both sides."""

    def __init__(self):
        super().__init__()
        inputs = small_inputs(d=20, length=70, g=2)
        self.u = inputs.pop('u')
        add_parameters(self, inputs.values())
        self.weight = torch.nn.Parameter(torch.randn(20, 20))

    def forward(self, x):
        return numba_backend.scan(self.weight @ x, *added_parameters(self), True).square().sum()


def test_compiles_without_a_graph_break():
    module = Projected()
    assert_compiles_without_a_graph_break(module, module.u)


def test_exports_as_one_node():
    module = Projected()
    assert_exports_as_one_node(module, module.u, 'selective_scan_numba')


def test_backward_of_a_call_recorded_without_gradients_is_an_error():
    inputs = [x.requires_grad_() for x in small_inputs().values()]
    y, _ = numba_backend._forward(*inputs, True, False)
    with pytest.raises(RuntimeError, match='recorded with gradients switched off'):
        y.sum().backward()


# --- numba


def run_python(code, **environment):
    code = f'import logging, torch\nlogging.basicConfig(level=logging.WARNING)\n{code}'
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split(), result.stderr


def test_compiles_once_says_so_and_then_loads_from_the_cache(tmp_path):
    code = (
        'from dpmambair_basicsr.ops import selective_scan\n'
        'x = torch.ones(1, 2, 3)\n'
        'print(selective_scan(x, x, -x[0, :, :1], x[:, :1], x[:, :1], backend="numba").shape.numel())'
    )
    printed, log = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == ['6']
    assert log.count('compiling the CPU kernels') == len(log.splitlines()) == 1
    printed, log = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == ['6']
    assert log == ''  # numba logs when it compiles, and did not


def test_compiles_without_a_writable_cache(monkeypatch):
    from numba import types
    from numba.core.caching import CacheImpl

    from dpmambair_basicsr.ops.selective_scan.numba.simd import kernel as compiled

    monkeypatch.setattr(CacheImpl, '_locator_classes', [])
    kernel = compiled(types.intp)(lambda number: None)
    assert kernel(3) is None
    assert kernel.stats.cache_path is None


def test_changing_any_kernel_file_invalidates_the_cache(monkeypatch, tmp_path):
    import numba

    from dpmambair_basicsr.ops.selective_scan.numba import simd as numba_simd

    monkeypatch.setattr(numba.config, 'CACHE_DIR', str(tmp_path))

    def hits(version):
        def nothing(number):
            pass

        monkeypatch.setattr(numba_simd, '_VERSION', hashlib.sha256(version))
        return sum(numba_simd.kernel(numba.types.intp)(nothing).stats.cache_hits.values())

    assert [hits(b'old'), hits(b'old'), hits(b'new')] == [0, 1, 0]


def test_without_numba_the_torch_backend_runs_and_one_line_says_what_would_be_faster():
    code = (
        'import sys; sys.modules["numba"] = None\n'
        'from dpmambair_basicsr.ops import selective_scan\n'
        'x = torch.ones(1, 2, 3)\n'
        'for _ in range(2): print(selective_scan(x, x, -x[0, :, :1], x[:, :1], x[:, :1]).shape.numel())\n'
        'try: selective_scan(x, x, -x[0, :, :1], x[:, :1], x[:, :1], backend="numba")\n'
        'except RuntimeError as error: assert "pip install numba" in str(error); print("refused")\n'
    )
    printed, log = run_python(code)
    assert printed == ['6', '6', 'refused']
    assert log.count('faster on this CPU with numba') == len(log.splitlines()) == 1
    assert 'pip install numba' in log


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_supports_float32_only(dtype):
    assert 'float32 on a CPU' in numba_runtime.why_unavailable(torch.device('cpu'), dtype)
    assert 'on cuda' in numba_runtime.why_unavailable(torch.device('cuda'), torch.float32)
