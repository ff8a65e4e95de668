"""pyproject.toml as data."""

import re
import sys

from support.commands import PACKAGE_PARENT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest


def pyproject() -> dict:
    return tomllib.loads((PACKAGE_PARENT / 'pyproject.toml').read_text(encoding='utf-8'))


def name_of(requirement: str) -> str:
    return re.match(r'[\w.-]+', requirement)[0].lower()
