"""Selects the trained parameters of a network, and groups them for an optimizer."""

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def freeze(net: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters whose names match one of the patterns (fnmatch), e.g. `extractor.*`.

    Buffers, such as the running averages of batch normalization, are still updated.

    Raises:
        ValueError: naming `train.freeze`, if a pattern matches no parameter or nothing is left to train.
    """
    parameters = dict(net.named_parameters())
    for pattern in patterns:
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            examples = ', '.join(dict.fromkeys(f'{name.partition(".")[0]}.*' for name in parameters))
            raise ValueError(
                f'train.freeze: {pattern!r} matches no parameter of {type(net).__name__}; choose from {examples}'
            )
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f'train.freeze: leaves no parameter of {type(net).__name__} to train')


def log_frozen(net: nn.Module) -> None:
    frozen = [parameter for parameter in net.parameters() if not parameter.requires_grad]
    count = sum(parameter.numel() for parameter in frozen)
    total = sum(parameter.numel() for parameter in net.parameters())
    logging.getLogger('basicsr').info(
        f'{type(net).__name__}: {len(frozen)} of {len(list(net.parameters()))} parameters are frozen '
        f'({count:,d} of {total:,d} numbers).'
    )


def parameter_groups(net: nn.Module) -> list[dict]:
    """The trainable parameters; those marked `no_weight_decay` form a separate group without weight decay."""
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    marked = [parameter for parameter in trainable if getattr(parameter, 'no_weight_decay', False)]
    others = [parameter for parameter in trainable if not getattr(parameter, 'no_weight_decay', False)]
    return [{'params': others}, *([{'params': marked, 'weight_decay': 0.0}] if marked else [])]
