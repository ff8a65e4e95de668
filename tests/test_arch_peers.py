"""Peers of DPMambaIR for studies: sizes, gradients, what their blocks compute."""

import pytest
import torch
from torch.nn import functional as F

from dpmambair_basicsr.archs import PeerNAFNet, PeerRestormer
from dpmambair_basicsr.archs.peers_arch import ChannelAttention, NonlinearActivationFreeBlock

TINY = {'dim': 8, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}
PEERS = pytest.mark.parametrize('peer', [PeerRestormer, PeerNAFNet])


@PEERS
def test_output_has_the_size_of_the_input_and_starts_close_to_it(peer):
    torch.manual_seed(0)
    image = torch.rand(2, 3, 19, 26)
    output = peer(**TINY)(image)
    assert output.shape == image.shape
    assert 0 < (output - image).abs().max() < 0.05


@PEERS
def test_every_parameter_receives_a_gradient(peer):
    torch.manual_seed(0)
    net = peer(**TINY)
    for module in net.modules():
        if isinstance(module, NonlinearActivationFreeBlock):  # which is the identity at first
            torch.nn.init.ones_(module.beta)
            torch.nn.init.ones_(module.gamma)
    net(torch.rand(1, 3, 16, 24)).square().mean().backward()
    assert [name for name, parameter in net.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_channel_attention_matches_restormer():
    """Written out per head: softmax(normalised q k^T, times a temperature) v, over the pixels."""
    torch.manual_seed(0)
    attention = ChannelAttention(8, 2)
    torch.nn.init.uniform_(attention.temperature, 1, 3)
    x = torch.randn(1, 8, 3, 5)
    query, key, value = attention.dwconv(attention.qkv(x))[0].reshape(3, 2, 4, 15)
    heads = []
    for head in range(2):
        cosines = F.cosine_similarity(query[head][:, None], key[head][None], dim=-1)
        heads.append((attention.temperature[head] * cosines).softmax(dim=1) @ value[head])
    wanted = attention.project_out(torch.cat(heads).reshape(1, 8, 3, 5))
    torch.testing.assert_close(attention(x), wanted)


def test_nafnets_block_starts_as_the_identity():
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(NonlinearActivationFreeBlock(8)(x), x)


def test_the_output_has_the_channels_of_the_input():
    with pytest.raises(ValueError, match='out_channels'):
        PeerNAFNet(out_channels=1)
