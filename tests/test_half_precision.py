"""bf16 autocast casts no weight more than once per step; the speed of half precision can only be measured on a GPU."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpmambair_basicsr.archs import DPMambaIR, VmambaIR
from dpmambair_basicsr.models.precision import in_training, mixed

SMALL = {'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
NETWORKS = {
    'DPMambaIR': lambda: DPMambaIR(dim=8, **SMALL, d_inner=[8] * 4, embed_dim=8, extractor_channels=[4]),
    'VmambaIR': lambda: VmambaIR(dim=4, **SMALL),
}


class Casts(TorchDispatchMode):
    """Counts, for each parameter's memory, the elements that are cast to bf16."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.elements[args[0].untyped_storage()._cdata] += args[0].numel()
        return result


@pytest.mark.parametrize('name', NETWORKS)
def test_a_step_casts_no_weight_more_than_once(name):
    net = NETWORKS[name]()
    in_training(net, mixed(torch.bfloat16, type(net).forward))
    image = torch.rand(2, 3, 16, 16)
    with Casts() as casts:
        net(image).square().mean().backward()
    cast = {name: casts.elements[p.untyped_storage()._cdata] / p.numel() for name, p in net.named_parameters()}
    assert max(cast.values()) == 1, {name: times for name, times in cast.items() if times > 1}
    assert sum(times == 1 for times in cast.values()) > len(cast) / 4
