"""Keeps a training running when its output is closed: Ctrl-C also ends the `tee` of a pipeline, and terminals close."""

import os
import sys

from basicsr.utils import get_root_logger


class LastingStream:
    """A text stream that discards everything after its first failed write. The log in the run's folder continues."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Redirects the descriptor, so that other writers do not fail: the logger, Python at exit."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        get_root_logger().warning(f'{self.stream.name}: {error}. It is closed; output continues in this log.')


def keep_output() -> None:
    """Protects stdout and stderr. Idempotent."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream))


def release_output() -> None:
    """Undoes `keep_output`."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if isinstance(stream, LastingStream):
            setattr(sys, name, stream.stream)
