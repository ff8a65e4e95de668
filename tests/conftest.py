"""BasicSR 1.4.2 can be imported once this package has been; in this process it is patched as by our commands.

Ctrl-C and SIGHUP reach what tests start, also where the tests themselves run in a shell's background or under nohup.
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
    """A test's option `scan_backend` ends with it."""
    yield
    from dpmambair_basicsr.ops.selective_scan.backend import set_default_backend

    set_default_backend(None)
