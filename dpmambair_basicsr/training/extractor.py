"""Loads the frozen degradation extractor of a network in training."""

import logging

from torch import nn

from dpmambair_basicsr.files.checkpoints import read_weights, wanted_keys
from dpmambair_basicsr.files.errors import OptionError


def load_extractor(net: nn.Module, path: dict) -> None:
    """Gives a network that needs one (DPMambaIR) its degradation extractor, which is frozen; see `stage_1_checkpoint`.

    Args:
        path: the section `path` of the options.

    Raises:
        OptionError: as `stage_1_checkpoint`, naming the key.
        ValueError: as `read_extractor`.
    """
    try:
        file = stage_1_checkpoint(net, path)
    except ValueError as error:
        raise OptionError(f'path.pretrain_network_e: {error}') from error
    if file is not None:
        read_extractor(net, file)
        logging.getLogger('basicsr').info(f'Loading the degradation extractor from {file}; it stays frozen.')


def stage_1_checkpoint(net: nn.Module, path: dict) -> str | None:
    """`path.pretrain_network_e`, or None if the network already has its extractor, or needs none.

    It has one if `path.pretrain_network_g` is a checkpoint of a whole DPMambaIR, as when a training is resumed: even
    `strict_load_g: false` loads what is in the file.

    Raises:
        ValueError: neither file has a matching extractor, both do, or the network needs none; without the key.
    """
    whole, stage_1 = path.get('pretrain_network_g'), path.get('pretrain_network_e')
    if not getattr(net, 'needs_extractor', False):
        if stage_1 is not None:
            raise ValueError(f'this {type(net).__name__} does not use an extractor; write ~')
        return None
    if whole is not None and holds_extractor(whole, path, net):
        if stage_1 is not None and not path.get('resume_state'):
            raise ValueError(f'{whole} includes its own extractor; write ~')
        return None
    if stage_1 is None:
        also = '' if whole is None else f', and {whole} has no matching one'
        raise ValueError(
            f"missing{also}. The network's degradation extractor is frozen during training: pre-train it with "
            'options/train_degradation_extractor.yml and name the checkpoint here'
        )
    return stage_1


def holds_extractor(file: str, path: dict, net: nn.Module) -> bool:
    weights = read_weights(file, *wanted_keys(path, 'g', is_train=True))
    own = {f'extractor.{name}': value.shape for name, value in net.extractor.state_dict().items()}
    return all(name in weights and weights[name].shape == shape for name, shape in own.items())


def read_extractor(net: nn.Module, file: str) -> None:
    """Load the extractor of a checkpoint of stage 1. Raises ValueError, naming the file, if it does not match."""
    try:
        net.load_extractor(read_weights(file, 'params_ema', 'params', None))
    except RuntimeError as error:
        raise ValueError(f'{file}: not a checkpoint of stage 1 for this network: {error}') from error
