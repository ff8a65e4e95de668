"""The scan's definition, and every available backend against it.

Shapes: b batch, d channels, n states, l positions, g groups.
"""

import subprocess
import sys

import pytest
import torch

from dpmambair_basicsr.ops import selective_scan
from dpmambair_basicsr.ops.selective_scan import BACKENDS, available_backends, torch_chunked
from dpmambair_basicsr.ops.selective_scan.backend import get_backend

DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']


def runs(dtype):
    """(backend, device) for every backend available for this type, the definition included."""
    return [
        pytest.param(backend, device, id=f'{backend}-{device}')
        for device in DEVICES
        for backend in available_backends(device, dtype)
    ]


every_backend = pytest.mark.parametrize(('backend', 'device'), runs(torch.float32))
every_double_backend = pytest.mark.parametrize(('backend', 'device'), runs(torch.float64))

# Largest error allowed in y and in each gradient against the definition in fp64, relative to the largest entry.
TOLERANCE = {
    torch.float64: 1e-12,  # measured up to 2e-15
    torch.float32: 5e-6,  # measured up to 1.4e-6, in A's gradient, a sum over b * l terms; the definition: 1.1e-6
    torch.bfloat16: 4e-3,  # results are rounded to 8 bits, which costs up to 2^-8; inside it is fp32
}


def scan_inputs(b=2, d=6, n=5, length=65, g=1, dtype=torch.float64, device='cpu', seed=0):
    """Inputs with Mamba's statistics: A = -1..-n, softplus(delta + delta_bias) from 1e-3 to 1e-1 and beyond."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    inputs = {
        'u': randn(b, d, length),
        'delta': randn(b, d, length),
        'A': -torch.arange(1.0, n + 1, dtype=torch.float64) * torch.exp(0.1 * randn(d, n)),
        'B': randn(b, g, n, length),
        'C': randn(b, g, n, length),
        'D': randn(d),
        'delta_bias': randn(d) - 4,
    }
    return {name: x.to(dtype).to(device) for name, x in inputs.items()}


def weights(y):
    """Random, the same for every dtype of y: exact in bfloat16."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)


def run_with_grads(inputs, **options):
    """y and the gradient of a fixed random weighting of y with respect to every input."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = selective_scan(**leaves, **options)
    y.backward(weights(y))
    return {'y': y.detach(), **{f'd{name}': x.grad for name, x in leaves.items()}}


def assert_agrees(backend, inputs, delta_softplus=True):
    dtype = inputs['u'].dtype
    result = run_with_grads(inputs, delta_softplus=delta_softplus, backend=backend)
    exact = run_with_grads(
        {name: x.double() for name, x in inputs.items()}, delta_softplus=delta_softplus, backend='reference'
    )
    for name, x in result.items():
        assert x.dtype == dtype, name
        error, largest = (x.double() - exact[name]).abs().max(), exact[name].abs().max()
        assert error <= TOLERANCE[dtype] * largest, f'{name}: {error:.1e} of {largest:.1e}'


@every_double_backend
def test_constant_inputs_give_a_geometric_sum(backend, device):
    """a = exp(delta A): y_t = C B delta u (1 + a + ... + a^(t-1)) = C B delta u (1 - a^t) / (1 - a), t from 1."""
    u, delta, a, b, c, length = 0.7, 0.3, -0.9, 1.3, -0.4, 200
    x = torch.ones(1, 1, length, dtype=torch.float64, device=device)
    y = selective_scan(u * x, delta * x, a * x[0, :, :1], b * x, c * x, backend=backend)
    decay = torch.tensor(delta * a, dtype=torch.float64, device=device).exp()
    t = torch.arange(1, length + 1, device=device)
    torch.testing.assert_close(y[0, 0], c * b * delta * u * (1 - decay**t) / (1 - decay))


@every_double_backend
def test_gradcheck(backend, device):
    inputs = scan_inputs(b=2, d=4, n=3, length=9, g=2, device=device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=True, backend=backend), leaves)


@every_double_backend
def test_is_causal(backend, device):
    """A change at position t changes outputs from t on, and only those: the Jacobian is lower triangular and full."""
    inputs = scan_inputs(b=1, d=1, length=70, device=device)
    inputs['delta_bias'] += 3
    u = inputs.pop('u')
    jacobian = torch.autograd.functional.jacobian(
        lambda u: selective_scan(u, **inputs, delta_softplus=True, backend=backend)[0, 0], u
    )[:, 0, 0]
    assert jacobian.triu(diagonal=1).eq(0).all()
    assert jacobian.tril().ne(0).sum() == 70 * 71 / 2


@every_double_backend
def test_groups_are_separate_scans(backend, device):
    inputs = scan_inputs(d=6, g=3, device=device)
    together = selective_scan(**inputs, backend=backend, delta_softplus=True)
    for group in range(3):
        part = {name: x[:, 2 * group : 2 * group + 2] for name, x in inputs.items() if name in ('u', 'delta')}
        part |= {name: inputs[name][2 * group : 2 * group + 2] for name in ('A', 'D', 'delta_bias')}
        part |= {name: inputs[name][:, group] for name in ('B', 'C')}  # (b, n, l)
        alone = selective_scan(**part, backend=backend, delta_softplus=True)
        torch.testing.assert_close(together[:, 2 * group : 2 * group + 2], alone)


@pytest.mark.parametrize('length', [1, 63, 64, 65, 1000])
@pytest.mark.parametrize('dtype', TOLERANCE)
@every_backend
def test_agrees_with_the_definition_at_any_length(backend, device, dtype, length):
    if backend not in available_backends(device, torch.promote_types(dtype, torch.float32)):
        pytest.skip(f'{backend} does not compute in {dtype}')
    assert_agrees(backend, scan_inputs(d=20, n=16, length=length, g=2, dtype=dtype, device=device))


@pytest.mark.parametrize(('d', 'g'), [(1, 1), (4, 1), (4, 2), (4, 4), (16, 1), (33, 1), (36, 4)])
@pytest.mark.parametrize('b', [1, 3])
@every_backend
def test_agrees_with_the_definition_at_any_width(backend, device, b, d, g):
    assert_agrees(backend, scan_inputs(b=b, d=d, n=16, g=g, dtype=torch.float32, device=device))


@pytest.mark.parametrize('n', [1, 8, 17])
@every_backend
def test_agrees_with_the_definition_with_any_number_of_states(backend, device, n):
    assert_agrees(backend, scan_inputs(n=n, dtype=torch.float32, device=device))


@pytest.mark.parametrize('delta_softplus', [False, True])
@pytest.mark.parametrize('without', [(), ('D',), ('delta_bias',), ('D', 'delta_bias')])
@every_backend
def test_agrees_with_the_definition_without_options(backend, device, without, delta_softplus):
    inputs = scan_inputs(dtype=torch.float32, device=device)
    if not delta_softplus:  # then delta + delta_bias, or delta alone, must be positive itself
        inputs['delta'] = inputs['delta'].abs() * 0.1 - (
            0 if 'delta_bias' in without else inputs['delta_bias'][:, None]
        )
    assert_agrees(backend, {name: x for name, x in inputs.items() if name not in without}, delta_softplus)


@pytest.mark.parametrize(('b', 'd', 'g'), [(1, 1, 1), (2, 6, 1), (3, 20, 2), (3, 17, 17)])
@every_backend
def test_each_sample_may_have_its_own_A(backend, device, b, d, g):
    """Equal to each sample alone, with its A: y, last state, every gradient; gated, on strided inputs."""
    inputs = scan_inputs(b=b, d=d, g=g, dtype=torch.float32, device=device)
    inputs |= {'A': inputs['A'] * torch.linspace(0.3, 2, b, device=device)[:, None, None], 'z': inputs['u'].flip(1)}
    inputs['u'] = inputs['u'].mT.contiguous().mT

    def together(**leaves):
        return selective_scan(**leaves, delta_softplus=True, backend=backend, return_last_state=True)

    def alone(**leaves):
        own = ('u', 'delta', 'A', 'B', 'C', 'z')
        samples = [leaves | {name: leaves[name][i : i + 1] for name in own} for i in range(b)]
        parts = [
            selective_scan(**x | {'A': x['A'][0]}, delta_softplus=True, backend='reference', return_last_state=True)
            for x in samples
        ]
        return (torch.cat(part) for part in zip(*parts, strict=True))

    def results(function, dtype):
        leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in inputs.items()}
        y, state = function(**leaves)
        (y * weights(y)).sum().add((state * weights(state)).sum()).backward()
        return {'y': y.detach(), 'state': state.detach(), **{f'd{name}': x.grad for name, x in leaves.items()}}

    exact = results(alone, torch.float64)
    for name, x in results(together, torch.float32).items():
        error, largest = (x.double() - exact[name]).abs().max(), exact[name].abs().max()
        assert error <= TOLERANCE[torch.float32] * largest, f'{name}: {error:.1e} of {largest:.1e}'


@every_backend
def test_agrees_with_the_definition_without_a_group_axis(backend, device):
    inputs = scan_inputs(dtype=torch.float32, device=device)
    assert_agrees(backend, inputs | {'B': inputs['B'][:, 0], 'C': inputs['C'][:, 0]})


@every_backend
def test_agrees_with_the_definition_on_strided_inputs(backend, device):
    inputs = scan_inputs(d=8, g=2, dtype=torch.float32, device=device)
    strided = {name: x.mT.contiguous().mT if x.dim() > 1 else x.repeat(2)[::2] for name, x in inputs.items()}
    strided['u'] = inputs['u'].flip(-1).repeat_interleave(2, dim=0)[::2]
    strided['C'] = strided['C'][:, :1].expand(-1, 2, -1, -1)
    assert not any(x.is_contiguous() for x in strided.values())
    assert_agrees(backend, strided)


@pytest.mark.parametrize('step', [20.0, 1e-4])
@every_backend
def test_agrees_with_the_definition_at_extreme_steps(backend, device, step):
    """20: decays underflow to 0, and softplus becomes the identity. 1e-4: hardly any decay: all positions count."""
    inputs = scan_inputs(n=16, length=300, dtype=torch.float32, device=device)
    inputs['delta'] = inputs['delta'].abs() * step
    del inputs['delta_bias']
    assert_agrees(backend, inputs, delta_softplus=False)
    if step > 1:
        assert_agrees(backend, inputs, delta_softplus=True)


@every_backend
def test_half_precision_inputs_only_round_the_result(backend, device):
    inputs = scan_inputs(length=200, dtype=torch.bfloat16, device=device)
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    exact = selective_scan(**{k: x.float() for k, x in inputs.items()}, delta_softplus=True, backend=backend)
    if get_backend(backend).reads_half:  # a kernel of its own, which may sum in another order and round differently
        torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-7, atol=0)
        assert (y != exact.bfloat16()).float().mean() < 0.01
    else:
        assert torch.equal(y, exact.bfloat16())


@pytest.fixture
def nan_in_new_memory():
    """PyTorch's deterministic mode: new memory is filled with NaN, and nondeterministic operations raise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@every_backend
def test_is_deterministic_and_reads_no_uninitialized_memory(backend, device, nan_in_new_memory):
    if backend == 'mamba_ssm':
        pytest.skip('its kernels add up dB and dC with atomics')
    inputs = scan_inputs(d=20, length=301, dtype=torch.float32, device=device)
    first, second = (run_with_grads(inputs, delta_softplus=True, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(x.isfinite().all() for x in first.values())
    with torch.no_grad():
        assert torch.equal(first['y'], selective_scan(**inputs, delta_softplus=True, backend=backend))


@every_backend
def test_any_single_gradient_can_be_requested(backend, device):
    inputs = scan_inputs(dtype=torch.float32, device=device)
    together = run_with_grads(inputs, backend=backend, delta_softplus=True)
    for name in inputs:
        leaf = inputs[name].clone().requires_grad_()
        y = selective_scan(**(inputs | {name: leaf}), backend=backend, delta_softplus=True)
        y.backward(weights(y))
        torch.testing.assert_close(leaf.grad, together[f'd{name}'])


@every_backend
def test_does_not_write_to_its_inputs(backend, device):
    inputs = scan_inputs(dtype=torch.float32, device=device)
    copies = {name: x.clone() for name, x in inputs.items()}
    run_with_grads(inputs, backend=backend, delta_softplus=True)
    assert all(torch.equal(inputs[name], copies[name]) for name in inputs)


@every_backend
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_can_be_traced(backend, device):
    inputs = scan_inputs(length=10, dtype=torch.float32, device=device)

    def scan(*x):
        return selective_scan(*x, delta_softplus=True, backend=backend)

    traced = torch.jit.trace(scan, tuple(inputs.values()))
    assert 'repeat_interleave' not in str(traced.graph)  # by a number that is then a tensor on the CPU
    torch.testing.assert_close(traced(*inputs.values()), scan(*inputs.values()))


# --- 'torch' only: results must not depend on the partition of the work


@pytest.mark.parametrize('elements', [1, 300, 5000, 40000])
@pytest.mark.parametrize('positions', [2, 32])
def test_torch_agrees_with_the_definition_for_any_partition_of_the_work(monkeypatch, elements, positions):
    """Elements per step from 1 (one channel and one chunk at a time) to 40000 (all in one block)."""
    monkeypatch.setattr(torch_chunked, '_STEP_ELEMENTS_CPU', elements)
    monkeypatch.setattr(torch_chunked, '_POSITIONS_MAX', positions)
    monkeypatch.setattr(torch_chunked, '_POSITIONS_MIN', positions)
    assert_agrees('torch', scan_inputs(d=10, length=203, g=2))


def test_torch_operator_passes_opcheck():
    """PyTorch's own checks: no mutation or aliasing, correct fake tensors, correct tracing by torch.compile."""
    inputs = [x.requires_grad_() for x in scan_inputs(d=4, length=9, g=2).values()]
    torch.library.opcheck(torch_chunked._scan, (*inputs, True, True))


def test_torch_refuses_a_second_derivative():
    inputs = scan_inputs(length=5)
    u = inputs.pop('u').requires_grad_()
    y = selective_scan(u, **inputs, delta_softplus=True, backend='torch')
    (du,) = torch.autograd.grad((y**2).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula'):
        torch.autograd.grad(du.sum(), u)


def test_torch_is_one_node_in_a_flop_count():
    """fvcore traces; thousands of small operations per scan would take it minutes for a network."""
    nn = pytest.importorskip('fvcore.nn')

    class Scan(torch.nn.Module):
        def forward(self, *inputs):
            return selective_scan(*inputs, backend='torch')

    count = nn.FlopCountAnalysis(Scan(), tuple(scan_inputs(length=100).values())).unsupported_ops_warnings(False)
    assert count.total() == 0
    assert count.unsupported_ops() == {'dpmambair_basicsr::chunked_scan': 1}


# --- the dispatcher


def test_every_documented_backend_is_registered():
    assert set(BACKENDS) == {'reference', 'torch', 'numba', 'cuda', 'mamba_ssm'}
    assert {'reference', 'torch'} <= set(available_backends())


def test_unknown_backend_lists_the_choices():
    with pytest.raises(ValueError, match="'cuad'.*cuda, numba, torch, reference, mamba_ssm"):
        selective_scan(**scan_inputs(), backend='cuad')


@pytest.mark.parametrize('backend', sorted(set(BACKENDS) - set(available_backends())))
def test_unavailable_backend_is_refused(backend):
    with pytest.raises(RuntimeError, match=f"'{backend}' is not available: .*torch, reference"):
        selective_scan(**scan_inputs(dtype=torch.float32), backend=backend)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('u', torch.ones(2, 6)),
        ('u', torch.ones(2, 6, 0)),
        ('u', torch.ones(2, 6, 65, dtype=torch.int64)),
        ('delta', torch.ones(2, 6, 64)),
        ('A', torch.ones(5, 6)),
        ('A', torch.ones(3, 6, 5)),
        ('B', torch.ones(2, 1, 4, 65)),
        ('C', torch.ones(2, 2, 5, 65)),
        ('D', torch.ones(1)),
        ('delta_bias', torch.ones(6, 1)),
        ('delta', torch.ones(2, 6, 65, dtype=torch.complex64)),
    ],
)
def test_errors_name_the_invalid_argument(name, value):
    with pytest.raises(ValueError, match=f'^selective_scan: {name} must be [^\n]*$'):
        selective_scan(**(scan_inputs(dtype=torch.float32) | {name: value}))


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match='6 channels of u do not divide into the 4 groups of B'):
        selective_scan(**scan_inputs(d=6, g=4))


def test_importing_ops_imports_torch_only():
    code = (
        'import sys, torch; before = set(sys.modules); import dpmambair_basicsr.ops; '  # torch may import cuda.bindings
        "print([m for m in ('basicsr', 'cv2', 'cuda', 'numba') if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, '[]'), result.stderr
