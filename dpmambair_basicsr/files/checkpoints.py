"""Checkpoint files as BasicSR writes them, {'params': state dict, ...}, read with errors that name the file.

Ours also hold the options of their network, {'network_g': {'type': ..., ...}}: plain Python values, which
torch.load(weights_only=True) reads and which programs that ask for 'params' never see.

A `.safetensors` file holds one state dict, which is read as 'params', and text: `network_g` is there as JSON.
"""

import json

import torch
from torch import Tensor, nn

from dpmambair_basicsr.files.atomic import replacing

SAFETENSORS = '.safetensors'


def read_checkpoint(path: str) -> dict:
    """What the file holds, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file, if it is none of PyTorch's or does not hold a dictionary; or if it ends in
            .safetensors and is no such file, or that package is not installed.
    """
    if str(path).endswith(SAFETENSORS):
        return read_safetensors(path)
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} does not exist') from None
    except Exception as error:  # torch.load raises many kinds, and their messages name no file
        raise ValueError(f'{path}: is no checkpoint that torch.load can read ({type(error).__name__})') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path}: holds no dictionary but a {type(checkpoint).__name__}')
    return checkpoint


def read_safetensors(path: str) -> dict:
    """{'params': state dict}, and 'network_g' if it is there. Raises as `read_checkpoint` does."""
    package = import_safetensors(path)
    try:
        with package.safe_open(path, framework='pt') as file:
            content = {'params': {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
            network = (file.metadata() or {}).get('network_g')
        return content if network is None else content | {'network_g': json.loads(network)}
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} does not exist') from None
    except Exception as error:  # the package has a kind of its own
        raise ValueError(f'{path}: cannot be read by safetensors ({type(error).__name__}: {error})') from error


def write_safetensors(path: str, weights: dict[str, Tensor], network: dict | None = None) -> None:
    """The state dict, and the options of its network, as a whole or not at all.

    Raises:
        ValueError: if the package is not installed.
        OSError: if it cannot be written.
    """
    package = import_safetensors(path)
    weights = {name: value.contiguous().clone() for name, value in weights.items()}  # it refuses shared storage
    content = package.torch.save(weights, {'format': 'pt'} | ({'network_g': json.dumps(network)} if network else {}))
    with replacing(path) as part:
        part.write_bytes(content)


def import_safetensors(path: str):
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(f'{path}: needs a package that is not installed: pip install safetensors') from None
    return safetensors


def read_weights(path: str, *keys: str | None) -> dict[str, Tensor]:
    """The state dict in a file under the first of the keys that is there, without the `module.` of parallel training.

    Args:
        keys: None stands for the file itself, a bare state dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file and the keys it has, if there is no state dict under any of these.
    """
    return select_weights(path, read_checkpoint(path), *keys)


def select_weights(path: str, checkpoint: dict, *keys: str | None) -> dict[str, Tensor]:
    """`read_weights` of a file that has been read."""
    key = next((key for key in keys if key is None or key in checkpoint), keys[0])
    weights = checkpoint if key is None else checkpoint.get(key)
    if not is_state_dict(weights):
        found = ', '.join(map(str, list(checkpoint)[:5])) + (', ...' if len(checkpoint) > 5 else '')
        if key is None or key in checkpoint:
            place = 'it' if key is None else f'its key {key!r}'
            raise ValueError(f'{path}: {place} is no state dict; keys of the file: {found}')
        advice = 'it is a bare state dict, for which path.param_key_g is ~; ' if is_state_dict(checkpoint) else ''
        raise ValueError(f'{path}: holds no key {key!r}; {advice}keys of the file: {found}')
    return {name.removeprefix('module.'): value for name, value in weights.items()}


class PlainValue:
    """A value in the place of a network in BasicSR's save_network, which then saves it as it is.

    save_network asks each network for its state_dict, a mapping, and puts each item of it on the CPU.
    """

    def __init__(self, value):
        self.value = value

    def state_dict(self) -> dict[str, 'PlainValue']:
        return {key: PlainValue(value) for key, value in self.value.items()}

    def cpu(self):
        return plain(self.value)


def plain(value):
    """The same value made of dict and list only: what BasicSR reads from YAML are OrderedDicts."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def is_state_dict(value) -> bool:
    return isinstance(value, dict) and all(isinstance(part, Tensor) for part in value.values())


def differences(net: nn.Module, state_dict: dict) -> str:
    """One readable report of how a state dict does not fit a network; '' if it fits."""
    own = net.state_dict()
    parts = {
        'missing in the file': sorted(own.keys() - state_dict.keys()),
        'not in the network': sorted(state_dict.keys() - own.keys()),
        'of another shape': [
            f'{name} {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}'
            for name in own
            if name in state_dict and own[name].shape != state_dict[name].shape
        ],
    }
    lines = [
        f'  {len(names)} {what}: {", ".join(names[:5])}{", ..." if len(names) > 5 else ""}'
        for what, names in parts.items()
        if names
    ]
    return '\n'.join([f'does not fit {type(net).__name__}:', *lines]) if lines else ''


def read_on_cpu(file):
    """What torch.save has written, weights_only; storage is mapped, not read. ValueError, naming the file, if not."""
    import zipfile

    import torch

    try:  # the format before torch 1.6 is no zip file and cannot be mapped
        return torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch.load raises many kinds
        reason = ' '.join(str(error).split()).partition('. ')[0]
        raise ValueError(f'{file}: {type(error).__name__}: {reason}') from None
