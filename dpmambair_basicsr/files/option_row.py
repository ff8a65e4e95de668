"""One key of an option file, declared where it is read; the checks and the JSON schema are made of these rows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import UnionType

TRAIN, TEST = 'train', 'test'


@dataclass(frozen=True)
class Option:
    """A row of `option_checks.schema.OPTIONS`, or of `option_keys` of a model or dataset class.

    Args:
        section: '' for the top of the file, 'train', 'val', 'path', 'logger', 'logger.wandb', 'dist_params'; 'datasets'
            for a key of each dataset.
        name: the key. `*` stands for the letter of a network of the file (`optim_*`), or for the name of a loss.
        kind: written as a constructor's annotation; with None the key may be empty (`~`).
        text: one line for people and editors.
        low, high: of a number, both inclusive.
        required: in training, in testing; of a dataset, in the one that is trained with.
        calls: what the section's `type` names, a key of `option_checks.calls.CALLS`; the rest are its arguments.
    """

    section: str
    name: str
    kind: type | UnionType
    text: str
    low: float = -math.inf
    high: float = math.inf
    required: tuple[str, ...] = ()
    calls: str = ''


def names(rows: Iterable[Option]) -> frozenset[str]:
    return frozenset(row.name for row in rows)
