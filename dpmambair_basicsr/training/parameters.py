"""Which parameters of a network are trained, and how an optimizer is given them."""

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def freeze(net: nn.Module, patterns: Sequence[str]) -> None:
    """No longer train the parameters whose name matches one of the patterns, as `extractor.*` (fnmatch).

    Buffers, as the averages of batch normalization, continue.

    Raises:
        ValueError: naming `train.freeze`, if a pattern matches no parameter or nothing is left to train.
    """
    parameters = dict(net.named_parameters())
    for pattern in patterns:
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            examples = ', '.join(dict.fromkeys(f'{name.partition(".")[0]}.*' for name in parameters))
            raise ValueError(
                f'train.freeze: {pattern!r} matches no parameter of {type(net).__name__}; there are {examples}'
            )
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f'train.freeze: leaves nothing of {type(net).__name__} to train')


def log_frozen(net: nn.Module) -> None:
    frozen = [parameter for parameter in net.parameters() if not parameter.requires_grad]
    count = sum(parameter.numel() for parameter in frozen)
    total = sum(parameter.numel() for parameter in net.parameters())
    logging.getLogger('basicsr').info(
        f'{type(net).__name__}: {len(frozen)} of {len(list(net.parameters()))} parameters are frozen '
        f'({count:,d} of {total:,d} numbers).'
    )


def parameter_groups(net: nn.Module) -> list[dict]:
    """What is trainable; parameters marked `no_weight_decay` are in a group of their own that has none."""
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    marked = [parameter for parameter in trainable if getattr(parameter, 'no_weight_decay', False)]
    others = [parameter for parameter in trainable if not getattr(parameter, 'no_weight_decay', False)]
    return [{'params': others}, *([{'params': marked, 'weight_decay': 0.0}] if marked else [])]
