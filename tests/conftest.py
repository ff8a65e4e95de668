"""Makes BasicSR 1.4.2 importable, by importing this package first, and patches it as our commands do.

Ctrl-C and SIGHUP reach the processes that tests start, even if the tests run in a shell's background or under nohup.
"""

import signal

import pytest

import dpmambair_basicsr  # noqa: F401

# isort: split
from dpmambair_basicsr.patches.apply import apply_patches

apply_patches()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def default_backend():
    """Resets the option `scan_backend` after each test."""
    yield
    from dpmambair_basicsr.ops.selective_scan.backend import set_default_backend

    set_default_backend(None)
