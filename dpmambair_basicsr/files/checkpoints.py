"""Read checkpoint files as BasicSR writes them, {'params': state dict, ...}, with errors that name the file.

Ours also contain the options of their network, {'network_g': {'type': ..., ...}}: plain Python values, which
torch.load(weights_only=True) reads and which programs that read 'params' ignore.

A `.safetensors` file holds one state dict, read as 'params', and text: `network_g` is stored as JSON. Files written by
a training also hold the EMA: all names begin with the key of their state dict, `params.` or `params_ema.`, and
the text `state_dicts` lists these keys.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.errors import CheckpointError
from dpmambair_basicsr.files.regular import check_regular

SAFETENSORS = '.safetensors'
# Keys of a file's network: BasicSR's, those common in other programs, None for a bare state dict.
WRAPPINGS = ('params_ema', 'params', 'params-ema', 'model_state_dict', 'state_dict', 'model', 'net', None)
MAPPED = os.name == 'posix'  # Windows cannot delete a file, such as an old training state, while it is mapped


def read_checkpoint(path: str) -> dict:
    """The content of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: naming the file: it is not a checkpoint or safetensors file, or does not contain a dictionary;
            or the package safetensors is not installed; see also `check_file`.
    """
    if str(path).endswith(SAFETENSORS):
        return read_safetensors(path)
    check_file(path)
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # any: torch.load raises many types, and their messages name no file
        raise CheckpointError(f'{path}: not a checkpoint that torch.load can read ({type(error).__name__})') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path}: expected a dictionary, got {type(checkpoint).__name__}')
    return checkpoint


def check_file(path: str | Path) -> None:
    """Check that reading a file terminates and needs no more memory than the file's size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file: it is not a regular file, or a compressed archive, which torch.save never writes: a
            few MB could expand to as many GB.
    """
    try:
        check_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} does not exist') from None
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            return  # torch cannot read it either, and its message is better
        if packed:
            raise ValueError(f'{path}: its part {packed[0][:60]} is compressed; torch.save never compresses')


def read_safetensors(path: str) -> dict:
    """{'params': state dict}, and the other entries passed to `encode_safetensors`. Raises as `read_checkpoint`."""
    package = import_safetensors(path)
    check_file(path)
    try:
        with package.safe_open(path, framework='pt') as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = file.metadata() or {}
        content = {key: json.loads(value) for key, value in text.items() if is_text(key)}
        if 'state_dicts' not in text:
            return {'params': weights} | content
        for key in json.loads(text['state_dicts']):
            prefix = f'{key}.'
            content[key] = {
                name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)
            }
        return content
    except Exception as error:  # any: the package has an exception type of its own
        raise CheckpointError(f'{path}: cannot be read by safetensors ({type(error).__name__}: {error})') from error


def write_safetensors(
    path: str, weights: dict[str, Tensor], network: dict | None = None, classifier: dict | None = None
) -> None:
    """Write a state dict, the options of its network and its degradation classifier, atomically.

    Raises:
        CheckpointError: if the package is not installed.
        OSError: if the file cannot be written.
    """
    others = {'network_g': network, 'degradation_classifier': classifier}
    content = encode_safetensors(path, {'params': weights} | {key: value for key, value in others.items() if value})
    with replacing(path) as part:
        part.write_bytes(content)


def encode_safetensors(path: str, content: dict) -> bytes:
    """Encode state dicts, and plain values under `is_text` keys; `read_safetensors` is the inverse.

    Raises:
        CheckpointError: if the package is not installed, or a state dict contains something other than tensors.
    """
    package = import_safetensors(path)
    text = {key: json.dumps(value) for key, value in content.items() if is_text(key)}
    state_dicts = {key: value for key, value in content.items() if not is_text(key)}
    for key, weights in state_dicts.items():
        if not is_state_dict(weights):
            name = next(name for name, value in weights.items() if not isinstance(value, Tensor))
            raise CheckpointError(
                f'{path}: {key}, {name} is not a tensor, and safetensors supports only tensors; use .pth'
            )
    if len(state_dicts) > 1:
        text['state_dicts'] = json.dumps([*state_dicts])
        tensors = {f'{key}.{name}': part for key, weights in state_dicts.items() for name, part in weights.items()}
    else:
        (tensors,) = state_dicts.values()
    # safetensors does not support shared storage.
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    return package.torch.save(tensors, {'format': 'pt'} | text)


def is_text(key: str) -> bool:
    """Whether a .safetensors file stores this key as JSON.

    True for the options of a network, the entry of `models.best_checkpoint`, an `inference.degradation_classifier`.
    """
    return key.startswith('network_') or key in ('best', 'degradation_classifier')


def import_safetensors(path: str):
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError(f'{path}: requires safetensors: pip install safetensors') from None
    return safetensors


def read_weights(path: str, *keys: str | None) -> dict[str, Tensor]:
    """The state dict in a file under the first of the keys that exists.

    Prefixes added by wrappers are removed: `module.` of parallel training, `_orig_mod.` of torch.compile.

    Args:
        keys: None stands for the file itself, a bare state dict.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: naming the file and its keys, if none of `keys` contains a state dict.
    """
    return select_weights(path, read_checkpoint(path), *keys)


def wanted_keys(options: dict, network: str, is_train: bool) -> tuple[str | None, ...]:
    """Keys to look for in the checkpoint of a network, according to the section `path` of an option file.

    Only `param_key_<network>`, if given. Without it, a test uses the EMA if there is one, like validation and
    `restore`; a training starts from `params`.
    """
    if f'param_key_{network}' in options:
        return (options[f'param_key_{network}'],)
    return ('params', None) if is_train else ('params_ema', 'params', None)


def found_key(path: str, checkpoint: dict, *keys: str | None) -> str | None:
    """The first of the keys that is in the file, or else the first key; for a .safetensors file, its only key."""
    if str(path).endswith(SAFETENSORS) and sum(not is_text(key) for key in checkpoint) == 1:
        return 'params'
    return next((key for key in keys if key is None or key in checkpoint), keys[0])


def select_weights(path: str, checkpoint: dict, *keys: str | None) -> dict[str, Tensor]:
    """`read_weights` for a file that has been read."""
    key = found_key(path, checkpoint, *keys)
    weights = checkpoint if key is None else checkpoint.get(key)
    if not is_state_dict(weights):
        found = ', '.join(map(str, list(checkpoint)[:5])) + (', ...' if len(checkpoint) > 5 else '')
        if key is None or key in checkpoint:
            place = 'it' if key is None else f'its key {key!r}'
            raise CheckpointError(f'{path}: {place} is not a state dict; keys of the file: {found}')
        advice = 'it is a bare state dict, so set path.param_key_g to ~; ' if is_state_dict(checkpoint) else ''
        raise CheckpointError(f'{path}: has no key {key!r}; {advice}keys of the file: {found}')
    return {name.replace('_orig_mod.', '').removeprefix('module.'): value for name, value in weights.items()}


class PlainValue:
    """A plain value that can be passed to BasicSR's save_network in place of a network, which then saves it unchanged.

    save_network calls each network's state_dict, and moves each item of that mapping to the CPU.
    """

    def __init__(self, value):
        self.value = value

    def state_dict(self) -> dict[str, 'PlainValue']:
        return {key: PlainValue(value) for key, value in self.value.items()}

    def cpu(self):
        return plain(self.value)


def plain(value):
    """The same value with only dict and list; BasicSR reads OrderedDicts from YAML."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def is_state_dict(value) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(value, dict) and all(isinstance(part, Tensor) for part in value.values())


def differences(net: nn.Module, state_dict: dict) -> str:
    """A readable report of the mismatches between a state dict and a network; '' if there are none."""
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
    """Load a file of torch.save, weights_only; storage is mapped, not read. A CheckpointError names the file."""
    try:  # the format before torch 1.6 is not a zip file and cannot be mapped
        check_file(file)
        return torch.load(file, map_location='cpu', weights_only=True, mmap=MAPPED and zipfile.is_zipfile(file))
    except Exception as error:  # any: torch.load raises many types
        if str(error).startswith(f'{file}: '):
            raise CheckpointError(str(error)) from None
        reason = ' '.join(str(error).split()).partition('. ')[0]
        raise CheckpointError(f'{file}: {type(error).__name__}: {reason}') from None
