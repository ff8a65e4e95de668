"""Recognise the network of a state dict, and its arguments, by the names and shapes of its parameters.

For files without options: bare state dicts, those of other programs, the published checkpoints of VmambaIR. `load` and
spandrel use the same functions. VmambaIR's channel_fusion cannot be inferred: it is assumed to be 'add' at scale 1 and
'modulate' otherwise, as published.
"""

from torch import Tensor

from dpmambair_basicsr.archs.dpmambair_arch import DPMambaIR

StateDict = dict[str, Tensor]

FIRST = 'encoder_level1.0.'
LEVELS = ('encoder_level1', 'encoder_level2', 'encoder_level3', 'latent')
# All networks of both kinds have these, only VmambaIR has IN_CONV_BIAS.
SHARED = (
    'patch_embed.proj.weight',
    f'{FIRST}norm1.body.weight',
    f'{FIRST}attn.x_proj_weight',
    f'{FIRST}attn.dt_projs_weight',
    f'{FIRST}attn.A_logs',
    'latent.0.attn.out_norm.body.weight',
    'reduce_chan_level3.weight',
)
IN_CONV_BIAS = f'{FIRST}attn.in_conv.bias'


def network_options(state_dict: StateDict) -> dict | None:
    """`network_g` of the option file, {'type': ..., ...}; None: not a VmambaIR, nor a DPMambaIR that needs no label.

    Raises:
        ValueError: a DPMambaIR that is no longer supported, see `DPMambaIR.options_of_weights`.
    """
    try:
        if is_vmambair(state_dict):
            return {'type': 'VmambaIR', **vmambair_options(state_dict)}
        if is_dpmambair(state_dict):
            return {'type': 'DPMambaIR', **dpmambair_options(state_dict)}
    except (KeyError, IndexError, ZeroDivisionError):  # only part of a network, or its names with other shapes
        return None
    return None


def own_names(state_dict: StateDict) -> StateDict:
    """Remove the prefix that a wrapper has added to all names of one of our networks, such as Lightning's `model.`.

    From a training's .safetensors file, select the EMA, under `params_ema.`.
    """
    state_dict = {name: value for name, value in state_dict.items() if name.startswith('params_ema.')} or state_dict
    prefix = next((name.removesuffix(SHARED[0]) for name in state_dict if name.endswith(SHARED[0])), '')
    if not all(name.startswith(prefix) for name in state_dict):
        return state_dict
    return {name.removeprefix(prefix): value for name, value in state_dict.items()}


def is_vmambair(state_dict: StateDict) -> bool:
    return has_all(state_dict, *SHARED, IN_CONV_BIAS)


def is_dpmambair(state_dict: StateDict) -> bool:
    return has_all(state_dict, *SHARED) and IN_CONV_BIAS not in state_dict and not has_classes(state_dict)


def has_classes(state_dict: StateDict) -> bool:
    return any(name.startswith('classes.') for name in state_dict)


def has_all(state_dict: StateDict, *names: str) -> bool:
    return all(name in state_dict for name in names)


def shared_options(state_dict: StateDict) -> dict:
    """The constructor arguments common to both networks."""
    width, channels = state_dict['patch_embed.proj.weight'].shape[:2]
    options = {
        'inp_channels': channels,
        'out_channels': channels,
        'dim': width,
        'num_blocks': [number_of(state_dict, level) for level in LEVELS],
        'num_refinement_blocks': number_of(state_dict, 'refinement'),
        'd_state': state_dict[f'{FIRST}attn.A_logs'].shape[1],
    }
    if (weight := state_dict.get('latent.0.ffn.project_out.weight')) is not None:
        # Hidden widths are int(width * factor). The factor of the largest gives the others; 0.5 is for rounding.
        options['ffn_expansion_factor'] = (weight.shape[1] + 0.5) / weight.shape[0]
    return options


def vmambair_options(state_dict: StateDict) -> dict:
    """The constructor arguments of a VmambaIR's state dict."""
    attn = f'{FIRST}attn.'
    scale = scale_of(state_dict)
    scans = {'lifted': f'{attn}conv_cin.weight', 'scalar': f'{attn}xc_proj_weight'}
    return {
        **shared_options(state_dict),
        'bias': 'patch_embed.proj.bias' in state_dict,
        'scale': scale,
        'channel_scan': next((scan for scan, name in scans.items() if name in state_dict), 'none'),
        'channel_fusion': 'add' if scale == 1 else 'modulate',
        'planar_directions': state_dict[f'{attn}x_proj_weight'].shape[0],
        'ffn': f'{FIRST}ffn.project_out.weight' in state_dict,
        'linear_projection': state_dict[f'{attn}in_conv.weight'].dim() == 2,
    }


def dpmambair_options(state_dict: StateDict) -> dict:
    """The constructor arguments of a DPMambaIR's state dict."""
    attn = f'{FIRST}attn.'
    kinds = {'modulate': 'modulation.', 'concat': 'insertion.reduce.', 'attention': 'insertion.query.'}
    present = [kind for kind, name in kinds.items() if any(key.startswith(attn + name) for key in state_dict)]
    options = {
        **shared_options(state_dict),
        'd_inner': [state_dict[f'{level}.0.attn.conv2d.weight'].shape[0] for level in LEVELS],
        'prompt': [
            name
            for name in ('delta', 'B', 'C')
            if any(f'{attn}modulation.layers.{layer}.weight' in state_dict for layer in (name, f'{name}_scale'))
        ],
        'insertion': present[0] if present else 'none',
        'high_frequency': f'{attn}high_frequency.alpha' in state_dict,
        'directions': state_dict[f'{attn}x_proj_weight'].shape[0],
    }
    if present:
        options['embed_dim'] = state_dict['extractor.head.2.weight'].shape[0]
    return options | DPMambaIR.options_of_weights(state_dict)


def number_of(state_dict: StateDict, sequence: str) -> int:
    """The number of modules in an nn.Sequential."""
    depth = sequence.count('.') + 1
    return len({name.split('.')[depth] for name in state_dict if name.startswith(f'{sequence}.')})


def scale_of(state_dict: StateDict) -> int:
    """VmambaIR's scale: each tail convolution widens by the square of the following pixel shuffle's factor."""
    weights = [value for name, value in state_dict.items() if name.startswith('tail.0.') and name.endswith('.weight')]
    scale = 1
    for weight in weights:
        scale *= round((weight.shape[0] / weight.shape[1]) ** 0.5)
    return scale
