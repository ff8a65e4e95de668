"""The kernels for layer norm, depthwise convolutions and their gates: on a GPU if there is one, else built by g++.

On the CPU, new memory is full of NaN, and sizes are tiny.
"""

import pytest
import torch
from operator_checks import assert_compiles_without_a_graph_break, assert_passes_opcheck, scans_run_by
from support import cuda_on_host
from support.cuda_on_host import needs_nvrtc, resources
from torch import nn
from torch.nn import functional as F

from dpmambair_basicsr.archs import DPMambaIR, VmambaIR
from dpmambair_basicsr.archs.blocks import EFFN, LayerNorm, norm_and_gate, silu_depthwise
from dpmambair_basicsr.ops import use_backend
from dpmambair_basicsr.ops.pixels import (
    MAX_CHANNELS,
    depthwise_conv,
    depthwise_gelu_gate,
    depthwise_silu,
    kernels_run,
    layer_norm,
    layer_norm_silu_gate,
)
from dpmambair_basicsr.ops.selective_scan.cuda import pixels, runtime

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
KERNELS = {
    'layer_norm': {'layer_norm_outputs', 'layer_norm_gradients'},
    'depthwise': {'depthwise_outputs', 'depthwise_weight_gradients'},
}


@pytest.fixture
def kernels(monkeypatch):
    if not ON_GPU:
        cuda_on_host.install(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory
    yield
    torch.use_deterministic_algorithms(False)
    pixels._kernel.cache_clear()


needs_kernels = [pytest.mark.usefixtures('kernels')] + ([] if ON_GPU else [cuda_on_host.needs_gxx])


def with_kernels(test):
    for mark in needs_kernels:
        test = mark(test)
    return test


def image(*shape, dtype=torch.float32, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).add(offset).to(dtype).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


def gradients(function, *tensors, dtype):
    """The result, and the gradients of every tensor for a fixed output gradient that this dtype represents exactly."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    dy = torch.sin(torch.arange(y.numel(), device=DEVICE)).view(y.shape).to(dtype).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def assert_agree(function, exact, *tensors, tolerance=2e-6):
    dtype = tensors[0].dtype
    results = gradients(function, *tensors, dtype=dtype)
    others = gradients(exact, *(tensor.double() for tensor in tensors), dtype=dtype)
    for i, (result, other) in enumerate(zip(results, others, strict=True)):  # the result, then gradients
        error, largest = (result.double() - other).abs().max(), other.abs().max()
        assert error <= tolerance * largest, f'{i}: {error:.1e} of {largest:.1e}'
    assert [result.dtype for result in results] == [tensors[0].dtype, *(tensor.dtype for tensor in tensors)]
    assert all(map(torch.equal, gradients(function, *tensors, dtype=dtype), results)), 'two runs, the same bits'


def norm_of(x, weight, bias):
    return pixels.layer_norm(x.permute(0, 2, 3, 1), weight, bias, 1e-5, None).permute(0, 3, 1, 2)


def torch_norm(x, weight, bias):
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-5).permute(0, 3, 1, 2)


def norm_gate_of(x, weight, bias, gate):
    norm = nn.LayerNorm(len(weight))
    del norm.weight, norm.bias
    norm.weight, norm.bias = weight, bias  # not parameters: they have gradients with respect to the test's tensors
    return layer_norm_silu_gate(norm, x, gate)


def torch_norm_gate(x, weight, bias, gate):
    return torch_norm(x, weight, bias) * F.silu(gate)


def torch_conv(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


def torch_silu(x, weight, bias=None):
    return F.silu(torch_conv(x, weight, bias))


def torch_gelu_gate(gate, gate_weight, gate_bias, value, value_weight, value_bias):
    return F.gelu(torch_conv(gate, gate_weight, gate_bias)) * torch_conv(value, value_weight, value_bias)


def without_biases(function):
    return lambda gate, gate_weight, value, value_weight: function(gate, gate_weight, None, value, value_weight, None)


@with_kernels
@pytest.mark.parametrize('size', [(1, 1, 1), (2, 3, 5), (1, 13, 11)], ids=str)
@pytest.mark.parametrize('channels', [5, 31, 48, 100])
def test_layer_norm_agrees_with_the_definition(channels, size, monkeypatch):
    monkeypatch.setattr(pixels, 'BLOCKS', 3)  # so that warps have several pixels
    x = image(size[0], channels, *size[1:], offset=3)
    weight, bias = torch.linspace(-1, 2, channels, device=DEVICE), torch.linspace(0, 1, channels, device=DEVICE)
    assert_agree(norm_of, torch_norm, x, weight, bias, tolerance=3e-6)
    assert_agree(norm_gate_of, torch_norm_gate, x, weight, bias, image(*x.shape, seed=1), tolerance=3e-6)


@with_kernels
@pytest.mark.parametrize(
    ('size', 'channels'),
    [((1, 1, 1), 1), ((2, 5, 3), 33), ((1, 9, 17), 32), ((2, 1, 40), 3), ((1, 18, 1), 64)],
    ids=str,
)
@pytest.mark.parametrize('with_bias', [True, False])
def test_depthwise_convolution_agrees_with_the_definition(size, channels, with_bias, monkeypatch):
    monkeypatch.setattr(pixels, 'BLOCKS', 2)
    x, weight = image(size[0], channels, *size[1:]), image(channels, 1, 3, 3, seed=1).contiguous()
    tensors = (x, weight, torch.linspace(-1, 1, channels, device=DEVICE))[: 3 if with_bias else 2]
    assert_agree(lambda x, w, b=None: depthwise_conv(x, w, b), torch_conv, *tensors)
    assert_agree(lambda x, w, b=None: depthwise_silu(x, w, b), torch_silu, *tensors)
    value = image(*x.shape, seed=2), image(channels, 1, 3, 3, seed=3).contiguous(), *(b.flip(0) for b in tensors[2:])
    functions = depthwise_gelu_gate, torch_gelu_gate
    assert_agree(*(functions if with_bias else map(without_biases, functions)), *tensors, *value)


@with_kernels
def test_gates_take_a_bias_for_one_convolution_and_gradients_of_single_inputs():
    shared = image(1, 5, 4, 3), image(5, 1, 3, 3, seed=1), torch.ones(5, device=DEVICE)
    arguments = *shared, image(1, 5, 4, 3, seed=2), image(5, 1, 3, 3, seed=3)
    one = [lambda *tensors, f=f: f(*tensors, None) for f in (depthwise_gelu_gate, torch_gelu_gate)]
    assert_agree(*one, *arguments)
    everything = gradients(one[0], *arguments, dtype=torch.float32)
    for i, argument in enumerate(arguments):
        alone = gradients(lambda t, i=i: one[0](*arguments[:i], t, *arguments[i + 1 :]), argument, dtype=torch.float32)
        assert torch.equal(alone[1], everything[1 + i])


@with_kernels
def test_activations_and_their_derivatives_are_accurate_over_the_whole_range():
    large = torch.logspace(-30, 4, 300)
    x = torch.cat([torch.linspace(-12, 12, 2001), large, -large, torch.tensor([1e30, -1e30])]).to(DEVICE)
    copies = torch.zeros(len(x), 1, 3, 3, device=DEVICE)
    copies[:, :, 1, 1] = 1
    x, ones = x.view(1, -1, 1, 1), torch.ones_like(x).view(1, -1, 1, 1)
    functions = {
        F.silu: lambda x: depthwise_silu(x, copies, None),
        F.gelu: lambda x: depthwise_gelu_gate(x, copies, None, ones, copies, None),
    }
    for exact, function in functions.items():
        leaf, other = x.clone().requires_grad_(), x.double().requires_grad_()
        y, truth = function(leaf), exact(other)
        y.sum().backward()
        truth.sum().backward()
        for result, expected in ((y, truth), (leaf.grad, other.grad)):
            assert ((result - expected).abs() <= 4e-7 * expected.abs().clamp(min=1)).all()


@with_kernels
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_images_only_add_storage_rounding(dtype):
    eps = torch.finfo(dtype).eps
    x, weight, bias = image(2, 20, 6, 7, dtype=dtype), image(20, 1, 3, 3, seed=1), image(1, 20, 1, 1, seed=2).flatten()
    assert_agree(lambda x, w, b: depthwise_conv(x, w, b), torch_conv, x, weight, bias, tolerance=eps)
    value = image(2, 20, 6, 7, dtype=dtype, seed=3), image(20, 1, 3, 3, seed=4), bias
    assert_agree(depthwise_silu, torch_silu, x, weight, bias, tolerance=eps)
    assert_agree(depthwise_gelu_gate, torch_gelu_gate, x, weight, bias, *value, tolerance=eps)
    scale = weight[:, 0, 0, 0] + 2
    assert_agree(norm_of, torch_norm, x, scale, bias, tolerance=eps)
    for images in ((x, value[0]), (x.float(), value[0])):
        assert_agree(norm_gate_of, torch_norm_gate, images[0], scale, bias, images[1], tolerance=eps)
    assert norm_gate_of(x, scale, bias, value[0].float()).dtype == torch.float32


@with_kernels
def test_autocast_applies_to_convolutions_and_gives_norms_the_wider_type():
    x, value, weight, bias = image(1, 4, 3, 5), image(1, 4, 3, 5, seed=1), image(4, 1, 3, 3, seed=2), torch.ones(4)
    bias, leaf, half = bias.to(DEVICE), x.clone().requires_grad_(), torch.bfloat16
    for function in (depthwise_silu, lambda x, w, b: depthwise_gelu_gate(x, w, b, value.to(x.dtype), w, None)):
        with torch.autocast(DEVICE, half):
            y = function(leaf, weight, bias)
        assert y.dtype == half and torch.equal(y, function(x.to(half), weight, bias))
        assert torch.autograd.grad(y.sum(), leaf)[0].dtype == torch.float32
    with torch.autocast(DEVICE, half):
        y = norm_gate_of(x, bias, bias, value.to(half))
    assert y.dtype == torch.float32 and torch.equal(y, norm_gate_of(x, bias, bias, value.to(half)))


@with_kernels
def test_results_are_bit_exact_for_any_layout_and_for_slices():
    x, weight, bias = image(2, 24, 6, 7), image(24, 1, 3, 3, seed=1), torch.ones(24, device=DEVICE)
    pairs = {
        norm_of: torch_norm,
        norm_gate_of: torch_norm_gate,
        depthwise_conv: torch_conv,
        depthwise_silu: torch_silu,
        depthwise_gelu_gate: torch_gelu_gate,
    }
    arguments = {
        norm_of: lambda x: (x, bias, bias),
        norm_gate_of: lambda x: (x, bias, bias, x),
        depthwise_gelu_gate: lambda x: (x, weight, bias, x, weight, bias),
    }
    part = x.flatten()[1 : 1 + 24 * 5].view(1, 1, 5, 24).permute(0, 3, 1, 2)  # not aligned to 16 bytes
    for function, exact in pairs.items():
        given = arguments.get(function, lambda x: (x, weight, bias))
        for other in (x.contiguous(), torch.cat([x[:, :1], x, x[:, :5]], dim=1)[:, 1:25]):
            assert other.stride() != x.stride()
            results, expected = (gradients(function, *given(image), dtype=x.dtype) for image in (other, x))
            assert all(map(torch.equal, results, expected))
        torch.testing.assert_close(function(*given(part)), exact(*given(part)))


@with_kernels
def test_nan_stays_within_its_window_or_pixel():
    x = image(1, 3, 5, 5)
    x[0, 1, 2, 2] = torch.nan
    expected = torch.zeros(1, 3, 5, 5, dtype=torch.bool, device=DEVICE)
    expected[0, 1, 1:4, 1:4] = True
    ones, other = torch.ones(3, 1, 3, 3, device=DEVICE), torch.ones_like(x)
    assert torch.equal(depthwise_conv(x, ones, None).isnan(), expected)
    assert torch.equal(depthwise_silu(x, ones, None).isnan(), expected)
    for images in ((x, other), (other, x)):
        result = depthwise_gelu_gate(images[0], ones, None, images[1], ones, None)
        assert torch.equal(result.isnan(), expected)
    bias, pixel = torch.ones(3, device=DEVICE), torch.zeros_like(expected)
    pixel[0, :, 2, 2] = True
    assert torch.equal(norm_of(x, bias, bias).isnan(), pixel)
    assert torch.equal(norm_gate_of(x, bias, bias, other).isnan(), pixel)
    assert torch.equal(norm_gate_of(other, bias, bias, x).isnan(), x.isnan())


@with_kernels
def test_operators_pass_opcheck():
    x = image(1, 3, 2, 2).permute(0, 2, 3, 1).requires_grad_()
    weight, bias = torch.ones(3, 1, 3, 3, device=DEVICE).requires_grad_(), torch.ones(3, device=DEVICE).requires_grad_()
    x2, weight2, bias2 = (tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias))
    gate = x.detach().bfloat16().requires_grad_()
    for operator, inputs in (
        (pixels.layer_norm, (x, bias, bias2, 1e-5, None)),
        (pixels.layer_norm, (x, bias, bias2, 1e-5, gate)),
        (pixels.depthwise, (x, weight, bias)),
        (pixels.depthwise, (x, weight, None)),
        (pixels.depthwise_silu, (x, weight, bias)),
        (pixels.depthwise_gelu_gate, (x, weight, bias, x2, weight2, bias2)),
        (pixels.depthwise_gelu_gate, (x, weight, None, x2, weight2, None)),
    ):
        assert_passes_opcheck(operator, inputs)
    x, weight, bias, gate = (tensor.detach() for tensor in (x, weight, bias, gate))
    for operator, inputs in (
        (pixels._layer_norm_backward, (x, bias, bias, x, 1e-5, None)),
        (pixels._layer_norm_backward, (x, bias, bias, x, 1e-5, gate)),
        (pixels._depthwise_weight_gradients, (x, x)),
        (pixels._depthwise_silu_backward, (x, weight, bias, x)),
        (pixels._depthwise_gelu_gate_backward, (x, weight, bias, x, weight, None, x)),
    ):
        assert_passes_opcheck(operator, inputs)


class Gates(nn.Module):
    """Every function of ops/pixels.py with a gate or activation, as the networks use them."""

    def __init__(self, channels, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)
        self.norm, self.ffn = LayerNorm(channels), EFFN(channels, 1.6, bias=bias)

    def forward(self, x):
        return self.ffn(norm_and_gate(self.norm, silu_depthwise(self.conv, x), x))


FUSED = {'layer_norm_cuda', 'depthwise_silu_cuda', 'depthwise_gelu_gate_cuda'}
OF_BACKWARD = {'depthwise_cuda', 'depthwise_cuda_weight_gradients', *(f'{name}_backward' for name in FUSED)}


def assert_same_with_kernels(module, x):
    def run():
        module.zero_grad()
        y = module(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    with use_backend('torch'):
        expected = run()
        assert not set(scans_run_by(run)) & (FUSED | OF_BACKWARD)
    assert set(scans_run_by(run)) >= FUSED | OF_BACKWARD
    for result, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@with_kernels
@pytest.mark.parametrize('bias', [True, False])
def test_a_block_uses_the_fused_kernels_with_equal_results(bias):
    torch.manual_seed(0)
    block, x = Gates(20, bias).to(DEVICE), image(2, 20, 5, 6)
    assert_same_with_kernels(block, x)
    assert set(scans_run_by(lambda: block(x))) == FUSED  # no convolution or norm on its own


class Loss(nn.Sequential):
    def forward(self, x):
        return super().forward(x).square().sum()


def test_a_block_has_no_graph_break():
    torch.manual_seed(0)
    block = Loss(LayerNorm(4), Gates(4)).to(DEVICE)
    assert_compiles_without_a_graph_break(block, image(1, 4, 3, 3))


@pytest.mark.skipif(not ON_GPU, reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('network', [DPMambaIR, VmambaIR])
def test_networks_use_the_kernels_with_equal_results(network):
    options = {'dim': 8, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}
    torch.manual_seed(0)
    assert_same_with_kernels(network(**options).to(DEVICE), torch.rand(1, 3, 32, 32, device=DEVICE))


@with_kernels
def test_other_backends_and_dtypes_and_too_many_channels_fall_back_to_pytorch():
    x = image(1, 4, 3, 3)
    assert kernels_run(x) and not kernels_run(x.double()) and not kernels_run(x[:0])
    with use_backend('torch'):
        assert not kernels_run(x)
    with use_backend('cuda'):
        assert kernels_run(x)
    wide, norm = image(1, MAX_CHANNELS + 1, 1, 2), nn.LayerNorm(MAX_CHANNELS + 1).to(DEVICE)
    assert torch.equal(layer_norm(norm, wide), torch_norm(wide, norm.weight, norm.bias))
    gated = torch_norm_gate(wide, norm.weight, norm.bias, wide)
    assert torch.equal(layer_norm_silu_gate(norm, wide, wide), gated)
    assert not kernels_run(x, x[:, :, :1]), 'sizes that differ are an error, or broadcast'


@pytest.mark.skipif(ON_GPU, reason='there is a GPU')
def test_on_a_cpu_pytorchs_operators_run():
    x, norm, weight = image(1, 4, 3, 3), nn.LayerNorm(4), image(4, 1, 3, 3)
    with use_backend('cuda'):
        assert not kernels_run(x)
    assert torch.equal(layer_norm(norm, x), torch_norm(x, norm.weight, norm.bias))
    assert torch.equal(depthwise_conv(x, weight, None), torch_conv(x, weight))
    assert torch.equal(depthwise_silu(x, weight, None), torch_silu(x, weight))
    gate = x, weight, None, x, weight, None
    assert torch.equal(depthwise_gelu_gate(*gate), torch_gelu_gate(*gate))
    assert torch.equal(layer_norm_silu_gate(norm, x, x), torch_norm_gate(x, norm.weight, norm.bias, x))


CASES = [(architecture, 96, torch.float32) for architecture in (80, 86, 89, 90, 100, 120)]
CASES += [(90, channels, torch.bfloat16) for channels in (1, 48, 513, 1024)] + [(90, 384, torch.float16)]


@needs_nvrtc
@pytest.mark.parametrize(('architecture', 'channels', 'dtype'), CASES, ids=str)
def test_kernels_compile_with_few_register_spills(architecture, channels, dtype):
    cases = [('layer_norm', pixels.layer_norm_constants(channels, dtype, gate)) for gate in (None, torch.bfloat16)]
    cases += [('depthwise', pixels.depthwise_constants(dtype, after)) for after in pixels.AFTER]
    for name, constants in cases:
        found = resources(runtime.source(name, constants), name, architecture)
        assert found.keys() == KERNELS[name]
        for kernel, (spilled, registers) in found.items():
            wide = name == 'layer_norm' and channels > 513
            two = ('CONVOLUTIONS', 2) in constants and kernel == 'depthwise_outputs'
            most = 255 if wide else 128 if kernel == 'layer_norm_gradients' else 80 if two else 64
            spills = 192 if wide and ('GATE', 1) in constants else 16  # bytes of a thread
            assert spilled <= spills and registers <= most, (kernel, spilled, registers)
