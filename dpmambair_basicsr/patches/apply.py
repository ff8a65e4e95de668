"""Applies the patches of BasicSR: `patches/<topic>.py`, one function per patch.

BasicSR's files are never edited: single functions are replaced once BasicSR is imported. Each docstring says what
breaks, where in BasicSR 1.4.2, and when the patch can go. No patch asks for a version: a replacement is right wherever
the function exists, and what a fork does not have is left alone.
"""

import functools
import importlib
import pkgutil
import sys

from dpmambair_basicsr.patches.registry import PATCHES

TOPICS = ('options', 'distributed', 'fixes', 'ssim', 'checkpoints', 'seeding', 'signals')


def apply_patches() -> None:
    """Applies every patch to the imported BasicSR. Idempotent."""
    for topic in TOPICS:
        importlib.import_module(f'dpmambair_basicsr.patches.{topic}')  # notes its patches
    for owner_name, attribute, make in PATCHES:
        try:
            owner = pkgutil.resolve_name(owner_name)
            original = getattr(owner, attribute)
        except (ImportError, AttributeError):
            continue  # a fork without it
        if hasattr(original, 'patched_by'):
            continue
        replacement = functools.update_wrapper(make(original), original)
        replacement.patched_by = __name__
        setattr(owner, attribute, replacement)
        for name in ('basicsr.train', 'basicsr.test', '__main__'):  # these import functions by name
            if getattr(sys.modules.get(name), attribute, None) is original:
                setattr(sys.modules[name], attribute, replacement)
