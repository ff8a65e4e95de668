"""Errors that a user can fix, and how a command ends with one.

Their messages name the file, key or value, and the remedy. The library raises them; `exit_on_error` is for a command's
`main`, and for the two patches that BasicSR's own train.py and test.py call without a `main` of ours.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INSTALL_TRAINING = "pip install 'dpmambair_basicsr[train]', then dpmambair install_basicsr"


class UserError(Exception):
    """Something that a user can fix."""


class OptionError(UserError, ValueError):
    """Options that cannot be used. The message names the file, and the line or the key."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or training state that cannot be used."""


class InputError(UserError, ValueError):
    """Invalid inputs of a command, or files in the way of its outputs: images, downloads, projects."""


class MissingLibraryError(UserError, ImportError):
    """A required library is not installed, or too old."""


@contextmanager
def exit_on_error(command: str = '', *others: type[Exception]) -> Iterator[None]:
    """Ends the program with `command: message` and exit status 1 for a UserError, or one of the others."""
    try:
        yield
    except (UserError, *others) as error:
        message = message_of(error)
        raise SystemExit(f'{command}: {message}' if command else message) from None


def message_of(error: Exception) -> str:
    """Its text; of the system's errors without the number, and the file first, as in our own."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f'{error.filename}: {error.strerror}'
    return str(error)


def print_any_name() -> None:
    """Makes stdout and stderr escape characters of file names that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
