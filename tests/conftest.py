"""BasicSR 1.4.2 can be imported once this package has been."""

import dpmambair_basicsr  # noqa: F401
