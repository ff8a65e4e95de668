"""The CUDA kernels: on a GPU if there is one, else built by g++ for the CPU, with fibers as the threads of a block.

On the CPU, sizes are tiny, and new memory (scratch included) is full of NaN. On a GPU test_selective_scan.py tests
this backend as well, at usual sizes.
"""

import logging
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from operator_checks import (
    add_parameters,
    added_parameters,
    assert_compiles_without_a_graph_break,
    assert_exports_as_one_node,
    assert_passes_opcheck,
    scans_run_by,
)
from support import cuda_on_host
from test_omni_scan import assert_close, assert_same, in_double, omni_inputs, run_with_grads
from test_selective_scan import TOLERANCE, scan_inputs, weights
from test_selective_scan import run_with_grads as scan_with_grads

from dpmambair_basicsr.ops import omni_scan, selective_scan
from dpmambair_basicsr.ops.selective_scan import backend as names
from dpmambair_basicsr.ops.selective_scan.cuda import launch, omni, plan, selective

ALL = (0, 1, 2, 3)
ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
pytestmark = [] if ON_GPU else [cuda_on_host.needs_gxx]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason='needs an NVIDIA GPU')


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    if not ON_GPU:
        cuda_on_host.install(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory; a GPU's matrix products may vary
    yield
    torch.use_deterministic_algorithms(False)
    forget_plans()


def forget_plans():
    plan.make_plan.cache_clear()
    launch._launches.cache_clear()


def on_device(inputs):
    return {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in inputs.items()}


def image_inputs(**options):
    return on_device(omni_inputs(**({'b': 1, 'd': 20, 'size': (5, 7), 'n': 4, 'rank': 3} | options)))


def projected_inputs(dtype=torch.float32, **options):
    """Arguments of `omni.omni_scan`, the kernels without the matrix product, which depends on the layout."""
    inputs = image_inputs(**options)
    size, inputs = inputs['x'].shape[2:], {k: x.to(dtype) if torch.is_tensor(x) else x for k, x in inputs.items()}
    x, weight = inputs.pop('x').flatten(2).mT, inputs.pop('x_proj_weight').flatten(-3, -2)
    scanned = {'x': x, 'projected': x @ weight.mT} | {k.replace('proj_', ''): v for k, v in inputs.items()}
    return scanned | {'size': size}


def sequence_inputs(dtype=torch.float32, **options):
    return scan_inputs(**({'b': 1, 'd': 6, 'n': 4, 'length': 35} | options), dtype=dtype, device=DEVICE)


def assert_images_agree(inputs):
    assert_close(run_with_grads(inputs, backend='cuda'), run_with_grads(in_double(inputs), backend='torch'))


def assert_sequences_agree(inputs, delta_softplus=True, tolerance=TOLERANCE[torch.float32]):
    results = scan_with_grads(inputs, delta_softplus=delta_softplus, backend='cuda')
    exact = {name: x.double() for name, x in inputs.items()}
    exact = scan_with_grads(exact, delta_softplus=delta_softplus, backend='reference')
    for name, x in results.items():
        assert x.dtype == inputs['u' if name == 'y' else name[1:]].dtype, name
        error, largest = (x.double() - exact[name]).abs().max(), exact[name].abs().max()
        assert error <= tolerance * largest, f'{name}: {error:.1e} of {largest:.1e}'


# --- the omni scan


@pytest.mark.parametrize(
    ('b', 'd', 'size', 'n', 'rank', 'directions'),
    [
        (1, 1, (1, 1), 1, 1, (2,)),
        (2, 20, (5, 7), 4, 3, ALL),
        (1, 33, (13, 16), 16, 2, (0, 3, 1)),
        (1, 200, (5, 7), 16, 24, (0, 2)),
        (2, 4, (7, 1), 5, 1, (0, 0, 2, 1)),
        (1, 48, (1, 9), 17, 9, (1,)),
    ],
    ids=str,
)
def test_agrees_with_the_unfused_scan(b, d, size, n, rank, directions):
    assert_images_agree(image_inputs(b=b, d=d, size=size, n=n, rank=rank, directions=directions))


@pytest.mark.parametrize('order', ['first to last', 'last to first'])
def test_agrees_with_the_unfused_scan_in_chunks_of_large_images(order, monkeypatch):
    """128 steps; each of two directions writes one half first. Without a GPU, threads run in both orders."""
    monkeypatch.setattr(plan, '_WARPS_EACH', 0)
    if order == 'last to first':
        monkeypatch.setenv('SHIM_BACKWARDS', '1')
    assert_images_agree(image_inputs(size=(13, 16), n=16, directions=(2, 0)))


def test_agrees_with_the_unfused_scan_in_the_shared_memory_of_a_smaller_gpu(monkeypatch):
    monkeypatch.setattr(plan, '_WARPS_EACH', 0)
    if not ON_GPU:
        cuda_on_host.install(monkeypatch, shared_limit=99 << 10)
    inputs = image_inputs(d=96, n=16, rank=6, size=(3, 5))
    assert plan.make_plan(1, 96, 15, 16, 6, ALL, 99 << 10).constants['W'] == 2
    assert_images_agree(inputs)


@pytest.mark.parametrize(('d', 'directions'), [(20, ALL), (3, (3,))])
def test_each_sample_may_have_its_own_projection_and_A(d, directions):
    """This is how a per-sample factor of delta (DPMambaIR, Eq. 8) is computed, see `directional_scan`."""
    inputs = image_inputs(b=3, d=d, per_sample=('x_proj_weight', 'A'), directions=directions)
    assert_images_agree(inputs)
    assert scans_run_by(lambda: omni_scan(**inputs, backend='cuda')) == ['omni_scan_cuda']


def test_identical_A_per_sample_are_bit_exact_with_a_shared_A():
    inputs = projected_inputs(b=3)
    results = run_with_grads(inputs | {'A': inputs['A'].repeat(3, 1, 1)}, function=omni.omni_scan)
    others = run_with_grads(inputs, function=omni.omni_scan)
    torch.testing.assert_close(results.pop('dA').sum(0), others.pop('dA'))
    assert_same(results, others)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_images_only_add_storage_rounding(dtype):
    inputs = projected_inputs(dtype)

    def run(inputs):
        leaves = {name: x.detach().requires_grad_() if torch.is_tensor(x) else x for name, x in inputs.items()}
        y = omni.omni_scan(**leaves)
        y.backward(weights(y))
        return {'y': y.detach()} | {f'd{name}': x.grad for name, x in leaves.items() if torch.is_tensor(x)}

    results = run(inputs)
    wide = {name: x.float() if torch.is_tensor(x) else x for name, x in inputs.items()}
    for name, exact in run(wide).items():
        assert results[name].dtype == dtype, name
        assert (results[name].float() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max(), name


def test_many_states_are_scanned_in_parts(monkeypatch):
    monkeypatch.setattr(omni, 'MAX_STATES', 4)
    inputs = image_inputs(n=9)
    assert_images_agree(inputs)
    assert scans_run_by(lambda: omni_scan(**inputs, backend='cuda')) == ['omni_scan_cuda'] * 3


def test_more_than_eight_directions_are_refused():
    inputs = image_inputs(directions=(0,) * 9)
    with pytest.raises(ValueError, match='^omni_scan: backend cuda supports up to 8 directions, got 9$'):
        omni_scan(**inputs, backend='cuda')


def test_is_deterministic_and_reads_no_uninitialized_memory():
    inputs = projected_inputs(b=2, directions=(2, 1, 3))
    first, second = (run_with_grads(inputs, function=omni.omni_scan) for _ in range(2))
    assert_same(second, first)
    assert all(x.isfinite().all() for x in first.values())
    with torch.no_grad():
        assert torch.equal(omni.omni_scan(**inputs), first['y'])


def test_nan_propagates_to_later_positions_only():
    """In reversed column order: from (1, 1) up its column, then all columns to its left."""
    inputs = projected_inputs(d=2, directions=(3,), size=(5, 3))
    inputs['projected'][0, 1 * 3 + 1, 3] = math.nan  # in B
    y = omni.omni_scan(**inputs).unflatten(1, (5, 3))
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[:, :2, 1], expected[:, :, 0] = True, True
    assert torch.equal(y.isnan(), expected)


def test_results_are_bit_exact_for_any_layout_and_expanded_gradients():
    inputs = projected_inputs(b=2)
    leaves = {k: x.clone().requires_grad_() if torch.is_tensor(x) else x for k, x in inputs.items()}
    tensors = [x for x in leaves.values() if torch.is_tensor(x)]
    y = omni.omni_scan(**leaves)
    dy = torch.randn(1, 1, 20, device=DEVICE).expand(y.shape)
    dense = torch.autograd.grad(y, tensors, dy.contiguous(), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(y, tensors, dy), dense))
    strided = inputs | {'x': inputs['x'].mT.contiguous().mT, 'A': inputs['A'].repeat(1, 2)[:, :4]}
    strided['projected'] = inputs['projected'].repeat_interleave(2, dim=-1)[..., ::2]
    assert not any(strided[name].is_contiguous() for name in ('x', 'A', 'projected'))
    assert torch.equal(omni.omni_scan(**strided), y)


# --- the plain scan


@pytest.mark.parametrize(
    ('b', 'd', 'g', 'n', 'length'),
    [(1, 1, 1, 1, 1), (2, 6, 1, 5, 65), (1, 40, 2, 16, 203), (2, 12, 12, 3, 50), (1, 136, 1, 16, 17)],
)
def test_sequences_agree_with_the_definition(b, d, g, n, length):
    assert_sequences_agree(sequence_inputs(b=b, d=d, g=g, n=n, length=length))


@pytest.mark.parametrize('delta_softplus', [False, True])
@pytest.mark.parametrize('without', [('D',), ('delta_bias',), ('D', 'delta_bias')])
def test_sequences_agree_with_the_definition_without_options(without, delta_softplus):
    inputs = sequence_inputs()
    if not delta_softplus:  # then delta + delta_bias, or delta alone, must be positive itself
        bias = 0 if 'delta_bias' in without else inputs['delta_bias'][:, None]
        inputs['delta'] = inputs['delta'].abs() * 0.1 - bias
    assert_sequences_agree({name: x for name, x in inputs.items() if name not in without}, delta_softplus)


@pytest.mark.parametrize('step', [20.0, 1e-4])
def test_sequences_agree_with_the_definition_at_extreme_steps(step):
    """20: decays underflow to 0. 1e-4: almost no decay, so all positions contribute."""
    inputs = sequence_inputs()
    inputs['delta'] = inputs['delta'].abs() * step
    del inputs['delta_bias']
    assert_sequences_agree(inputs, delta_softplus=False)


def test_sequences_may_have_mixed_dtypes():
    inputs = sequence_inputs(torch.bfloat16)
    inputs |= {'delta': inputs['delta'].half(), 'A': inputs['A'].float(), 'D': inputs['D'].half()}
    assert_sequences_agree(inputs, tolerance=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize('layout', ['channels last', 'every other', 'expanded'])
def test_sequences_agree_with_the_definition_on_strided_inputs(layout):
    inputs = sequence_inputs(b=2, g=2)
    if layout == 'channels last':
        strided = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in inputs.items()}
    elif layout == 'every other':
        strided = {name: x.repeat_interleave(2, dim=-1)[..., ::2] for name, x in inputs.items()}
    else:
        strided = {name: x[:1].expand(x.shape) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for name, x in strided.items() if name in 'u delta A B C')
    assert_sequences_agree(strided)
    y = selective_scan(**strided, delta_softplus=True, backend='cuda')
    assert y.stride() == (strided['u'].stride() if layout == 'channels last' else inputs['u'].stride())


def test_many_states_of_sequences_are_scanned_in_parts(monkeypatch):
    monkeypatch.setattr(selective, 'MAX_STATES', 2)
    assert_sequences_agree(sequence_inputs(n=5))


def test_last_state_and_gate_agree_with_the_definition():
    inputs = sequence_inputs() | {'z': sequence_inputs(seed=1)['u']}
    results = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend='cuda')
    exact = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend='reference')
    torch.testing.assert_close(results, exact)


def test_softplus_and_sigmoid_keep_full_precision():
    """A scan of one position is softplus(delta)."""
    x = torch.linspace(-80, 80, 65, device=DEVICE)[None, :, None].requires_grad_()
    one = torch.ones_like(x)
    y = selective.scan(one, x, -one[0], one[:, None, :1], one[:, None, :1], None, None, True)
    for result, exact in (
        (y, torch.nn.functional.softplus(x.double(), threshold=math.inf)),
        (torch.autograd.grad(y.sum(), x)[0], x.double().sigmoid()),
    ):
        allowed = (2**-20 + x.detach().abs() * 2**-23) * exact  # the second: exp's argument, rounded
        assert ((result.double() - exact).abs() <= allowed).all()


# --- as PyTorch operators


def test_image_operators_pass_opcheck():
    tensors = [x for x in projected_inputs(d=2, size=(3, 2)).values() if torch.is_tensor(x)]
    for A in (tensors[4], tensors[4].repeat(1, 1, 1)):
        tensors[4] = A
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        assert_passes_opcheck(omni._forward, (*leaves, [0, 1, 2, 3], 3, 2, True), rtol=1e-4, atol=1e-5)
        y, states = omni._forward(*tensors, [0, 1, 2, 3], 3, 2, True)
        assert_passes_opcheck(omni._backward, (*tensors, states, y, [0, 1, 2, 3], 3, 2))


@pytest.mark.parametrize(('without', 'dtype'), [((), torch.float16), (('D', 'delta_bias'), torch.float32)])
def test_sequence_operators_pass_opcheck(without, dtype):
    inputs = sequence_inputs(d=2, n=1, length=17, g=2, dtype=dtype)
    inputs = [None if name in without else x.requires_grad_() for name, x in inputs.items()]
    inputs[0] = inputs[0].detach().mT.contiguous().mT.requires_grad_()
    assert_passes_opcheck(selective._forward, (*inputs, True, True), rtol=1e-2, atol=1e-2)
    inputs = [None if x is None else x.detach() for x in inputs]
    y, states = selective._forward(*inputs, True, True)
    assert_passes_opcheck(selective._backward, (*inputs, states, y, True))


class Omni(torch.nn.Module):
    def __init__(self):
        super().__init__()
        inputs = image_inputs(d=2, size=(3, 2))
        self.x, self.directions = inputs.pop('x'), inputs.pop('directions')
        add_parameters(self, inputs.values())

    def forward(self, x):
        return omni_scan(2 * x, *added_parameters(self), self.directions, 'cuda').square().sum()


def test_compiles_without_a_graph_break():
    module = Omni()
    assert_compiles_without_a_graph_break(module, module.x)


def test_compiles_with_dynamic_shapes():
    """The number of states saved for the backward pass depends on sizes that are symbolic at compile time."""
    module = Omni()
    compiled = torch.compile(module, backend='aot_eager', fullgraph=True, dynamic=True)
    for size in ((3, 2), (5, 6)):
        x = torch.randn(1, 2, *size, device=DEVICE, requires_grad=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(module(x), x))


def test_exports_as_one_node():
    module = Omni()
    assert_exports_as_one_node(module, module.x, 'omni_scan_cuda')


def test_backward_of_a_call_recorded_without_gradients_is_an_error():
    tensors = [x for x in projected_inputs(d=2, size=(3, 2)).values() if torch.is_tensor(x)]
    tensors[1].requires_grad_()
    y, _ = omni._forward(*tensors, list(ALL), 3, 2, False)
    with pytest.raises(RuntimeError, match='recorded with gradients switched off'):
        y.sum().backward()


# --- on a GPU only


@needs_gpu
def test_a_cuda_graph_is_bit_exact():
    inputs = projected_inputs(d=96, size=(16, 16), n=16)
    expected = run_with_grads(inputs, function=omni.omni_scan)
    graph, recorded = torch.cuda.CUDAGraph(), {}
    with torch.cuda.graph(graph):
        recorded = run_with_grads(inputs, function=omni.omni_scan)
    for x in recorded.values():
        x.zero_()
    graph.replay()
    assert_same(recorded, expected)


@needs_gpu
def test_runs_on_the_current_stream_and_in_other_threads():
    inputs = projected_inputs(d=96, size=(16, 16), n=16)
    expected = run_with_grads(inputs, function=omni.omni_scan)

    def on_a_stream(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = run_with_grads(inputs, function=omni.omni_scan)
            torch.cuda.current_stream().synchronize()
        return results

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(on_a_stream, range(8)):
            assert_same(results, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_runs_on_the_gpu_of_its_tensors():
    inputs = projected_inputs(d=96, size=(16, 16), n=16)
    expected = run_with_grads(inputs, function=omni.omni_scan)
    other = {name: x.to('cuda:1') if torch.is_tensor(x) else x for name, x in inputs.items()}
    results = run_with_grads(other, function=omni.omni_scan)
    torch.testing.assert_close({name: x.to('cuda:0') for name, x in results.items()}, expected)
    assert torch.cuda.current_device() == 0


# --- its name


@pytest.mark.parametrize('asks', ['argument', 'context', 'variable', 'option'])
def test_the_former_name_triton_selects_cuda_and_is_logged_once(asks, monkeypatch, caplog):
    names._log_renamed.cache_clear()
    logger = logging.getLogger('basicsr.selective_scan')
    monkeypatch.setattr(logger, 'handlers', [caplog.handler])
    monkeypatch.setattr(logger, 'propagate', False)
    caplog.set_level(logging.INFO, logger.name)
    if asks == 'variable':
        monkeypatch.setenv(names.VARIABLE, 'triton')
    if asks == 'option':
        monkeypatch.setattr(names, '_default', None)
        names.set_default_backend('triton')
    inputs = sequence_inputs() | {'backend': 'triton' if asks == 'argument' else None}
    with names.use_backend('triton' if asks == 'context' else None):
        for _ in range(2):
            assert scans_run_by(lambda: selective_scan(**inputs)) == ['selective_scan_cuda']
    assert caplog.text.count("backend 'triton' is now 'cuda', which takes its place") == 1
