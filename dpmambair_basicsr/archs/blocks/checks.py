from collections.abc import Sequence


def one_of(key: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError naming `key` unless `value` is among `choices`."""
    if value not in choices:
        raise ValueError(f'{key}: {value!r} is not one of {", ".join(map(repr, choices))}')
