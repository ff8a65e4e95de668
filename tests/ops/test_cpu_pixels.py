"""The CPU kernels for depthwise convolutions and layer norm, fused with the operations that follow, against PyTorch.

All tests run in PyTorch's deterministic mode, which fills new memory, including scratch memory, with NaN.
"""

import pytest
import torch
from operator_checks import scans_run_by
from torch import nn
from torch.nn import functional as F

from dpmambair_basicsr.archs import DPMambaIR, VmambaIR
from dpmambair_basicsr.archs.blocks import EFFN, LayerNorm
from dpmambair_basicsr.ops import use_backend
from dpmambair_basicsr.ops.pixels import cpu_kernels_run, depthwise_gelu_gate, depthwise_silu, layer_norm_silu_gate
from dpmambair_basicsr.ops.pixels import layer_norm as layer_norm_of
from dpmambair_basicsr.ops.selective_scan.numba import pixels as kernels

pytest.importorskip('numba', reason='the extra [cpu] is not installed')
pytestmark = pytest.mark.usefixtures('nan_in_new_memory')

SIZES = [(2, 16, 1, 1), (1, 17, 4, 1), (1, 24, 5, 7), (3, 40, 2, 6), (1, 48, 9, 70), (2, 127, 3, 66), (1, 256, 1, 130)]


def image(*shape, seed=0, scale=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(scale)
    return x.contiguous(memory_format=torch.channels_last)


def taps(channels, seed):
    return image(channels, 1, 3, 3, seed=seed).contiguous(), torch.linspace(-1, 1, channels)


def convolved(x, weight, bias):
    """By the definition, in fp64."""
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias, padding=1, groups=x.shape[1])


def normed(x, weight, bias):
    pixels = x.double().permute(0, 2, 3, 1)
    return F.layer_norm(pixels, weight.shape, weight.double(), bias.double(), 1e-5).permute(0, 3, 1, 2)


def assert_close(result, exact, tolerance=4e-7):
    assert result.dtype == torch.float32 and result.shape == exact.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert (result - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_convolutions_agree_with_the_definition(size, with_bias):
    x, value, channels = image(*size, scale=2), image(*size, seed=1), size[1]
    (weight, bias), (other, other_bias) = taps(channels, 2), taps(channels, 3)
    bias, other_bias = (bias, other_bias.flip(0)) if with_bias else (None, None)
    assert_close(kernels.depthwise_silu(x, weight, bias), F.silu(convolved(x, weight, bias)))
    exact = F.gelu(convolved(x, weight, bias)) * convolved(value, other, other_bias)
    assert_close(kernels.depthwise_gelu_gate(x, weight, bias, value, other, other_bias), exact)


@pytest.mark.parametrize('size', [size for size in SIZES if size[1] % 16 == 0], ids=str)
def test_layer_norm_agrees_with_the_definition(size):
    x, gate, channels = image(*size, scale=3) + 5, image(*size, seed=1, scale=4), size[1]
    weight, bias = torch.linspace(-1, 2, channels), torch.linspace(0, 1, channels)
    exact = normed(x, weight, bias)
    assert_close(kernels.layer_norm(x, weight, bias, 1e-5, None), exact, 1e-6)  # x is rounded at 5
    assert_close(kernels.layer_norm(x, weight, bias, 1e-5, gate), exact * F.silu(gate.double()), 1e-6)


def alone(function, x):
    """The activation of each value, by a convolution that copies it."""
    copies = torch.zeros(len(x), 1, 3, 3)
    copies[:, :, 1, 1] = 1
    return function(x.view(1, -1, 1, 1), copies).flatten()


def silu(x):
    return alone(lambda x, copies: kernels.depthwise_silu(x, copies, None), x)


def gelu(x):
    ones = torch.ones(1, len(x), 1, 1)
    return alone(lambda x, copies: kernels.depthwise_gelu_gate(x, copies, None, ones, copies, None), x)


@pytest.mark.parametrize(('function', 'exact'), [(silu, F.silu), (gelu, F.gelu)])
def test_activations_are_accurate_over_the_whole_range(function, exact):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 4, 500), -torch.logspace(-30, 1.9, 500)])
    result, truth = function(x), exact(x.double())
    assert ((result - truth).abs() <= 1.5e-6 * truth.abs() + 1e-9).all()
    special = torch.tensor([0.0, float('inf'), float('nan'), 1e30, -1e30, *[1.0] * 11])
    result, truth = function(special), exact(special.double()).float()  # in float32, PyTorch's gelu(inf) may be NaN
    torch.testing.assert_close(result, truth, equal_nan=True, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize('threads', [1, 2, 5])
def test_results_are_bit_exact_for_any_number_of_threads(threads):
    x, value, (weight, bias) = image(2, 48, 33, 90), image(2, 48, 33, 90, seed=1), taps(48, 2)
    expected = [f(x, value, weight, bias) for f in FUNCTIONS]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(torch.equal, [f(x, value, weight, bias) for f in FUNCTIONS], expected))
    finally:
        torch.set_num_threads(before)


FUNCTIONS = [
    lambda x, value, weight, bias: kernels.depthwise_silu(x, weight, bias),
    lambda x, value, weight, bias: kernels.depthwise_gelu_gate(x, weight, None, value, weight, bias),
    lambda x, value, weight, bias: kernels.layer_norm(x, bias, bias, 1e-6, value),
]


@pytest.mark.parametrize('function', FUNCTIONS)
def test_results_are_bit_exact_for_any_layout_and_for_slices(function):
    x, value, (weight, bias) = image(2, 48, 6, 7), image(2, 48, 6, 7, seed=1), taps(48, 2)
    expected = function(x, value, weight, bias)
    for other in (x.contiguous(), torch.cat([x[:, :1], x, x[:, :5]], dim=1)[:, 1:49], x.mT.contiguous().mT):
        assert torch.equal(function(other, value, weight, bias), expected)
        assert torch.equal(function(x, value, weight, bias), expected)
    sparse = bias.repeat_interleave(2)[::2]
    assert torch.equal(function(x, value, weight.expand(48, 1, 3, 3), sparse), expected)


def names_of(function):
    return sorted({name for name in scans_run_by(function) if 'scan' not in name})


OURS = ['depthwise_gelu_gate_numba', 'depthwise_silu_numba', 'layer_norm_numba']
OPTIONS = {'dim': 16, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}


@pytest.mark.parametrize('network', [DPMambaIR, VmambaIR])
def test_networks_without_gradients_use_the_kernels_with_equal_results(network):
    torch.manual_seed(0)
    net, x = network(**OPTIONS).eval(), torch.rand(1, 3, 21, 34)
    with torch.no_grad():
        assert names_of(lambda: net(x)) == OURS
        result = net(x)
        with use_backend('torch'):
            assert names_of(lambda: net(x)) == []
    assert names_of(lambda: net(x).sum().backward()) == []
    torch.testing.assert_close(result, net(x).detach(), rtol=0, atol=1e-5)


def test_kernels_run_only_on_supported_inputs_without_gradients():
    x, bias = image(1, 32, 3, 3), torch.ones(32, requires_grad=True)
    weight = taps(32, 1)[0]
    assert cpu_kernels_run(x, weight)
    assert not cpu_kernels_run(x.double(), weight) and not cpu_kernels_run(x[:0], weight)
    assert not cpu_kernels_run(x, bias)
    with torch.no_grad():
        assert cpu_kernels_run(x, bias)
    with torch.inference_mode():
        assert cpu_kernels_run(x, bias)
    with torch.autocast('cpu', torch.bfloat16):
        assert not cpu_kernels_run(x, weight)
    with use_backend('reference'):
        assert not cpu_kernels_run(x, weight)


@torch.no_grad()
def test_unsupported_shapes_fall_back_to_pytorch():
    few, (weight, bias) = image(1, 15, 4, 5), taps(15, 1)
    assert torch.equal(depthwise_silu(few, weight, bias), F.silu(F.conv2d(few, weight, bias, padding=1, groups=15)))
    exact = F.gelu(convolved(few, weight, None)) * convolved(few, weight, bias)
    assert (depthwise_gelu_gate(few, weight, None, few, weight, bias) - exact).abs().max() < 1e-5
    odd, norm = image(1, 24, 4, 5), nn.LayerNorm(24)
    assert torch.equal(layer_norm_of(norm, odd), norm(odd.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert torch.equal(layer_norm_silu_gate(norm, odd, odd), layer_norm_of(norm, odd) * F.silu(odd))


@pytest.mark.parametrize('frozen', ['weight', 'bias'])
def test_a_gradient_of_the_weights_or_of_the_biases_alone_is_not_lost(frozen):
    torch.manual_seed(0)
    net, x = DPMambaIR(**OPTIONS), torch.rand(1, 3, 8, 8)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not name.endswith(frozen))
    net(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)


class Block(nn.Sequential):
    def __init__(self):
        super().__init__(LayerNorm(16), EFFN(16, 2, bias=True))


@torch.no_grad()
def test_traced_exported_and_compiled_code_uses_pytorchs_operators():
    block, x = Block().eval(), image(1, 16, 4, 5)
    assert names_of(lambda: block(x)) == ['depthwise_gelu_gate_numba', 'layer_norm_numba']
    program = torch.export.export(block, (x,))
    assert 'numba' not in str(program.graph)
    traced = torch.jit.trace(block, x)
    assert 'numba' not in str(traced.inlined_graph)
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    assert names_of(lambda: compiled(x)) == []
    for other in (program.module(), traced, compiled):
        torch.testing.assert_close(other(x), block(x))


def test_fake_kernels_return_the_layout_of_real_results():
    x, (weight, bias) = image(2, 16, 3, 5), taps(16, 1)
    for function, arguments in (
        (kernels.layer_norm, (x, bias, bias, 1e-5, x)),
        (kernels.depthwise_silu, (x.contiguous(), weight, None)),
        (kernels.depthwise_gelu_gate, (x, weight, bias, x, weight, None)),
    ):
        torch.library.opcheck(function, arguments, test_utils=('test_schema', 'test_faketensor'))


def test_weights_that_do_not_fit_are_refused_as_pytorch_does():
    x, wrong = torch.rand(1, 32, 4, 4), torch.rand(16, 1, 3, 3)
    with torch.no_grad():
        for function in (
            lambda: depthwise_silu(x, wrong, None),
            lambda: depthwise_silu(x, torch.rand(32, 1, 3, 3), torch.rand(16)),
            lambda: depthwise_gelu_gate(x, wrong, None, x, wrong, None),
            lambda: layer_norm_of(nn.LayerNorm(16), x),
            lambda: layer_norm_silu_gate(nn.LayerNorm(32), x, x[:, :16]),
        ):
            with pytest.raises(RuntimeError):
                function()
        large = torch.rand(32, 1, 5, 5)
        assert torch.equal(depthwise_silu(x, large, None), F.silu(F.conv2d(x, large, padding=1, groups=32)))
        for norm in (nn.LayerNorm(32, bias=False), nn.LayerNorm(32, elementwise_affine=False)):
            assert torch.equal(layer_norm_of(norm, x), norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
