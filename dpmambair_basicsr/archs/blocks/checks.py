from collections.abc import Sequence


def one_of(key: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError naming `key` unless `value` is among `choices`."""
    if value not in choices:
        raise ValueError(f'{key}: must be one of {", ".join(map(repr, choices))}, got {value!r}')
