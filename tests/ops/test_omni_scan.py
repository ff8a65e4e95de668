"""The fused omni scan against the unfused one.

Shapes: b batch, d channels, h, w height and width, k directions, r rank, n states. All tests run in PyTorch's
deterministic mode, which fills new memory, including scratch memory, with NaN.
"""

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
    scans_run_by,
    skip_where_forks_have_no_gradients,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from dpmambair_basicsr.archs.blocks import directional_scan
from dpmambair_basicsr.ops import omni_scan, selective_scan, use_backend
from dpmambair_basicsr.ops.cross_scan import cross_merge, cross_scan
from dpmambair_basicsr.ops.selective_scan import available_backends
from dpmambair_basicsr.ops.selective_scan.numba import omni as numba_omni

pytestmark = pytest.mark.usefixtures('nan_in_new_memory')
FP32 = torch.float32
needs_numba = pytest.mark.skipif('numba' not in available_backends(), reason='the extra [cpu] is not installed')

# Largest error allowed in fp32, relative to the largest entry, or to 0.1 where a sum over the pixels nearly vanishes.
TOLERANCE = 5e-6  # measured up to 2e-6


def omni_inputs(b=2, d=20, size=(5, 7), n=4, directions=(0, 1, 2, 3), rank=3, per_sample=(), dtype=FP32, seed=0):
    """Arguments of `omni_scan`, with Mamba's statistics; `per_sample` names those that differ between samples."""
    rng, k = torch.Generator().manual_seed(seed), len(directions)

    def randn(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    x_proj_weight = randn(k, rank + 2 * n, d) * d**-0.5
    if 'x_proj_weight' in per_sample:
        x_proj_weight = x_proj_weight * (1 + 0.3 * randn(b, 1, rank + 2 * n, 1))
    inputs = {
        'x': randn(b, d, *size),
        'x_proj_weight': x_proj_weight,
        'dt_proj_weight': randn(k, d, rank) * rank**-0.5,
        'dt_proj_bias': randn(k, d) - 4,
        'A': -torch.arange(1.0, n + 1, dtype=torch.float64) * torch.exp(0.1 * randn(k * d, n)),
        'D': randn(k * d),
    }
    if 'A' in per_sample:
        inputs['A'] = inputs['A'] * torch.exp(0.3 * randn(b, 1, 1))
    return {name: x.to(dtype) for name, x in inputs.items()} | {'directions': directions}


def run_with_grads(inputs, backend=None, function=omni_scan):
    """y and the gradients of a fixed random weighting of y."""
    leaves = {k: x.detach().requires_grad_() if torch.is_tensor(x) else x for k, x in inputs.items()}
    y = function(**leaves) if backend is None else function(**leaves, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(weights.to(y))
    return {'y': y.detach()} | {f'd{k}': x.grad for k, x in leaves.items() if torch.is_tensor(x)}


def in_double(inputs):
    return {k: x.double() if torch.is_tensor(x) else x for k, x in inputs.items()}


def assert_close(results, exact):
    assert results.keys() == exact.keys()
    for name, x in results.items():
        error, largest = (x.double() - exact[name]).abs().max(), exact[name].abs().max()
        assert error <= TOLERANCE * max(largest, 0.1), f'{name}: {error:.1e} of {largest:.1e}'


def assert_same(results, others):
    assert results.keys() == others.keys()
    assert all(torch.equal(results[name], others[name]) for name in results)


def assert_agrees(inputs):
    assert_close(run_with_grads(inputs), run_with_grads(in_double(inputs), backend='torch'))


def scan_alone(inputs, size):
    """Our kernels without the matrix product, whose result may depend on PyTorch's number of threads."""
    inputs = dict(inputs)
    x, weight = inputs.pop('x').flatten(2).mT, inputs.pop('x_proj_weight').flatten(-3, -2)
    inputs = {'x': x, 'projected': x @ weight.mT} | {k.replace('proj_', ''): v for k, v in inputs.items()}
    return run_with_grads(inputs | {'size': size}, function=numba_omni.omni_scan)


# --- results


@pytest.mark.parametrize('directions', [(0,), (0, 1), (0, 1, 2, 3), (3, 1)], ids=str)
@pytest.mark.parametrize('n', [1, 4, 16])
@pytest.mark.parametrize('d', [1, 4, 20])
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (5, 3)], ids=str)
@needs_numba
def test_agrees_with_the_unfused_scan(size, d, n, directions):
    assert_agrees(omni_inputs(d=d, size=size, n=n, directions=directions))


@pytest.mark.parametrize('directions', [(0,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize(('b', 'd', 'n', 'rank'), [(1, 20, 16, 2), (3, 32, 4, 24)])
@needs_numba
def test_agrees_with_the_unfused_scan_beyond_one_chunk(b, d, n, rank, directions):
    assert_agrees(omni_inputs(b=b, d=d, size=(64, 65), n=n, rank=rank, directions=directions))


@pytest.mark.parametrize('units', [1, 4, 100])
@needs_numba
def test_agrees_with_the_unfused_scan_for_any_partition_of_the_work(monkeypatch, units):
    """Directions summed by 1, 2 or 4 teams, projection gradients by 1, 2 or all 3 blocks."""
    monkeypatch.setattr(numba_omni, '_UNITS', units)
    assert_agrees(omni_inputs(d=40, size=(9, 15), n=16))


@needs_numba
def test_each_sample_may_have_its_own_projection():
    inputs = omni_inputs(b=3, per_sample=('x_proj_weight',))
    assert_agrees(inputs)
    y = omni_scan(**inputs)
    alone = inputs | {'x': inputs['x'][1:2], 'x_proj_weight': inputs['x_proj_weight'][1]}
    torch.testing.assert_close(omni_scan(**alone), y[1:2])


@pytest.mark.parametrize('units', [1, 100])
@pytest.mark.parametrize(
    ('b', 'd', 'size', 'n', 'directions'),
    [
        (1, 1, (1, 1), 1, (0,)),
        (2, 4, (5, 3), 4, (3, 1)),
        (3, 17, (1, 7), 16, (0, 1, 2, 3)),
        (2, 40, (13, 11), 5, (0,)),
        (9, 16, (3, 3), 2, (1, 2)),
    ],
    ids=str,
)
@needs_numba
def test_each_sample_may_have_its_own_A(b, d, size, n, directions, units, monkeypatch):
    """Equal to the definition on each sample alone, with its A; gradients too."""
    monkeypatch.setattr(numba_omni, '_UNITS', units)
    inputs = omni_inputs(b=b, d=d, size=size, n=n, directions=directions, per_sample=('x_proj_weight', 'A'))
    own = ('x', 'x_proj_weight', 'A')

    def scan_alone(directions, **tensors):
        samples = [tensors | {name: tensors[name][i] for name in own} for i in range(b)]
        ys = [omni_scan(**x | {'x': x['x'][None]}, directions=directions, backend='reference') for x in samples]
        return torch.cat(ys)

    results = run_with_grads(inputs)
    assert_close(results, run_with_grads(in_double(inputs), function=scan_alone))
    assert scans_run_by(lambda: run_with_grads(inputs)) == ['omni_scan_numba', 'omni_scan_numba_backward']


@needs_numba
def test_identical_A_per_sample_are_bit_exact_with_a_shared_A():
    inputs = omni_inputs(b=3, d=20, size=(9, 15), n=16)
    own = inputs | {'A': inputs['A'].repeat(3, 1, 1)}
    results, others = run_with_grads(own), run_with_grads(inputs)
    total = results.pop('dA').sum(0)
    torch.testing.assert_close(total, others.pop('dA'))
    assert_same(results, others)


@pytest.mark.parametrize(
    'backend', available_backends(dtype=torch.float64) + ['numba'] * ('numba' in available_backends())
)
@pytest.mark.parametrize('directions', [(0,), (0, 1, 2, 3)], ids=str)
def test_delta_scale_multiplies_delta_after_softplus(backend, directions):
    """DPMambaIR's Eq. 8: a scan with the softplus of the projected step sizes times the factor. 0 is allowed."""
    inputs = omni_inputs(b=3, d=5, size=(3, 4), n=3, rank=2, directions=directions)
    rng = torch.Generator().manual_seed(2)
    prompt = 1 + 0.3 * torch.randn(3, 2 + 2 * 3, generator=rng)
    scaled = network_form(inputs) | {'prompt': prompt, 'delta_scale': torch.tensor([0.0, 0.7, 2.5])}

    def by_equation(x, directions, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, prompt, delta_scale):
        xs, rank, n = cross_scan(x, directions), dt_projs_weight.shape[2], A_logs.shape[1]
        low, B, C = ((x_proj_weight @ xs) * prompt[:, None, :, None]).split([rank, n, n], dim=2)
        delta = F.softplus(dt_projs_weight @ low + dt_projs_bias[..., None]) * delta_scale[:, None, None, None]
        ys = selective_scan(xs.flatten(1, 2), delta.flatten(1, 2), -A_logs.exp(), B, C, Ds, backend='reference')
        return cross_merge(ys.view_as(xs), x.shape[2:], directions)

    if backend != 'numba':
        scaled = in_double(scaled)
    with use_backend(backend):
        results = run_with_grads(scaled, function=directional_scan)
    assert results['ddelta_scale'].abs().min() > 0
    assert_close(results, run_with_grads(in_double(scaled), function=by_equation))


def network_form(inputs):
    """The parameters as the networks' function takes them and checkpoints store them."""
    names = {'x_proj_weight': 'x_proj_weight', 'dt_proj_weight': 'dt_projs_weight', 'dt_proj_bias': 'dt_projs_bias'}
    parameters = {new: inputs[old] for old, new in names.items()}
    parameters |= {'A_logs': (-inputs['A']).log(), 'Ds': inputs['D']}
    return parameters | {'x': inputs['x'], 'directions': inputs['directions']}


@needs_numba
def test_prompts_and_logs_have_their_gradients():
    """Through the networks' function: the parameters as checkpoints store them, and DPMambaIR's prompt."""
    inputs = omni_inputs(n=3)
    prompt = 1 + 0.3 * torch.randn(2, 9, generator=torch.Generator().manual_seed(2))
    parameters = network_form(inputs) | {'prompt': prompt}
    results = run_with_grads(parameters, function=directional_scan)
    assert_close(results, run_with_grads(in_double(parameters), function=directional_scan))


@pytest.mark.parametrize('layout', ['channels_last', 'every other', 'expanded'])
@needs_numba
def test_results_are_bit_exact_for_any_layout(layout):
    inputs = omni_inputs(d=16)
    x = inputs['x']
    if layout == 'expanded':
        inputs['x'] = x[:1].repeat(2, 1, 1, 1)
    expected = omni_scan(**inputs)
    if layout == 'channels_last':
        strided = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'every other':
        strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    else:
        strided = x[:1].expand(2, -1, -1, -1)
    y = omni_scan(**(inputs | {'x': strided}))
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_numba
def test_the_incoming_gradient_may_be_expanded():
    leaves = {k: x.requires_grad_() if torch.is_tensor(x) else x for k, x in omni_inputs().items()}
    tensors = [x for x in leaves.values() if torch.is_tensor(x)]
    y = omni_scan(**leaves)
    dy = torch.randn(1, 1, 1, 1).expand(y.shape)
    expanded = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    dense = torch.autograd.grad(y, tensors, dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@needs_numba
def test_any_single_gradient_can_be_requested():
    inputs = omni_inputs()
    together = run_with_grads(inputs)
    for name in [name for name in inputs if name != 'directions']:
        leaf = inputs[name].clone().requires_grad_()
        y = omni_scan(**(inputs | {name: leaf}))
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        torch.testing.assert_close(leaf.grad, together[f'd{name}'])


@needs_numba
def test_computing_gradients_changes_neither_output_nor_inputs():
    inputs = omni_inputs(d=40)
    copies = {k: x.clone() for k, x in inputs.items() if torch.is_tensor(x)}
    with torch.no_grad():
        y = omni_scan(**inputs)
    assert torch.equal(run_with_grads(inputs)['y'], y)
    assert all(torch.equal(inputs[k], x) for k, x in copies.items())


# --- fused or unfused


def test_fp64_and_other_backends_run_unfused():
    """fp64, other devices and backends that are not fused scan sequences."""
    inputs = omni_inputs(d=4)
    exact = run_with_grads(in_double(inputs))
    assert exact['y'].dtype == torch.float64
    assert_close(run_with_grads(inputs, backend='reference'), exact)
    assert_close(run_with_grads(in_double(inputs), backend='reference'), exact)
    meta = {k: x.to('meta') if torch.is_tensor(x) else x for k, x in inputs.items()}
    assert omni_scan(**meta, backend='reference').shape == inputs['x'].shape


@needs_numba
def test_autocast_only_rounds_the_projections():
    inputs = omni_inputs(b=1)
    with torch.autocast('cpu', torch.bfloat16):
        y = omni_scan(**inputs)
    exact = omni_scan(**inputs)
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() <= 0.02 * exact.abs().max()


def test_without_a_fused_backend_the_unfused_scan_runs():
    inputs = omni_inputs(d=4)
    exact = run_with_grads(in_double(inputs))
    with use_backend('torch'):
        assert_close(run_with_grads(inputs), exact)


@needs_numba
def test_numba_is_fused_by_default_and_by_name():
    """On a CPU with numba, only another requested backend or a dtype other than fp32 scans sequences."""
    inputs, fused = omni_inputs(), ['omni_scan_numba', 'omni_scan_numba_backward']
    assert scans_run_by(lambda: run_with_grads(inputs)) == fused
    assert scans_run_by(lambda: run_with_grads(inputs, backend='numba')) == fused
    assert scans_run_by(lambda: omni_scan(**inputs, backend='torch')) == ['chunked_scan']
    assert scans_run_by(lambda: omni_scan(**in_double(inputs))) == ['chunked_scan']
    mixed = inputs | {'D': inputs['D'].double()}
    assert scans_run_by(lambda: omni_scan(**mixed, backend='numba')) == ['selective_scan_numba']


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_a_trace_contains_all_matrix_products():
    """FLOP counters trace or dispatch; a trace contains x_proj and dt_proj, and its results are the same."""
    inputs = omni_inputs(d=4)
    directions = inputs.pop('directions')

    def scan(*tensors):
        return omni_scan(*tensors, directions)

    traced = torch.jit.trace(scan, tuple(inputs.values()))
    assert sum(node.kind() == 'aten::matmul' for node in traced.inlined_graph.nodes()) == 2
    torch.testing.assert_close(traced(*inputs.values()), scan(*inputs.values()))


@needs_numba
def test_projects_once():
    inputs = omni_inputs(b=2, d=20, size=(5, 7), n=4, rank=3)
    with FlopCounterMode(display=False) as counter:
        omni_scan(**inputs)
    assert counter.get_total_flops() == 2 * (2 * 5 * 7) * 20 * 4 * (3 + 2 * 4)


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('directions', (0, 4), r'directions must be one or more of \(0, 1, 2, 3\), got \(0, 4\)'),
        ('directions', (), 'directions must be'),
        ('directions', (0, 1), r'x_proj_weight must be \(2, 11, 20\)'),
        ('x', torch.ones(2, 20, 0, 7), 'x must be'),
        ('x', torch.ones(20, 5, 7), 'x must be'),
        ('x_proj_weight', torch.ones(3, 4, 11, 20), r'x_proj_weight must be \(2, 4, 11, 20\), got \(3, 4, 11, 20\)'),
        ('dt_proj_weight', torch.ones(4, 19, 3), 'dt_proj_weight must be'),
        ('dt_proj_bias', torch.ones(80), 'dt_proj_bias must be'),
        ('A', torch.ones(20, 4), 'A must be'),
        ('A', torch.ones(3, 80, 4), r'A must be \(2, 80, 4\), got \(3, 80, 4\)'),
        ('D', torch.ones(4, 20), 'D must be'),
    ],
)
def test_errors_name_the_invalid_argument(name, value, message):
    with pytest.raises(ValueError, match=f'^omni_scan: {message}'):
        omni_scan(**(omni_inputs() | {name: value}))


# --- threads and processes


@pytest.mark.parametrize(
    'shape', [{'b': 1, 'd': 40}, {'b': 3, 'd': 96}, {'b': 2, 'd': 8, 'directions': (0, 2)}], ids=str
)
@needs_numba
def test_results_are_bit_exact_for_any_number_of_threads(threads, shape):
    inputs = omni_inputs(n=16, size=(9, 31), **shape)
    threads(1)
    alone = scan_alone(inputs, (9, 31))
    for number in (2, 5):
        threads(number)
        assert_same(scan_alone(inputs, (9, 31)), alone)


@needs_numba
def test_python_threads_may_scan_concurrently(threads):
    threads(1)
    inputs = [omni_inputs(d=48, size=(9, 15), seed=seed) for seed in range(4)]
    alone = [scan_alone(x, (9, 15)) for x in inputs]

    def scan_repeatedly(x):
        torch.set_num_threads(2)  # OpenMP's setting is per thread
        return [scan_alone(x, (9, 15)) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for results, expected in zip(pool.map(scan_repeatedly, inputs), alone, strict=True):
            for result in results:
                assert_same(result, expected)


class Scans(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        inputs = omni_inputs(d=48, size=(9, 15), seed=index)
        # A worker starts with one thread: OpenMP, which the matrix product uses, hangs in a fork with more.
        return run_with_grads(inputs)


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no fork')
@needs_numba
def test_forked_data_loader_workers_may_scan(threads):
    skip_where_forks_have_no_gradients()
    threads(1)
    expected = [Scans()[index] for index in range(4)]
    threads(2)
    Scans()[0]  # this process now has threads that its forks do not have
    loader = DataLoader(Scans(), batch_size=None, num_workers=2, multiprocessing_context='fork', timeout=30)
    for result, x in zip(loader, expected, strict=True):
        assert_same(result, x)


# --- as a PyTorch operator


@needs_numba
def test_operator_passes_opcheck():
    inputs = omni_inputs(size=(5, 14))
    x = inputs['x'].flatten(2).mT
    projected = x @ inputs['x_proj_weight'].flatten(0, 1).mT
    tensors = [x, projected, *(inputs[name] for name in ('dt_proj_weight', 'dt_proj_bias', 'A', 'D'))]
    for A in (inputs['A'], inputs['A'].repeat(2, 1, 1)):
        tensors[4] = A
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        assert_passes_opcheck(numba_omni._forward, (*leaves, [0, 1, 2, 3], 5, 14, True), rtol=1e-4, atol=1e-5)
        y, states = numba_omni._forward(*tensors, [0, 1, 2, 3], 5, 14, True)
        assert_passes_opcheck(numba_omni._backward, (*tensors, states, y, [0, 1, 2, 3], 5, 14))


class Omni(torch.nn.Module):
    def __init__(self):
        super().__init__()
        inputs = omni_inputs()
        self.x, self.directions = inputs.pop('x'), inputs.pop('directions')
        add_parameters(self, inputs.values())

    def forward(self, x):
        return omni_scan(2 * x, *added_parameters(self), self.directions).square().sum()


@needs_numba
def test_compiles_without_a_graph_break():
    module = Omni()
    assert_compiles_without_a_graph_break(module, module.x)


@needs_numba
def test_exports_as_one_node():
    module = Omni()
    assert_exports_as_one_node(module, module.x, 'omni_scan_numba')


@needs_numba
def test_backward_of_a_call_recorded_without_gradients_is_an_error():
    inputs = omni_inputs()
    x = inputs['x'].flatten(2).mT
    projected = (x @ inputs['x_proj_weight'].flatten(0, 1).mT).requires_grad_()
    tensors = [inputs[name] for name in ('dt_proj_weight', 'dt_proj_bias', 'A', 'D')]
    y, _ = numba_omni._forward(x, projected, *tensors, [0, 1, 2, 3], 5, 7, False)
    with pytest.raises(RuntimeError, match='recorded with gradients switched off'):
        y.sum().backward()
