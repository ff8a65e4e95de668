"""The fast forms of the blocks equal their definitions, in outputs and all gradients; checkpointing is bit-exact."""

import pytest
import torch
from torch.nn import functional as F

import dpmambair_basicsr
from dpmambair_basicsr.archs import DPMambaIR, HighFrequencyEnhancementBlock, VmambaIR
from dpmambair_basicsr.archs.blocks import EFFN, convolve_halves

TINY = {'dim': 8, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 4}
TINY_DPMAMBAIR = {**TINY, 'd_inner': [8, 16, 32, 64], 'embed_dim': 12, 'extractor_channels': [4, 4]}
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def outputs_and_gradients(module, forward, x):
    """The output of forward(x), then the gradients of x and of the module's parameters."""
    x = x.detach().requires_grad_()
    output = forward(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * weight).sum(), [x, *module.parameters()])]


def assert_equal(module, definition, x):
    """In fp64, up to rounding."""
    for layout in LAYOUTS:
        x = x.double().contiguous(memory_format=layout)
        expected = outputs_and_gradients(module, definition, x)
        for own, other in zip(outputs_and_gradients(module, module, x), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('hidden', [1, 8, 13, 127])
def test_effn_matches_its_definition(hidden, bias):
    """Widths that are padded to a multiple of 8, and one that needs no padding."""
    torch.manual_seed(0)
    net = EFFN(4, hidden / 4, bias).double()

    def definition(x):
        gate, value = net.dwconv(net.project_in(x)).chunk(2, dim=1)
        return net.project_out(F.gelu(gate) * value)

    assert net.project_out.in_channels == hidden
    assert_equal(net, definition, torch.randn(2, 4, 5, 7))


@pytest.mark.parametrize('alpha', [-1.5, 0.0, 0.3])
def test_high_frequency_enhancement_matches_its_equation(alpha):
    """Eq. 10 of DPMambaIR."""
    net = HighFrequencyEnhancementBlock().double()
    net.alpha.data.fill_(alpha)
    definition = lambda x: x + net.alpha * (x - x.mean(dim=(2, 3), keepdim=True))  # noqa: E731
    assert_equal(net, definition, torch.randn(2, 3, 5, 4))


@pytest.mark.parametrize('name', ['HighFrequencyEnhancementBlock', 'dpmambair_HighFrequencyEnhancementBlock'])
def test_high_frequency_enhancement_is_built_by_name(name):
    """As in BasicSR; in another network it starts as the identity and learns."""
    dpmambair_basicsr.register()
    from basicsr.archs import build_network

    torch.manual_seed(0)
    block = build_network({'type': name})
    assert isinstance(block, HighFrequencyEnhancementBlock)
    net, x = (
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), block, torch.nn.Conv2d(4, 3, 1)),
        torch.rand(2, 3, 5, 7),
    )
    torch.testing.assert_close(net(x), net[2](net[0](x)))
    net(x).square().mean().backward()
    assert block.alpha.grad.abs() > 0


@pytest.mark.parametrize('bias', [False, True])
def test_split_convolution_matches_the_whole_one(bias):
    conv, x = torch.nn.Conv2d(3, 10, 1, bias=bias), torch.randn(2, 3, 4, 5)
    for width in (5, 8):
        for half, expected in zip(convolve_halves(conv, x, width=width), conv(x).chunk(2, dim=1), strict=True):
            assert half.shape[1] == width and not half[:, 5:].any()
            torch.testing.assert_close(half[:, :5], expected, rtol=1e-6, atol=1e-6)


def make(arch, **options):
    torch.manual_seed(0)
    net = arch(**options)
    torch.nn.init.normal_(net.output.weight)  # DPMambaIR's is nearly zero at first
    return net


NETWORKS = pytest.mark.parametrize(
    ('arch', 'options'), [(DPMambaIR, TINY_DPMAMBAIR), (VmambaIR, TINY)], ids=['DPMambaIR', 'VmambaIR']
)


@NETWORKS
@torch.no_grad()
def test_outputs_do_not_depend_on_the_memory_layout(arch, options):
    """Neither the image's nor the features'; the output keeps the image's: losses and discriminators view() it."""
    net, lq = make(arch, **options).eval(), torch.rand(2, 3, 16, 24)
    expected = net(lq)
    assert expected.is_contiguous()
    torch.testing.assert_close(net(lq.contiguous(memory_format=torch.channels_last)), expected)
    net.memory_format = torch.contiguous_format
    torch.testing.assert_close(net(lq), expected, rtol=1e-4, atol=1e-4)


@NETWORKS
@pytest.mark.parametrize('levels', [[0], [1, 3], [0, 1, 2, 3]], ids=str)
def test_checkpointing_changes_no_gradient(arch, options, levels):
    """Bit for bit; and less memory is saved for the backward pass."""
    lq, gradients, kept = torch.rand(2, 3, 16, 16), [], []
    for checkpoint_levels in ((), levels):
        net = make(arch, **options, checkpoint_levels=checkpoint_levels).train()
        pointers = {}

        def pack(x, pointers=pointers):
            pointers[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = net(lq)
        kept.append(sum(pointers.values()))
        output.square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert kept[1] < kept[0]


@NETWORKS
def test_a_wrong_level_is_named(arch, options):
    with pytest.raises(ValueError, match=r'^checkpoint_levels: must be one of 0, 1, 2, 3, got 4$'):
        arch(**options, checkpoint_levels=[4])
