"""One key of an option file, declared where it is read. Validation and JSON schema are generated from these rows."""

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
        name: the key. `*` stands for the letter of one of the file's networks (`optim_*`), or for the name of a loss.
        kind: its type, written like a constructor's annotation; with None the key may be empty (`~`).
        text: one-line description for people and editors.
        low, high: inclusive limits of a number.
        required: TRAIN, TEST or both; for a dataset, in the training set only.
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
