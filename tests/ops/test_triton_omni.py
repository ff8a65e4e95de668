"""The omni scan by Triton's kernels: on a GPU if there is one, else in Triton's interpreter; and compiled.

As in test_triton_backend.py sizes are tiny, tiles smaller than on a GPU, and fresh memory is full of NaN.
"""

import math
import subprocess
import sys

import pytest
import torch
from operator_checks import assert_compiles_without_a_graph_break, assert_exports_as_one_node, scans_run_by
from test_omni_scan import assert_close, assert_same, in_double, omni_inputs, run_with_grads
from test_triton_backend import (
    DEVICE,
    INTERPRETED,
    REGISTERS,
    SHARED_BYTES,
    Recorder,
    compile_for_hopper,
    resources,
    run_in_the_interpreter,
    runs,
)

from dpmambair_basicsr.ops import omni_scan
from dpmambair_basicsr.ops.selective_scan.triton import omni as triton_omni
from dpmambair_basicsr.ops.selective_scan.triton import selective as triton_backend

ALL = (0, 1, 2, 3)


@pytest.mark.skipif(INTERPRETED or DEVICE == 'cuda', reason='the tests run in this process')
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # a GPU's matrix products may not be
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks, blocks of channels and tiles of what is added where a GPU would have one."""
    monkeypatch.setattr(triton_backend, '_POSITIONS', 8)
    monkeypatch.setattr(triton_backend, '_CHANNELS', 4)
    monkeypatch.setattr(triton_backend, '_CHAIN_ROWS', 4)
    monkeypatch.setattr(triton_backend, '_CHAIN_CHUNKS', 2)
    monkeypatch.setattr(triton_omni, '_LINES', 4)
    monkeypatch.setattr(triton_omni, '_POSITIONS', 8)


def small_inputs(**options):
    inputs = omni_inputs(**({'b': 1, 'd': 3, 'size': (5, 3), 'n': 1, 'rank': 2, 'directions': (0, 3)} | options))
    return {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in inputs.items()}


def assert_agrees(inputs):
    assert_close(run_with_grads(inputs), run_with_grads(in_double(inputs), backend='reference'))


def projected_inputs(dtype=torch.float32, **options):
    """What `triton_omni.omni_scan` takes: our kernels alone, without the matrix product, which minds the layout."""
    inputs = small_inputs(**options)
    size, inputs = inputs['x'].shape[2:], {k: x.to(dtype) if torch.is_tensor(x) else x for k, x in inputs.items()}
    x, weight = inputs.pop('x').flatten(2).mT, inputs.pop('x_proj_weight').flatten(-3, -2)
    scanned = {'x': x, 'projected': x @ weight.mT} | {k.replace('proj_', ''): v for k, v in inputs.items()}
    return scanned | {'size': size}


# --- results


@runs
@pytest.mark.parametrize(
    ('size', 'd', 'n', 'directions'),
    [
        ((1, 1), 4, 16, (1,)),
        ((1, 7), 1, 4, ALL),
        ((7, 1), 4, 1, (0, 1)),
        ((5, 3), 20, 1, (3,)),
        ((5, 3), 4, 16, (0,)),
        ((5, 3), 1, 4, (3, 1)),
        ((3, 5), 4, 4, (2, 0)),
    ],
    ids=str,
)
def test_agrees_with_the_parts(size, d, n, directions):
    assert_agrees(small_inputs(size=size, d=d, n=n, directions=directions))


@runs
@pytest.mark.parametrize(('rank', 'per_sample'), [(1, ('x_proj_weight',)), (6, ())])
def test_agrees_with_the_parts_in_a_batch(rank, per_sample):
    assert_agrees(small_inputs(b=2, d=5, n=2, rank=rank, per_sample=per_sample, directions=(1, 2)))


@runs
@pytest.mark.parametrize(('d', 'directions'), [(1, (3,)), (5, (0, 1))])
def test_each_sample_may_have_its_own_A(d, directions):
    inputs = small_inputs(b=3, d=d, n=2, per_sample=('x_proj_weight', 'A'), directions=directions)
    assert_agrees(inputs)
    assert scans_run_by(lambda: omni_scan(**inputs)) == ['omni_scan_triton']


@runs
@pytest.mark.parametrize(('d', 'directions'), [(1, ALL), (17, (3,))])
def test_agrees_with_the_parts_with_the_tiles_of_a_gpu(d, directions, monkeypatch):
    monkeypatch.undo()
    assert_agrees(small_inputs(d=d, size=(9, 16), n=1, directions=directions))


@runs
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_inputs_cost_the_rounding_of_what_is_stored_only(dtype):
    """Projections and results are rounded, sums over directions are not; the interpreter cuts bfloat16 off."""
    inputs = projected_inputs(dtype)
    results = run_with_grads(inputs, function=triton_omni.omni_scan)
    wide = {name: x.float() if torch.is_tensor(x) else x for name, x in inputs.items()}
    for name, exact in run_with_grads(wide, function=triton_omni.omni_scan).items():
        assert results[name].dtype == dtype, name
        assert (results[name].float() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max(), name


@runs
def test_is_reproducible_and_reads_only_what_it_wrote():
    inputs = projected_inputs(d=5, directions=(2, 1))
    first, second = (run_with_grads(inputs, function=triton_omni.omni_scan) for _ in range(2))
    assert_same(second, first)
    assert all(x.isfinite().all() for x in first.values())
    with torch.no_grad():
        assert torch.equal(triton_omni.omni_scan(**inputs), first['y'])


@runs
def test_nan_spreads_to_what_follows_and_nowhere_else():
    """By columns reversed, up from (1, 1) in that column, then all columns to its left."""
    inputs = projected_inputs(d=2, directions=(3,))
    inputs['projected'][0, 1 * 3 + 1, 2] = math.nan  # in B
    y = triton_omni.omni_scan(**inputs).unflatten(1, (5, 3))
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[:, :2, 1], expected[:, :, 0] = True, True
    assert torch.equal(y.isnan(), expected)


@runs
@pytest.mark.parametrize('layout', ['channels last', 'every other', 'expanded'])
def test_any_layout_will_do(layout):
    inputs = small_inputs(b=2, directions=(1,))
    x = inputs['x']
    if layout == 'expanded':
        inputs['x'] = x[:1].repeat(2, 1, 1, 1)
    expected = omni_scan(**inputs)
    if layout == 'channels last':
        strided = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'every other':
        strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    else:
        strided = x[:1].expand(2, -1, -1, -1)
    y = omni_scan(**(inputs | {'x': strided}))
    torch.testing.assert_close(y, expected)  # PyTorch's matrix product minds the layout
    assert y.is_contiguous(memory_format=torch.channels_last)


@runs
def test_the_incoming_gradient_may_be_expanded():
    inputs = small_inputs()
    leaves = {name: x.requires_grad_() if torch.is_tensor(x) else x for name, x in inputs.items()}
    tensors = [x for x in leaves.values() if torch.is_tensor(x)]
    y = omni_scan(**leaves)
    dy = torch.ones(1, 1, 1, 1, device=DEVICE).expand(y.shape)
    expanded = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    dense = torch.autograd.grad(y, tensors, dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


# --- which way it goes


@runs
def test_no_other_sequence_is_written():
    inputs = small_inputs(directions=(0,))
    assert scans_run_by(lambda: omni_scan(**inputs)) == ['omni_scan_triton']
    assert scans_run_by(lambda: omni_scan(**inputs, backend='triton')) == ['omni_scan_triton']
    assert scans_run_by(lambda: omni_scan(**inputs, backend='torch')) == ['chunked_scan']
    assert scans_run_by(lambda: omni_scan(**in_double(inputs))) == ['chunked_scan']


@runs
def test_logs_what_runs_once():
    code = (
        'import logging, sys, torch; logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")\n'
        'from dpmambair_basicsr.ops import omni_scan\n'
        f'x = torch.ones(1, 4, 2, 2, device="{DEVICE}")\n'
        'parameters = x[0, :, 0, :1].mT.expand(1, 6, 4), x[:, :, 0], x[0, :, :1, 0].mT, -x[0, :, 0], x[0, :, 0, 0]\n'
        'for _ in range(2): omni_scan(x, *parameters, (0,))\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"omni_scan: fused, backend 'triton' on {DEVICE}"], done.stderr


# --- PyTorch's view of it


@runs
def test_is_a_well_formed_operator():
    """PyTorch's own checks: nothing mutated or aliased, right shapes without data, traced rightly by torch.compile."""
    tensors = [x for x in projected_inputs(d=2, size=(3, 2)).values() if torch.is_tensor(x)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    torch.library.opcheck(triton_omni._forward, (*leaves, [0, 3], 3, 2, True), rtol=1e-4, atol=1e-5)
    y, states = triton_omni._forward(*tensors, [0, 3], 3, 2, True)
    torch.library.opcheck(triton_omni._backward, (*tensors, states, y, [0, 3], 3, 2))


class Omni(torch.nn.Module):
    def __init__(self):
        super().__init__()
        inputs = small_inputs(d=2, size=(3, 2))
        self.x, self.directions = inputs.pop('x'), inputs.pop('directions')
        self.parts = torch.nn.ParameterList(inputs.values())

    def forward(self, x):
        return omni_scan(2 * x, *self.parts, self.directions).square().sum()


@runs
def test_compiles_without_a_graph_break():
    module = Omni()
    assert_compiles_without_a_graph_break(module, module.x)


@runs
def test_exports_as_one_node():
    module = Omni()
    assert_exports_as_one_node(module, module.x, 'omni_scan_triton')


@runs
def test_says_that_a_call_recorded_without_gradients_has_none():
    tensors = [x for x in projected_inputs(d=2, size=(3, 2)).values() if torch.is_tensor(x)]
    tensors[1].requires_grad_()
    y, _ = triton_omni._forward(*tensors, [0, 3], 3, 2, False)
    with pytest.raises(RuntimeError, match='recorded with gradients switched off'):
        y.sum().backward()


# --- machine code, made without a GPU

# In `gradients`; measured with Triton 3.6 and 3.9: 24, 240, 0.
SPILLED_BYTES = {'VmambaIR': 64, 'odd': 320, 'ones': 0}


@pytest.mark.skipif(INTERPRETED, reason='the interpreter has taken the place of the compiler')
@pytest.mark.parametrize(
    ('case', 'dtype', 'options'),
    [
        ('VmambaIR', torch.float32, {'b': 1, 'd': 96, 'size': (64, 64), 'n': 16, 'rank': 6}),
        ('odd', torch.bfloat16, {'b': 2, 'd': 70, 'size': (9, 37), 'n': 5, 'rank': 3}),
        ('ones', torch.float32, {'b': 1, 'd': 1, 'size': (1, 1), 'n': 1, 'rank': 1}),
    ],
    ids=str,
)
def test_compiles_for_hopper_and_hardly_spills(case, dtype, options, monkeypatch, tmp_path):
    monkeypatch.undo()  # the tiles of a GPU
    kernels, calls = triton_backend.load_kernels(), []
    for name in ('add_parts', 'chunk_ends', 'chain', 'outputs', 'gradients'):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), calls))
    inputs = projected_inputs(directions=(0, 1), **options)
    tensors = [x.contiguous() for x in inputs.values() if torch.is_tensor(x)]
    tensors[:2] = (x.to(dtype) for x in tensors[:2])
    y, states = triton_omni._forward(*tensors, [0, 1], *options['size'], True)
    triton_omni._backward(*tensors, states, y, [0, 1], *options['size'])
    assert len(calls) == (10 if case == 'ones' else 18)
    compiled_already = set()
    for kernel, arguments, options in calls:
        name = kernel.__name__
        compiled = compile_for_hopper(kernel, arguments, options)
        if compiled.hash in compiled_already:
            continue
        compiled_already.add(compiled.hash)
        registers, spilled = resources(compiled, tmp_path / 'kernel.cubin')
        shared = compiled.metadata.shared
        print(f'{name}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared')
        assert registers <= REGISTERS and spilled <= SPILLED_BYTES[case] and shared <= SHARED_BYTES, name
        if name == 'outputs':
            assert compiled.asm['ptx'].count('ld.shared') < 64  # 26 measured; 120 where scans cross warps
