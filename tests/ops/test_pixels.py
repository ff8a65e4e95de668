"""The kernels for layer norm and depthwise convolutions: on a GPU if there is one, else built by g++ for the CPU.

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
from dpmambair_basicsr.archs.blocks import EFFN, LayerNorm
from dpmambair_basicsr.ops import use_backend
from dpmambair_basicsr.ops.pixels import MAX_CHANNELS, depthwise_conv, kernels_run, layer_norm
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
    for name, result, other in zip(('y', *'xwb'), results, others, strict=False):
        error, largest = (result.double() - other).abs().max(), other.abs().max()
        assert error <= tolerance * largest, f'{name}: {error:.1e} of {largest:.1e}'
    assert [result.dtype for result in results] == [tensors[0].dtype, *(tensor.dtype for tensor in tensors)]
    assert all(map(torch.equal, gradients(function, *tensors, dtype=dtype), results)), 'two runs, the same bits'


def norm_of(x, weight, bias):
    return pixels.layer_norm(x.permute(0, 2, 3, 1), weight, bias, 1e-5).permute(0, 3, 1, 2)


def torch_norm(x, weight, bias):
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-5).permute(0, 3, 1, 2)


def torch_conv(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


@with_kernels
@pytest.mark.parametrize('size', [(1, 1, 1), (2, 3, 5), (1, 13, 11)], ids=str)
@pytest.mark.parametrize('channels', [5, 31, 48, 100])
def test_layer_norm_agrees_with_the_definition(channels, size, monkeypatch):
    monkeypatch.setattr(pixels, 'BLOCKS', 3)  # so that warps have several pixels
    x = image(size[0], channels, *size[1:], offset=3)
    weight, bias = torch.linspace(-1, 2, channels, device=DEVICE), torch.linspace(0, 1, channels, device=DEVICE)
    assert_agree(norm_of, torch_norm, x, weight, bias, tolerance=3e-6)


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


@with_kernels
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_images_only_add_storage_rounding(dtype):
    eps = torch.finfo(dtype).eps
    x, weight, bias = image(2, 20, 6, 7, dtype=dtype), image(20, 1, 3, 3, seed=1), image(1, 20, 1, 1, seed=2).flatten()
    assert_agree(lambda x, w, b: depthwise_conv(x, w, b), torch_conv, x, weight, bias, tolerance=eps)
    assert_agree(norm_of, torch_norm, x, weight[:, 0, 0, 0] + 2, bias, tolerance=eps)


@with_kernels
def test_results_are_bit_exact_for_any_layout_and_for_slices():
    x, weight, bias = image(2, 24, 6, 7), image(24, 1, 3, 3, seed=1), torch.ones(24, device=DEVICE)
    for other in (x.contiguous(), torch.cat([x[:, :1], x, x[:, :5]], dim=1)[:, 1:25]):
        assert other.stride() != x.stride()
        assert torch.equal(depthwise_conv(other, weight, bias), depthwise_conv(x, weight, bias))
        assert torch.equal(norm_of(other, bias, bias), norm_of(x, bias, bias))
    part = x.flatten()[1 : 1 + 24 * 5].view(1, 1, 5, 24).permute(0, 3, 1, 2)  # not aligned to 16 bytes
    torch.testing.assert_close(norm_of(part, bias, bias), torch_norm(part, bias, bias))
    torch.testing.assert_close(depthwise_conv(part, weight, bias), torch_conv(part, weight, bias))


@with_kernels
def test_nan_stays_within_its_window_or_pixel():
    x = image(1, 3, 5, 5)
    x[0, 1, 2, 2] = torch.nan
    expected = torch.zeros(1, 3, 5, 5, dtype=torch.bool, device=DEVICE)
    expected[0, 1, 1:4, 1:4] = True
    assert torch.equal(depthwise_conv(x, torch.ones(3, 1, 3, 3, device=DEVICE), None).isnan(), expected)
    expected[:] = False
    expected[0, :, 2, 2] = True
    assert torch.equal(norm_of(x, *torch.ones(2, 3, device=DEVICE)).isnan(), expected)


@with_kernels
def test_operators_pass_opcheck():
    x = image(1, 3, 2, 2).permute(0, 2, 3, 1).requires_grad_()
    weight, bias = torch.ones(3, 1, 3, 3, device=DEVICE).requires_grad_(), torch.ones(3, device=DEVICE).requires_grad_()
    assert_passes_opcheck(pixels.layer_norm, (x, bias, bias.detach().clone().requires_grad_(), 1e-5))
    assert_passes_opcheck(pixels.depthwise, (x, weight, bias))
    assert_passes_opcheck(pixels.depthwise, (x, weight, None))
    assert_passes_opcheck(pixels._layer_norm_backward, (x.detach(), bias.detach(), x.detach(), 1e-5))
    assert_passes_opcheck(pixels._depthwise_weight_gradients, (x.detach(), x.detach()))


def assert_same_with_kernels(module, x):
    def run():
        module.zero_grad()
        y = module(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    with use_backend('torch'):
        expected = run()
    assert {'layer_norm_cuda', 'depthwise_cuda'} <= set(scans_run_by(lambda: module(x)))
    for result, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@with_kernels
def test_a_block_uses_the_kernels_with_equal_results():
    torch.manual_seed(0)
    block = nn.Sequential(LayerNorm(20), EFFN(20, 1.6, bias=True)).to(DEVICE)
    assert_same_with_kernels(block, image(2, 20, 5, 6))


class Loss(nn.Sequential):
    def forward(self, x):
        return super().forward(x).square().sum()


def test_a_block_has_no_graph_break():
    torch.manual_seed(0)
    block = Loss(LayerNorm(4), EFFN(4, 2, bias=True)).to(DEVICE)
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


@pytest.mark.skipif(ON_GPU, reason='there is a GPU')
def test_on_a_cpu_pytorchs_operators_run():
    x, norm, weight = image(1, 4, 3, 3), nn.LayerNorm(4), image(4, 1, 3, 3)
    with use_backend('cuda'):
        assert not kernels_run(x)
    assert torch.equal(layer_norm(norm, x), torch_norm(x, norm.weight, norm.bias))
    assert torch.equal(depthwise_conv(x, weight, None), torch_conv(x, weight))


CASES = [(architecture, 96, torch.float32) for architecture in (80, 86, 89, 90, 100, 120)]
CASES += [(90, channels, torch.bfloat16) for channels in (1, 48, 513, 1024)] + [(90, 384, torch.float16)]


@needs_nvrtc
@pytest.mark.parametrize(('architecture', 'channels', 'dtype'), CASES, ids=str)
def test_kernels_compile_with_few_register_spills(architecture, channels, dtype):
    constants = {
        'layer_norm': pixels.layer_norm_constants(channels, dtype),
        'depthwise': pixels.depthwise_constants(dtype),
    }
    for name, kernels in KERNELS.items():
        text = runtime.source(name, constants[name])
        found = resources(text, name, architecture)
        assert found.keys() == kernels
        for kernel, (spilled, registers) in found.items():
            most = 64 if channels <= 513 and kernel != 'layer_norm_gradients' else 128 if channels <= 513 else 255
            assert spilled <= 8 and registers <= most, (kernel, registers)
