"""Tiles by replaying a recording: on a GPU as CUDA graphs, here also on the tape of `support.tape`."""

import logging

import pytest
import torch
from support.tape import Tape

from dpmambair_basicsr.archs import DPMambaIR, VmambaIR
from dpmambair_basicsr.inference.tile_graphs import WARM_UP, TileGraphs
from dpmambair_basicsr.inference.tiled_network import TiledNetwork
from dpmambair_basicsr.ops import use_backend

SMALL = {'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
NETWORKS = {
    'DPMambaIR': lambda: DPMambaIR(
        dim=8, **SMALL, d_inner=[8, 8, 8, 8], embed_dim=8, extractor_channels=[4, 4, 4], directions=2
    ),
    'VmambaIR': lambda: VmambaIR(dim=4, **SMALL),
}
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device('cuda' if ON_GPU else 'cpu')


def networks(name, half=False):
    """Networks with and without graphs, with the same weights; and the recorders of the first."""
    torch.manual_seed(0)
    net = NETWORKS[name]().eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    net, recorders = net.to(DEVICE), []
    plain, taped = TiledNetwork(net, DEVICE, 1, half), TiledNetwork(net, DEVICE, 1, half)
    plain.graphs = None
    if not ON_GPU:
        taped.graphs = TileGraphs(taped.run, lambda: recorders.append(Tape()) or recorders[-1])
    return taped, plain, recorders


def restored(network, image, **options):
    return torch.cat([*network.bands(image, **({'tile': 16, 'overlap': 4} | options))], dim=2)


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('options', [{}, {'one_pass': True}, {'self_ensemble': True}], ids=['two', 'one', 'eight'])
def test_replays_are_bit_exact_with_calls(name, options):
    taped, plain, recorders = networks(name)
    for seed in range(2):
        image = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(restored(taped, image, **options), restored(plain, image, **options))
    replays = [recording.replays for tape in recorders for recording in tape.recordings]
    tiles = 2 * 2 * 3 * (8 if 'self_ensemble' in options else 1)
    assert ON_GPU or replays == [tiles - WARM_UP] * (1 if 'one_pass' in options else 2)


def test_half_precision_is_recorded_too():
    taped, plain, recorders = networks('DPMambaIR', half=True)
    image = torch.rand(1, 3, 16, 64)
    assert torch.equal(restored(taped, image), restored(plain, image))
    assert ON_GPU or len(recorders[0].recordings) == 2


def test_other_shapes_and_backends_are_recorded_anew_but_not_a_single_image():
    taped, plain, recorders = networks('VmambaIR')
    for size in (16, 24, 32):
        image = torch.rand(1, 3, size, 16)
        assert torch.equal(restored(taped, image, tile=0), restored(plain, image, tile=0))
    assert ON_GPU or [len(tape.recordings) for tape in recorders] == [0, 0, 0]
    for backend in ('torch', 'reference'):
        with use_backend(backend):
            image = torch.rand(1, 3, 16, 64)
            assert torch.equal(restored(taped, image, one_pass=True), restored(plain, image, one_pass=True))
    assert ON_GPU or [len(tape.recordings) for tape in recorders] == [0, 0, 0, 1, 1]


def test_changed_and_hooked_networks_are_not_replayed_as_they_were():
    taped, plain, recorders = networks('VmambaIR')
    image, block, called = torch.rand(1, 3, 16, 64), plain.net.encoder_level1[0], []
    first = restored(taped, image, one_pass=True)
    block.ffn.project_out = torch.nn.Conv2d(*block.ffn.project_out.weight.shape[1::-1], 1, device=DEVICE)
    second = restored(taped, image, one_pass=True)
    assert torch.equal(second, restored(plain, image, one_pass=True)) and not torch.equal(second, first)
    plain.net.to(torch.float64).to(torch.float32)  # other memory, the same values
    block.ffn.project_out.weight.data.mul_(2)
    assert torch.equal(restored(taped, image, one_pass=True), restored(plain, image, one_pass=True))
    block.ffn.forward = torch.zeros_like
    fourth = restored(taped, image, one_pass=True)
    assert torch.equal(fourth, restored(plain, image, one_pass=True)) and not torch.equal(fourth, second)
    assert ON_GPU or [len(tape.recordings) for tape in recorders] == [1, 1, 1, 1]
    hook = block.register_forward_hook(lambda *_: called.append(1))
    restored(taped, image, one_pass=True)
    seen = len(called)
    restored(plain, image, one_pass=True)
    assert len(called) == 2 * seen > 2 * WARM_UP
    hook.remove()
    restored(taped, image, one_pass=True)
    assert len(called) == 2 * seen and (ON_GPU or recorders[-1].recordings[-1].replays > 3)


@pytest.mark.skipif(ON_GPU, reason='on a GPU such a network is another')
@pytest.mark.parametrize('fault', ['waits', 'varies'])
def test_a_network_that_cannot_be_recorded_is_called_and_the_log_says_so(fault, caplog, monkeypatch):
    class Net(torch.nn.Module):
        count = 0

        def forward(self, x):
            Net.count += 1
            shift = x.mean().item() if fault == 'waits' else Net.count
            return x + shift

    logger = logging.getLogger('dpmambair_basicsr')
    monkeypatch.setattr(logger, 'handlers', [caplog.handler])
    monkeypatch.setattr(logger, 'propagate', False)
    taped = TiledNetwork(Net(), DEVICE, 1)
    taped.graphs = TileGraphs(taped.run, Tape)
    image = torch.rand(1, 3, 4, 40)
    result = restored(taped, image, tile=8, overlap=0)
    assert result.shape == image.shape and caplog.text.count('no CUDA graphs for tiles: ') == 1
    assert fault == 'waits' or Net.count == 5 + 2 and (result - image).amax() > 6


@pytest.mark.parametrize(('device', 'value'), [('cpu', None), ('cuda', '0')])
def test_no_graphs_on_a_cpu_or_if_disabled_by_the_environment(device, value, monkeypatch):
    if value is not None:
        monkeypatch.setenv('DPMAMBAIR_CUDA_GRAPHS', value)
    assert TileGraphs.on(torch.device(device), torch.neg) is None
