"""The node for ComfyUI, by ComfyUI's documented contract of a node class; ComfyUI itself is not needed."""

import torch

import dpmambair_basicsr
from dpmambair_basicsr import load
from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

dpmambair_basicsr.register()
NETWORK = {'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2, 'scale': 2}


def run_node(node, **values):
    """As ComfyUI's executor calls it: validated values by name; returns a tuple with one output per type."""
    specified = node.INPUT_TYPES()['required']
    defaults = {name: kind[1]['default'] for name, kind in specified.items() if len(kind) > 1}
    values = defaults | values
    assert values.keys() == specified.keys()
    types = {'INT': int, 'BOOLEAN': bool, 'STRING': str, 'IMAGE': torch.Tensor}
    assert all(isinstance(values[name], types[kind[0]]) for name, kind in specified.items())
    assert node.VALIDATE_INPUTS(weights=values['weights']) is True
    outputs = getattr(node(), node.FUNCTION)(**values)
    assert isinstance(outputs, tuple) and len(outputs) == len(node.RETURN_TYPES)
    return outputs


def test_the_node_restores_a_batch_of_images(tmp_path):
    torch.manual_seed(0)
    weights = str(tmp_path / 'net.pth')
    torch.save({'params': VmambaIR(**NETWORK).state_dict(), 'network_g': {'type': 'VmambaIR', **NETWORK}}, weights)
    (name,) = NODE_CLASS_MAPPINGS.keys() & NODE_DISPLAY_NAME_MAPPINGS.keys()
    node = NODE_CLASS_MAPPINGS[name]
    assert node.RETURN_TYPES == ('IMAGE',) and isinstance(node.CATEGORY, str)
    image = torch.rand(2, 11, 13, 3)
    (result,) = run_node(node, image=image, weights=weights)
    assert result.shape == (2, 22, 26, 3) and result.dtype == torch.float32
    expected = load(weights).restore(image.permute(0, 3, 1, 2))
    assert torch.equal(result, expected.permute(0, 2, 3, 1))
    (tiles,) = run_node(node, image=image, weights=weights, tile=8, self_ensemble=True)
    assert tiles.shape == result.shape and not torch.equal(tiles, result)


def test_a_missing_checkpoint_is_reported_before_the_run():
    (node,) = NODE_CLASS_MAPPINGS.values()
    assert node.VALIDATE_INPUTS(weights='absent.pth') == 'absent.pth: no such file'
