from types import ModuleType

from dpmambair_basicsr.files.errors import MissingLibraryError


def import_piq(loss: str) -> ModuleType:
    """The package piq. Raises MissingLibraryError with the install command."""
    try:
        import piq
    except ImportError as error:
        raise MissingLibraryError(f"{loss} needs piq ({error}): pip install 'dpmambair_basicsr[losses]'") from error
    return piq
