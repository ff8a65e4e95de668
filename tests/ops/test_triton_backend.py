"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter, in a process of its own; and compiled.

The interpreter takes milliseconds per position, so sizes are tiny and tiles smaller than they are on a GPU.
On a GPU test_selective_scan.py tests this backend as well, at usual sizes.
"""

import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_checks import assert_compiles_without_a_graph_break, assert_exports_as_one_node
from test_selective_scan import TOLERANCE, run_with_grads, scan_inputs, weights

from dpmambair_basicsr.ops import selective_scan
from dpmambair_basicsr.ops.selective_scan import available_backends
from dpmambair_basicsr.ops.selective_scan.triton import selective as triton_backend

pytest.importorskip('triton', reason="Triton comes with PyTorch's CUDA builds; pip install triton")
pytestmark = pytest.mark.usefixtures('nan_in_new_memory')

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED or not torch.cuda.is_available() else 'cuda'
runs = pytest.mark.skipif(
    'triton' not in available_backends(DEVICE), reason='test_in_the_interpreter runs this one in another process'
)


def run_in_the_interpreter(file):
    """Triton reads the variable when it is imported, and others may have imported it here."""
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', file]
    environment = os.environ | {'TRITON_INTERPRET': '1'}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if 'only 0-dimensional arrays can be converted' in result.stdout:
        pytest.skip("this Triton's interpreter is too old for this NumPy")  # Triton 3.6 with NumPy 2.4
    assert result.returncode == 0, result.stdout
    assert ' passed' in result.stdout and 'another process' not in result.stdout


@pytest.mark.skipif(INTERPRETED or DEVICE == 'cuda', reason='the tests run in this process')
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks, blocks of channels and tiles of the chain where a GPU would have one."""
    monkeypatch.setattr(triton_backend, '_POSITIONS', 16)
    monkeypatch.setattr(triton_backend, '_CHANNELS', 4)
    monkeypatch.setattr(triton_backend, '_CHAIN_ROWS', 4)
    monkeypatch.setattr(triton_backend, '_CHAIN_CHUNKS', 2)


def small_inputs(dtype=torch.float32, **options):
    return scan_inputs(**({'b': 1, 'd': 3, 'n': 2, 'length': 35} | options), dtype=dtype, device=DEVICE)


def scan_with_grads(inputs, delta_softplus=True):
    return run_with_grads(inputs, delta_softplus=delta_softplus, backend='triton')


def assert_agrees(inputs, delta_softplus=True, tolerance=TOLERANCE[torch.float32]):
    result = scan_with_grads(inputs, delta_softplus)
    exact = {name: x.double() for name, x in inputs.items()}
    exact = run_with_grads(exact, delta_softplus=delta_softplus, backend='reference')
    for name, x in result.items():
        assert x.dtype == inputs['u' if name == 'y' else name[1:]].dtype, name
        error, largest = (x.double() - exact[name]).abs().max(), exact[name].abs().max()
        assert error <= tolerance * largest, f'{name}: {error:.1e} of {largest:.1e}'


def assert_same(results, others):
    assert results.keys() == others.keys()
    assert all(torch.equal(results[name], others[name]) for name in results)


# --- results


@runs
@pytest.mark.parametrize('length', [1, 2, 16, 17, 63, 64, 65])
def test_agrees_with_the_definition_at_any_length(length):
    assert_agrees(small_inputs(d=2, length=length))


@runs
@pytest.mark.parametrize(('b', 'd', 'g'), [(1, 1, 1), (2, 4, 1), (1, 4, 2), (1, 4, 4), (2, 10, 2), (1, 17, 1)])
def test_agrees_with_the_definition_at_any_width(b, d, g):
    assert_agrees(small_inputs(b=b, d=d, length=18, g=g))


@runs
@pytest.mark.parametrize('n', [1, 16])
def test_agrees_with_the_definition_with_any_number_of_states(n):
    assert_agrees(small_inputs(n=n, length=18))


@runs
def test_agrees_with_the_definition_with_the_tiles_of_a_gpu(monkeypatch):
    monkeypatch.undo()
    assert_agrees(small_inputs(d=17, n=1, length=129))


@runs
@pytest.mark.parametrize('delta_softplus', [False, True])
@pytest.mark.parametrize('without', ['D', 'delta_bias'])
def test_agrees_with_the_definition_without_options(without, delta_softplus):
    inputs = small_inputs()
    if not delta_softplus:  # then delta + delta_bias, or delta alone, has to be positive itself
        inputs['delta'] = inputs['delta'].abs() * 0.1 - (
            0 if without == 'delta_bias' else inputs['delta_bias'][:, None]
        )
    del inputs[without]
    assert_agrees(inputs, delta_softplus)


@runs
@pytest.mark.parametrize('step', [20.0, 1e-4])
def test_agrees_with_the_definition_at_extreme_steps(step):
    """20: decays underflow to 0. 1e-4: hardly any decay, so all positions add up."""
    inputs = small_inputs(n=16, length=18)
    inputs['delta'] = inputs['delta'].abs() * step
    del inputs['delta_bias']
    assert_agrees(inputs, delta_softplus=False)


@runs
@pytest.mark.parametrize('parameters', [None, torch.float32])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_inputs_cost_the_rounding_of_the_results_only(dtype, parameters):
    """Results are within one unit in the last place; the interpreter, unlike a GPU, cuts bfloat16 off."""
    inputs = small_inputs(dtype=dtype)
    for name in ('A', 'D', 'delta_bias'):
        inputs[name] = inputs[name].to(parameters or dtype)
    assert_agrees(inputs, tolerance=torch.finfo(dtype).eps)


@runs
def test_half_inputs_are_read_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr(triton_backend, '_forward', lambda u, *others: seen.append(u.dtype) or (u, None))
    inputs = small_inputs(dtype=torch.float16)
    triton_backend.scan(*inputs.values(), True)
    selective_scan(**inputs, backend='triton')
    assert seen == [torch.float16, torch.float16]


@runs
def test_is_reproducible_and_reads_only_what_it_wrote():
    inputs = small_inputs(d=5, n=1)
    first = scan_with_grads(inputs)
    assert_same(scan_with_grads(inputs), first)
    assert all(x.isfinite().all() for x in first.values())
    with torch.no_grad():
        assert torch.equal(first['y'], selective_scan(**inputs, delta_softplus=True, backend='triton'))


@runs
@pytest.mark.parametrize('layout', ['channels last', 'every other', 'expanded'])
def test_agrees_with_the_definition_on_strided_inputs(layout):
    inputs = small_inputs(b=2, d=4, length=18, g=2)
    if layout == 'channels last':
        strided = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in inputs.items()}
    elif layout == 'every other':
        strided = {name: x.repeat_interleave(2, dim=-1)[..., ::2] for name, x in inputs.items()}
    else:
        strided = {name: x[:1].expand(x.shape) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for name, x in strided.items() if name in 'u delta A B C')
    assert_agrees(strided)
    if layout == 'channels last':
        y = selective_scan(**strided, delta_softplus=True, backend='triton')
        assert y.stride() == strided['u'].stride()


@runs
@pytest.mark.parametrize('dims', [(0, 1, 2), (1,)])
def test_the_incoming_gradient_may_be_expanded(dims):
    leaves = {name: x.requires_grad_() for name, x in small_inputs().items()}
    y = selective_scan(**leaves, delta_softplus=True, backend='triton')
    dy = weights(y)[tuple(slice(1) if dim in dims else slice(None) for dim in range(3))].expand(y.shape)
    expanded = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    dense = torch.autograd.grad(y, list(leaves.values()), dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@runs
def test_softplus_and_sigmoid_keep_their_digits():
    """A scan of one position is softplus(delta). The interpreter's exponential is NumPy's, a GPU's has 22 bits."""
    x = torch.linspace(-80, 80, 65, device=DEVICE)[None, :, None].requires_grad_()
    one = torch.ones_like(x)
    y = triton_backend.scan(one, x, -one[0], one[:, None, :1], one[:, None, :1], None, None, True)
    for result, exact in (
        (y, torch.nn.functional.softplus(x.double(), threshold=math.inf)),
        (torch.autograd.grad(y.sum(), x)[0], x.double().sigmoid()),
    ):
        allowed = (2**-21 + x.detach().abs() * 2**-23) * exact  # the second: exp's argument, rounded
        assert ((result.double() - exact).abs() <= allowed).all()


@runs
@pytest.mark.parametrize('name', ['u', 'delta'])
def test_nan_spreads_to_what_follows_and_nowhere_else(name):
    inputs = small_inputs(b=2, d=5, n=1)
    inputs[name][1, 3, 20] = math.nan
    y = selective_scan(**inputs, delta_softplus=True, backend='triton')
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, 3, 20:] = True
    assert torch.equal(y.isnan(), expected)


# --- PyTorch's view of it


@runs
@pytest.mark.parametrize(('without', 'dtype'), [((), torch.float16), (('D', 'delta_bias'), torch.float32)])
def test_is_a_well_formed_operator(without, dtype):
    """PyTorch's own checks: nothing mutated or aliased, right shapes without data, traced rightly by torch.compile."""
    inputs = small_inputs(d=2, n=1, length=17, g=2, dtype=dtype)
    inputs = [None if name in without else x.requires_grad_() for name, x in inputs.items()]
    inputs[0] = inputs[0].detach().mT.contiguous().mT.requires_grad_()
    torch.library.opcheck(triton_backend._forward, (*inputs, True, True), rtol=1e-2, atol=1e-2)
    inputs = [None if x is None else x.detach() for x in inputs]
    y, states = triton_backend._forward(*inputs, True, True)
    torch.library.opcheck(triton_backend._backward, (*inputs, states, y, True))


class Projected(torch.nn.Module):
    """A scan between other operations, with parameters on both sides."""

    def __init__(self):
        super().__init__()
        inputs = small_inputs()
        self.u = inputs.pop('u')
        self.scanned = torch.nn.ParameterList(inputs.values())
        self.weight = torch.nn.Parameter(torch.randn(3, 3, device=DEVICE))

    def forward(self, x):
        return selective_scan(self.weight @ x, *self.scanned, True).square().sum()


@runs
def test_compiles_without_a_graph_break():
    module = Projected()
    assert_compiles_without_a_graph_break(module, module.u)


@runs
def test_exports_as_one_node():
    module = Projected()
    assert_exports_as_one_node(module, module.u, 'selective_scan_triton')


@runs
def test_says_that_a_call_recorded_without_gradients_has_none():
    inputs = [x.requires_grad_() for x in small_inputs().values()]
    y, _ = triton_backend._forward(*inputs, True, False)
    with pytest.raises(RuntimeError, match='recorded with gradients switched off'):
        y.sum().backward()


# --- where it runs


@pytest.mark.skipif(INTERPRETED, reason='the interpreter runs on a CPU')
def test_says_where_it_runs():
    assert 'NVIDIA GPU' in triton_backend.why_unavailable(torch.device('cpu'), torch.float32)
    assert 'float32, not float64' in triton_backend.why_unavailable(torch.device('cuda'), torch.float64)


@pytest.mark.skipif(DEVICE == 'cuda', reason='Triton works here')
def test_one_line_says_what_is_missing(caplog, monkeypatch):
    """No GPU, no compiler and no Triton are all found out in the same way: by trying."""
    logger = logging.getLogger('basicsr')
    monkeypatch.setattr(logger, 'propagate', False)  # as BasicSR does; pytest's own handler would count twice
    monkeypatch.setattr(logger, 'handlers', [caplog.handler])
    triton_backend._triton_trouble.cache_clear()
    reasons = {triton_backend._triton_trouble() for _ in range(2)}
    triton_backend._triton_trouble.cache_clear()
    assert len(reasons) == len(caplog.records) == 1
    assert re.search(r'Triton does not work \(\w+: .*\); it takes .*C compiler', reasons.pop())


# --- machine code, made without a GPU

# A thread's registers, a program's shared memory, and what a thread may spill: measured with Triton 3.6 and 3.9 in
# `gradients`, which takes the most. At odd sizes no load is wider than a float, and scans cross warps.
REGISTERS, SHARED_BYTES = 128, 8192
SPILLED_BYTES = {'l contiguous': 64, 'd contiguous': 64, 'odd': 256, 'ones': 0}  # measured: 8, 8, 168, 0


class Recorder:
    """Stands in for a kernel and adds to `calls` what it is called with."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append((self.kernel, arguments, options))


def specialize(path, value):
    """What Triton knows of an argument when it compiles: type, constant parts, parts divisible by 16; by path."""
    if isinstance(value, tuple):
        types, constants, divisible = zip(*(specialize((*path, i), x) for i, x in enumerate(value)), strict=True)
        return types, {k: v for part in constants for k, v in part.items()}, [k for part in divisible for k in part]
    if isinstance(value, torch.Tensor):
        name = {torch.float32: 'fp32', torch.bfloat16: 'bf16'}[value.dtype]
        return f'*{name}', {}, [path]
    if value is None or value == 1:
        return 'constexpr', {path: value}, []
    return 'i32', {}, [path] if value % 16 == 0 else []


def compile_for_hopper(kernel, arguments, options):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, signature, constants, divisible = kernel.arg_names, {}, {}, []
    for i, value in enumerate(arguments):
        signature[names[i]], more, paths = specialize((i,), value)
        constants |= more
        divisible += paths
    flags = {name: options.pop(name) for name in names if name in options}
    signature |= dict.fromkeys(flags, 'constexpr')
    constants |= {(names.index(name),): value for name, value in flags.items()}
    attributes = {path: [['tt.divisibility', 16]] for path in divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options)


def resources(compiled, path):
    """Registers and stack bytes of a thread, as cuobjdump, which is part of Triton, reads them off the machine code."""
    import triton

    tools = list(Path(triton.__file__).parent.glob('backends/nvidia/bin/cuobjdump*'))
    if not tools:
        pytest.skip('this Triton comes without cuobjdump')
    path.write_bytes(compiled.asm['cubin'])
    text = subprocess.run([tools[0], '-res-usage', path], capture_output=True, text=True, check=True).stdout
    return (int(re.search(rf'{name}:(\d+)', text)[1]) for name in ('REG', 'STACK'))


@pytest.mark.skipif(INTERPRETED, reason='the interpreter has taken the place of the compiler')
@pytest.mark.parametrize(
    ('layout', 'dtype', 'sizes'),
    [
        ('l contiguous', torch.float32, (2, 96, 16, 4096, 1)),
        ('d contiguous', torch.bfloat16, (2, 96, 16, 4096, 1)),
        ('odd', torch.float32, (2, 70, 5, 333, 2)),
        ('ones', torch.float32, (1, 1, 1, 1, 1)),  # which Triton makes constants
    ],
    ids=str,
)
def test_compiles_for_hopper_and_hardly_spills(layout, dtype, sizes, monkeypatch, tmp_path):
    monkeypatch.undo()  # the tiles of a GPU
    kernels, calls = triton_backend.load_kernels(), []
    for name in ('chunk_ends', 'chain', 'outputs', 'gradients'):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), calls))
    b, d, n, length, g = sizes
    inputs = scan_inputs(b=b, d=d, n=n, length=length, g=g, dtype=torch.float32)
    for name in ('u', 'delta', 'B', 'C'):
        inputs[name] = inputs[name].to(dtype)
    if layout == 'd contiguous':
        inputs |= {name: inputs[name].mT.contiguous().mT for name in ('u', 'delta')}
    y, starts = triton_backend._forward(*inputs.values(), True, True)
    triton_backend._backward(*inputs.values(), starts, y, True)
    assert len(calls) == (2 if length == 1 else 6)
    for kernel, arguments, options in calls:
        compiled = compile_for_hopper(kernel, arguments, options)
        registers, spilled = resources(compiled, tmp_path / 'kernel.cubin')
        shared, name = compiled.metadata.shared, kernel.__name__
        print(f'{name}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared')
        assert registers <= REGISTERS and spilled <= SPILLED_BYTES[layout] and shared <= SHARED_BYTES, name
        if dtype == torch.bfloat16 and name in ('outputs', 'gradients'):
            assert 'cvt.rn.bf16' in compiled.asm['ptx']  # rounds, where the interpreter cuts off
