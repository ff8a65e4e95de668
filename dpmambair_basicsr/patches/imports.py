"""Makes BasicSR importable with current libraries, and registers our classes once it has been imported.

`prepare` supplies modules that BasicSR imports but that no longer exist; each is used only if the real one is missing.
Nothing here imports torch or BasicSR before BasicSR itself has been imported.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import warnings
from pathlib import Path


def functional_tensor(module) -> None:
    """Stands in for torchvision.transforms.functional_tensor.

    Fixes: torchvision 0.17 removed it, and basicsr.data.degradations imports it.
    Remove once: BasicSR 1.4.2 is no longer supported; master imports from `functional`.
    """
    from torchvision.transforms.functional import rgb_to_grayscale

    module.rgb_to_grayscale = rgb_to_grayscale


def distutils(module) -> None:
    """Stands in for the package distutils, see `distutils_version`."""


def distutils_version(module) -> None:
    """Stands in for distutils.version with a LooseVersion that compares release numbers.

    Fixes: Python 3.12 removed distutils, and basicsr.archs.arch_util compares torchvision's version with it.
        setuptools brings it back, so this is for environments without setuptools.
    Remove once: BasicSR stops importing it.
    """

    class LooseVersion(list):
        def __init__(self, version: str):
            super().__init__(int(number) for number in re.findall(r'\d+', version.partition('+')[0]))

    module.LooseVersion = LooseVersion


def basicsr_version(module) -> None:
    """Stands in for basicsr/version.py.

    Fixes: setup.py generates it and git ignores it, so a plain clone lacks what `basicsr/__init__` imports.
    Remove once: BasicSR keeps its version in a tracked file.
    """
    file = Path(sys.modules['basicsr'].__path__[0]).parent / 'VERSION'
    module.__version__ = file.read_text().strip() if file.is_file() else 'unknown'
    module.__gitsha__ = 'unknown'


STAND_INS = {
    'torchvision.transforms.functional_tensor': functional_tensor,
    'distutils': distutils,
    'distutils.version': distutils_version,
    'basicsr.version': basicsr_version,
}


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on sys.meta_path, so it only sees modules that no other finder has."""

    def find_spec(self, name, path=None, target=None):
        if name in STAND_INS:
            return importlib.util.spec_from_loader(name, self, is_package=name == 'distutils')
        return None

    def exec_module(self, module) -> None:
        STAND_INS[module.__name__](module)


def prepare() -> None:
    """Makes BasicSR importable; call it before BasicSR is imported. Idempotent."""
    if not any(type(finder).__name__ == 'StandInFinder' for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `callback` right after each execution of the module `name`."""

    def __init__(self, name: str, callback):
        self.name, self.callback = name, callback

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self.callback()

            spec.loader.exec_module = exec_module
        return spec


def when_basicsr_is_imported(register) -> None:
    """Calls `register` once BasicSR's five kinds of modules are imported, immediately if they already are.

    `basicsr/__init__` imports archs, data, losses, metrics and models in this order, then among others `basicsr.test`.
    If a file in basicsr/models imports this package, models is only half imported, hence the module after it.
    """

    def register_if_possible():
        try:
            if importlib.util.find_spec('basicsr.utils.registry') is None:
                return  # BasicSR before 1.3, such as NAFNet's and Restormer's: there is nothing to register with
            register()
        except Exception as error:  # an incompatible basicsr must still be importable
            package = ', '.join(sys.modules['basicsr'].__path__)
            message = f'dpmambair_basicsr is not registered with {package}: {type(error).__name__}: {error}'
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    models = sys.modules.get('basicsr.models')
    if models is None or getattr(models.__spec__, '_initializing', False):
        if not any(type(finder).__name__ == 'AfterImport' for finder in sys.meta_path):
            name = 'basicsr.models' if models is None else 'basicsr.test'
            sys.meta_path.insert(0, AfterImport(name, register_if_possible))
    else:
        register_if_possible()
