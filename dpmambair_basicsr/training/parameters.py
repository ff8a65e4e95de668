"""Which parameters of a network an optimizer is given."""

from torch import nn


def parameter_groups(net: nn.Module) -> list[dict]:
    """What is trainable; parameters marked `no_weight_decay` are in a group of their own that has none."""
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    marked = [parameter for parameter in trainable if getattr(parameter, 'no_weight_decay', False)]
    others = [parameter for parameter in trainable if not getattr(parameter, 'no_weight_decay', False)]
    return [{'params': others}, *([{'params': marked, 'weight_decay': 0.0}] if marked else [])]
