"""BasicSR 1.4.2 can be imported once this package has been; in this process it is patched as by our commands."""

import dpmambair_basicsr  # noqa: F401

# isort: split
from dpmambair_basicsr.patches.apply import apply_patches

apply_patches()
